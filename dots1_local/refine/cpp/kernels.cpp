// Choose codes and scales of ggml's block formats under a quadratic form of the errors.
//
// `begin` chooses scales, `feed` rounds with error feedback, and `descend` changes one code or
// scale at a time so that e H e' falls. Products of whole panels are left to BLAS.

#include "begin.h"
#include "choose.h"

namespace {

// The best change of d (or dmin) of the block [start, stop), with all codes as they are; `g` is
// e H, and what the change adds to it is added to `change`.
void descend_scale(Row &row, const float *g, int start, int stop, bool of_min, float *change) {
  const Panel &p = row.panel;
  const int sub = row.f.sub;
  float u[kPanel], hu[kPanel] = {0};
  for (int j = start; j < stop; j += sub) {
    int end = std::min(j + sub, stop);
    float factor = of_min ? -(float)row.min(j) : row.step(row.scale(j));
    if (!of_min) row.values(j, end, u);
    for (int i = j; i < end; i++) u[i] = of_min ? factor : factor * u[i];
  }
  for (int j = start; j < stop; j++)
    if (p.form) add(hu, u[j], p.form + (size_t)j * p.width, p.width);
    else hu[j] = p.diagonal[(size_t)j * row.f.vector + j % row.f.vector] * u[j];
  float steep = dot(g + start, u + start, stop - start);
  float curved = dot(hu + start, u + start, stop - start);
  float &scale = of_min ? row.dmin(start) : row.d(start);
  float moved = curved > 0 ? to_half(scale + steep / curved) - scale : 0;
  float gained = moved * (moved * curved - 2 * steep);
  if (!(gained < 0)) return;
  scale += moved;
  add(change, -moved, hu, p.width);
}

template <int V>
void feed_rows(const Format &f, const Rows &rows, const Panel &p, float *targets) {
  for (int start = 0; start < p.width; start += f.sub)
    for (int r = 0; r < rows.rows; r++) {
      Row row{f, rows, p, r};
      Feedback mode{row.weights()};
      float *state = targets + (size_t)r * p.width, *errors = row.errors();
      int stop = std::min(start + f.sub, p.width);
      Choice choice;
      choose_block<V>(mode, row, state, start, stop, choice);
      carry<V>(mode, p, state, start, stop, choice.q, start, p.width);
      for (int j = start; j < stop; j++) errors[j] = mode.weights[j] - choice.q[j];
    }
}

// The gradient of a row in [start, stop): `gradients`, and what the changes of all rows add to it.
void gather(const Rows &rows, const Panel &p, const float *gradients, const float *coupling,
            const float *moved, int r, int start, int stop, float *g) {
  std::memcpy(g + start, gradients + (size_t)r * p.width + start, (stop - start) * 4);
  for (int k = 0; k < rows.rows; k++)
    add(g + start, coupling[(size_t)r * rows.rows + k], moved + (size_t)k * p.width + start,
        stop - start);
}

template <int V>
void descend_rows(const Format &f, const Rows &rows, const Panel &p, float *gradients,
                    const float *coupling, float *moved) {
  float g[kPanel], before[kPanel];
  auto state_of = [&](int r) { return (coupling ? moved : gradients) + (size_t)r * p.width; };
  auto gradient = [&](int r, int start, int stop) -> const float * {
    if (!coupling) return state_of(r);
    gather(rows, p, gradients, coupling, moved, r, start, stop, g);
    return g;
  };
  for (int block = 0; block < p.width; block += f.block) {
    int end = std::min(block + f.block, p.width);
    for (int start = block; start < end; start += f.sub)
      for (int r = 0; r < rows.rows; r++) {
        Row row{f, rows, p, r};
        Descent mode{before};
        int stop = std::min(start + f.sub, end);
        row.decode(start, stop, before);
        Choice choice;
        const float *state = gradient(r, start, stop);
        if (choose_block<V>(mode, row, state, start, stop, choice))
          carry<V>(mode, p, state_of(r), start, stop, choice.q, 0, p.width);
      }
    for (int r = 0; r < rows.rows; r++) {
      Row row{f, rows, p, r};
      descend_scale(row, gradient(r, block, end), block, end, false, state_of(r));
      if (f.mins) descend_scale(row, gradient(r, block, end), block, end, true, state_of(r));
      for (int j = block; j < end; j += f.sub) row.decode(j, std::min(j + f.sub, end), before);
      for (int j = block; j < end; j++) row.errors()[j] = row.weights()[j] - before[j];
    }
  }
}

}  // namespace

extern "C" {

// Choose the scales to begin with, for a diagonal form and a type without mins.
void begin(const Format *f, const Rows *rows, const Panel *p) {
  switch (f->vector) {
    case 8: return begin_rows<8>(*f, *rows, *p);
    case 4: return begin_rows<4>(*f, *rows, *p);
    default: return begin_rows<1>(*f, *rows, *p);
  }
}

// Round a panel with error feedback; `targets` (rows, width) are the weights plus what the errors
// of earlier panels carry on.
void feed(const Format *f, const Rows *rows, const Panel *p, float *targets) {
  switch (f->vector) {
    case 8: return feed_rows<8>(*f, *rows, *p, targets);
    case 4: return feed_rows<4>(*f, *rows, *p, targets);
    default: return feed_rows<1>(*f, *rows, *p, targets);
  }
}

// Lower e H e' in a panel; `gradients` (rows, width) are those columns of e H. With `coupling`
// (rows, rows), HO divided by its diagonal, they are those of HO E H divided by it, and `moved`,
// 0 at first, receives the change of E H.
void descend(const Format *f, const Rows *rows, const Panel *p, float *gradients,
             const float *coupling, float *moved) {
  switch (f->vector) {
    case 8: return descend_rows<8>(*f, *rows, *p, gradients, coupling, moved);
    case 4: return descend_rows<4>(*f, *rows, *p, gradients, coupling, moved);
    default: return descend_rows<1>(*f, *rows, *p, gradients, coupling, moved);
  }
}

}  // extern "C"
