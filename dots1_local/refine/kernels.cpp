// Choose codes and scales of ggml's block formats under a quadratic form of the errors.
//
// A row's weights are taken apart as blocks.py describes. A panel is up to 256 columns of all rows,
// beginning at a block. Errors are e = w - q. `feed` rounds with error feedback; `descend` changes
// one code or scale at a time so that e H e' falls. Products of whole panels are left to BLAS.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kPanel = 256;  // most columns of a panel
constexpr int kLanes = 16;   // floats that are searched at a time
constexpr float kHuge = 3e38f;
// A neighbouring scale is tried if the best one, with codes as they are, is at least so many steps
// away. Trying all lowers the error by another 1% and takes a third more time.
constexpr float kLeastStep = 0.2f;

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Places __attribute__((vector_size(kLanes * 4)));

}  // namespace

extern "C" {

// How a type makes weights: d * (step0 + step1 * scale) * value * sign - dmin * min.
struct Format {
  int32_t block, sub, vector, codes, levels, mins, signs, shared_half;
  float step0, step1;
  const float *values;  // (codes, vector)
  const float *grid;    // the same, (vector, codes)
};

// Rows taken apart, with the weights and their errors, (rows, stride).
struct Rows {
  int32_t rows, columns, stride;
  const float *weights;
  float *errors;
  float *d, *dmin;
  uint8_t *scales, *mins;
  uint16_t *codes;
  uint8_t *signs;
};

// A panel's quadratic forms. `form` is (width, width): H, or the factor that carries errors on.
// `diagonal` has a (vector, vector) form for each group; `tables`, (groups, patterns, codes), has
// the form of every code by pattern of signs. A form without cross terms is null; it does not depend
// on the signs, and has one pattern.
struct Panel {
  int32_t start, width, patterns;
  const float *form, *diagonal, *tables;
};

}  // extern "C"

namespace {

float to_half(float x) {  // round to F16, and stay finite
  float size = std::fabs(x);
  if (!(size > 0)) return 0;
  int exponent;
  std::frexp(size, &exponent);
  float unit = std::ldexp(1.0f, std::max(exponent, -13) - 11);
  return std::copysign(std::min(std::nearbyint(size / unit) * unit, 65504.0f), x);
}

float dot(const float *a, const float *b, int n) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

void add(float *y, float a, const float *x, int n) {
  for (int i = 0; i < n; i++) y[i] += a * x[i];
}

// One row of a panel.
struct Row {
  const Format &f;
  const Rows &all;
  const Panel &panel;
  int row;

  // Column numbers count from the panel's start.
  size_t at(int j, int size) { return ((size_t)row * all.columns + panel.start + j) / size; }
  float &d(int j) { return all.d[at(j, f.block)]; }
  float &dmin(int j) { return all.dmin[at(j, f.block)]; }
  uint8_t &scale(int j) { return all.scales[at(j, f.sub)]; }
  uint8_t &min(int j) { return all.mins[at(j, f.sub)]; }
  uint16_t *codes(int j) { return all.codes + at(j, f.vector); }
  uint8_t *signs(int j) { return all.signs + at(j, 8); }
  float *errors() { return all.errors + (size_t)row * all.stride + panel.start; }
  const float *weights() { return all.weights + (size_t)row * all.stride + panel.start; }

  float step(int level) { return f.step0 + f.step1 * level; }

  // The values of the codes in the sub-block [start, stop), with signs.
  void values(int start, int stop, float *out) {
    const int v = f.vector;
    const uint16_t *code = codes(start);
    for (int j = start; j < stop; j += v, code++)
      std::memcpy(out + j, f.values + (size_t)*code * v, v * 4);
    if (!f.signs) return;
    const uint8_t *sign = signs(start);
    for (int j = start; j < stop; j++)
      if (sign[(j - start) / 8] >> j % 8 & 1) out[j] = -out[j];
  }

  void decode(int start, int stop, float *out) {
    values(start, stop, out);
    float s = d(start) * step(scale(start)), m = f.mins ? dmin(start) * min(start) : 0;
    for (int j = start; j < stop; j++) out[j] = s * out[j] - m;
  }
};

int nearest(const Format &f, float x) {
  if (f.codes != 16 || f.values[1] - f.values[0] == 1) {  // evenly spaced
    float code = std::nearbyint(x - f.values[0]);
    return (int)std::min(std::max(code, 0.0f), f.codes - 1.0f);
  }
  int code = 0;
  for (int k = 1; k < f.codes; k++) code += x > (f.values[k - 1] + f.values[k]) / 2;
  return code;
}

// The best code, and pattern of signs, of a group, and its cost s^2 g'Dg - 2 s g'b.
struct Found {
  float cost = kHuge;
  int code = 0, pattern = 0;
};

// A pattern and its opposite have the same form.
int table_row(int pattern, int patterns) {
  if (patterns == 1) return 0;
  return pattern < patterns ? pattern : 2 * patterns - 1 - pattern;
}

// The least cost so far in each lane, and its code.
struct Least {
  Lanes cost = kHuge - Lanes{};
  Places code = {};

  void take(Lanes other, Places place) {
    auto less = other < cost;
    cost = less ? other : cost;
    code = less ? place : code;
  }
  Found found(Places pattern) const {
    Found best;
    for (int l = 0; l < kLanes; l++)
      if (cost[l] < best.cost) best = {cost[l], code[l], pattern[l]};
    return best;
  }
};

Places first_places(int first) {
  Places place;
  for (int l = 0; l < kLanes; l++) place[l] = first + l;
  return place;
}

// The best code in [first, last) with one pattern of signs; `table` has the form of every code.
template <int V>
Found best_code(const Format &f, const float *table, float s, const float *b, int pattern,
                int first, int last) {
  float factor[V];
  for (int i = 0; i < V; i++) factor[i] = (pattern >> i & 1 ? 2 : -2) * s * b[i];
  Least least;
  Places place = first_places(first);
  for (int k = first; k < last; k += kLanes, place += kLanes) {
    Lanes cost = s * s * *(const Lanes *)(table + k);
    for (int i = 0; i < V; i++) cost += factor[i] * *(const Lanes *)(f.grid + (size_t)i * f.codes + k);
    least.take(cost, place);
  }
  return least.found(pattern - Places{});
}

// Search all codes with the natural signs, those of t, and with every single flip; where only even
// or only odd patterns are allowed (parity 0 or 1; -1: both), the natural ones if they are allowed,
// and else the single flips.
template <int V>
Found search(const Format &f, const float *tables, int patterns, float s, const float *b,
             const float *t, int parity) {
  int natural = 0;
  for (int i = 0; i < V; i++) natural |= (t[i] * s < 0) << i;
  bool odd = __builtin_parity(natural);
  bool keep = parity < 0 || odd == parity;
  bool flip = parity < 0 ? patterns > 1 : odd != parity;  // a diagonal form needs no other signs
  auto table = [&](int pattern) {
    return tables + (size_t)table_row(pattern, patterns) * f.codes;
  };
  if (!flip) return best_code<V>(f, table(natural), s, b, natural, 0, f.codes);
  const float *forms[V + 1], s2 = s * s;
  Lanes factor[V];
  for (int i = 0; i < V; i++) {
    factor[i] = (natural >> i & 1 ? 2 : -2) * s * b[i] - Lanes{};
    forms[i] = table(natural ^ 1 << i);
  }
  forms[V] = table(natural);
  Least least[V + 1];
  Places place = first_places(0);
  for (int k = 0; k < f.codes; k += kLanes, place += kLanes) {
    Lanes g[V], linear;
    for (int i = 0; i < V; i++) g[i] = *(const Lanes *)(f.grid + (size_t)i * f.codes + k) * factor[i];
    linear = g[0];
    for (int i = 1; i < V; i++) linear += g[i];
    for (int i = 0; i < V; i++)
      least[i].take(s2 * *(const Lanes *)(forms[i] + k) + (linear - 2 * g[i]), place);
    if (keep) least[V].take(s2 * *(const Lanes *)(forms[V] + k) + linear, place);
  }
  Places pattern = natural - Places{};
  for (int i = 0; i < V; i++) {
    auto less = least[i].cost < least[V].cost;
    pattern = less ? (natural ^ 1 << i) - Places{} : pattern;
    least[V].take(least[i].cost, least[i].code);
  }
  return least[V].found(pattern);
}

// Values chosen for a sub-block, and how the cost would change with its scale and min; `square` is
// the curvature in its scale.
struct Choice {
  uint16_t codes[kPanel];
  uint8_t signs[kPanel];
  float q[kPanel];
  float cost = 0, to_scale = 0, to_min = 0, square = 0;
};

// Error feedback: the state is a row's targets, its weights plus what earlier errors carry on. With
// H = R R' and R upper triangular, e H e' is the sum of (t - q) D (t - q)' over groups, where D is
// the diagonal block of R R' and `form` carries e to later targets.
struct Feedback {
  static constexpr bool backwards = false;
  const float *weights;

  template <int V>
  float target(const float *state, int j, const float *D, float *b, float *t) const {
    for (int i = 0; i < V; i++) t[i] = state[j + i];
    for (int i = 0; i < V; i++) b[i] = dot(D + i * V, t, V);
    return dot(t, b, V);
  }
  float moved(int j, float q) const { return weights[j] - q; }
};

// Coordinate descent: the state is g = e H. Changing q by x changes e H e' by x H x' - 2 x g'.
struct Descent {
  static constexpr bool backwards = true;
  const float *before;  // the row's q

  template <int V>
  float target(const float *state, int j, const float *D, float *b, float *t) const {
    const float *q = before + j, *g = state + j;
    float cost = 0;
    for (int i = 0; i < V; i++) {
      float product = dot(D + i * V, q, V);
      b[i] = product + g[i];
      t[i] = q[i] + g[i] / D[i * V + i];
      cost += q[i] * (b[i] + g[i]);
    }
    return cost;
  }
  float moved(int j, float q) const { return before[j] - q; }
};

// Carry the errors (or changes) of the groups in [from, to) on to the state in [lo, hi).
template <int V, class Mode>
void carry(const Mode &mode, const Panel &p, float *state, int from, int to, const float *q, int lo,
           int hi) {
  for (int j = from; j < to; j++) {
    float moved = mode.moved(j, q[j]);
    int first = Mode::backwards ? lo : std::max(lo, (j / V + 1) * V);
    if (moved == 0 || first >= hi) continue;
    if (p.form) add(state + first, moved, p.form + (size_t)j * p.width + first, hi - first);
    else if (Mode::backwards) state[j] += moved * p.diagonal[(size_t)j * V + j % V];
  }
}

// Choose the group at column j.
template <int V, class Mode>
void choose(const Mode &mode, Row &row, const float *state, int j, float s, float m, int parity,
            Choice &out) {
  const Format &f = row.f;
  const float *D = row.panel.diagonal + (size_t)j * V;
  float b[V], t[V], *q = out.q + j;
  out.cost += mode.template target<V>(state, j, D, b, t);
  if constexpr (V == 1) {
    out.codes[j] = nearest(f, s != 0 ? (t[0] + m) / s : 0.0f);
    q[0] = s * f.values[out.codes[j]] - m;
  } else {
    const int patterns = row.panel.patterns;
    const float *tables = row.panel.tables + (size_t)(j / V) * patterns * f.codes;
    Found found;
    if (f.signs) {
      found = search<V>(f, tables, patterns, s, b, t, parity);
    } else {
      int half = f.codes / 2, first = f.shared_half ? *row.codes(j) / half * half : 0;
      int last = f.shared_half ? first + half : f.codes;
      found = best_code<V>(f, tables, s, b, 0, first, last);
    }
    out.codes[j] = found.code, out.signs[j] = found.pattern;
    for (int i = 0; i < V; i++) {
      float v = s * f.values[found.code * V + i];
      q[i] = found.pattern >> i & 1 ? -v : v;
    }
  }
  for (int i = 0; i < V; i++) {
    float product = dot(D + i * V, q, V), slope = b[i] - product;
    out.cost += q[i] * (product - 2 * b[i]);
    out.to_scale += (q[i] + m) * slope;
    out.to_min -= slope;
    out.square += (q[i] + m) * product;
  }
}

// Choose the groups of a sub-block one after another, each knowing the errors of those before it.
template <int V, class Mode>
void choose_all(const Mode &mode, Row &row, float *state, int start, int stop, float s, float m,
                Choice &out) {
  out.cost = out.to_scale = out.to_min = out.square = 0;
  if (V == 4 && row.f.signs == 2) {  // two groups of four share a parity
    for (int j = start; j < stop; j += 8) {
      float after[kPanel];
      std::memcpy(after + start, state + start, (stop - start) * 4);
      Choice other = out;
      for (int k = j; k < j + 8; k += 4) {
        choose<V>(mode, row, state, k, s, m, 0, out);
        carry<V>(mode, row.panel, state, k, k + 4, out.q, start, stop);
        choose<V>(mode, row, after, k, s, m, 1, other);
        carry<V>(mode, row.panel, after, k, k + 4, other.q, start, stop);
      }
      if (other.cost < out.cost) {
        out = other;
        std::memcpy(state + start, after + start, (stop - start) * 4);
      }
    }
    return;
  }
  for (int j = start; j < stop; j += V) {
    choose<V>(mode, row, state, j, s, m, row.f.signs == 2 ? 0 : -1, out);
    carry<V>(mode, row.panel, state, j, j + V, out.q, start, stop);
  }
}

// Choose scale, min and codes of the sub-block [start, stop) of a row: those at present, or their
// neighbours on the side where the cost falls. `state` is not changed.
template <int V, class Mode>
bool choose_block(const Mode &mode, Row &row, const float *state, int start, int stop,
                  Choice &best) {
  const Format &f = row.f;
  const float d = row.d(start), dmin = f.mins ? row.dmin(start) : 0;
  const int level = row.scale(start), min = f.mins ? row.min(start) : 0;
  float scratch[kPanel];
  int scale_move = 0, min_move = 0, chosen = 0;
  Choice tried;
  for (int k = 0; k < (f.mins > 1 ? 4 : 2); k++) {
    int l = level + (k & 1) * scale_move, n = min + (k >> 1) * min_move;
    if (l < 0 || l >= f.levels || (f.mins > 1 && (n < 0 || n >= f.mins))) continue;
    if (k && l == level && n == min) continue;
    Choice &now = k ? tried : best;
    std::memcpy(scratch + start, state + start, (stop - start) * 4);
    choose_all<V>(mode, row, scratch, start, stop, d * row.step(l), dmin * n, now);
    if (!k) {
      float wished = now.to_scale * row.step(level), step = now.square * f.step1;
      if (f.mins <= 1 && std::fabs(wished) < kLeastStep * std::fabs(step)) break;
      scale_move = (now.to_scale > 0) == (row.step(l) > 0) ? 1 : -1;
      min_move = (now.to_min > 0) == (dmin > 0) ? 1 : -1;
    } else if (tried.cost < best.cost) {
      best = tried, chosen = k;
    }
  }
  if (Mode::backwards && !(best.cost < 0)) return false;  // nothing is better
  if (chosen & 1) row.scale(start) = level + scale_move;
  if (chosen >> 1) row.min(start) = min + min_move;
  uint16_t *code = row.codes(start);
  for (int j = start; j < stop; j += V) *code++ = best.codes[j];
  if (f.signs) {
    uint8_t *signs = row.signs(start);
    for (int j = start; j < stop; j += 8)
      *signs++ = V == 8 ? best.signs[j] : best.signs[j] | best.signs[j + 4] << 4;
  }
  return true;
}

// The best change of d (or dmin) of the block [start, stop), with all codes as they are; `g` is e H,
// and what the change adds to it is added to `change`.
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

// Scales to try for a sub-block: its largest weight becomes the largest value, times 0.8 to 1.3.
constexpr int kTries = 12;

template <int V>
void scales_to_try(const Format &f, const float *x, int n, float *tries) {
  float largest = 0, value = f.values[0];
  for (int j = 0; j < n; j++)
    if (std::fabs(x[j]) > std::fabs(largest)) largest = x[j];
  for (int k = 0; k < f.codes * V; k++)
    if (std::fabs(f.values[k]) > std::fabs(value)) value = f.values[k];
  if (f.signs) largest = std::fabs(largest);
  for (int k = 0; k < kTries; k++) tries[k] = largest / (value * (0.8f + 0.5f / kTries * k));
}

// Add the least costs of a group, s^2 q'Dq - 2 s q'Dx, to those of all scales. D is diagonal, so
// that only these two products depend on the code, and signs follow those of x.
template <int V>
void add_costs(const Format &f, const float *D, const float *table, const float *x,
               const float *tries, float *costs) {
  if constexpr (V == 1) {
    for (int t = 0; t < kTries; t++) {
      float q = tries[t] != 0 ? tries[t] * f.values[nearest(f, *x / tries[t])] : 0;
      costs[t] += D[0] * q * (q - 2 * *x);
    }
  } else {
    Lanes least[kTries];
    float weighed[V];
    for (int i = 0; i < V; i++) weighed[i] = 2 * D[i * V + i] * std::fabs(x[i]);
    for (auto &lanes : least) lanes = kHuge - Lanes{};
    for (int k = 0; k < f.codes; k += kLanes) {
      Lanes linear = {}, square = *(const Lanes *)(table + k);
      for (int i = 0; i < V; i++)
        linear += weighed[i] * *(const Lanes *)(f.grid + (size_t)i * f.codes + k);
      for (int t = 0; t < kTries; t++) {
        Lanes cost = tries[t] * (tries[t] * square - linear);
        least[t] = cost < least[t] ? cost : least[t];
      }
    }
    for (int t = 0; t < kTries; t++) {
      float cost = kHuge;
      for (int l = 0; l < kLanes; l++) cost = std::min(cost, least[t][l]);
      costs[t] += cost;
    }
  }
}

// Store the scales s of a block's sub-blocks as d and levels; `weight` says how much each counts.
void store_scales(Row &row, int start, const float *s, const float *weight, int count) {
  const Format &f = row.f;
  float &d = row.d(start), largest = 0, most = row.step(f.levels - 1);
  if (std::fabs(row.step(0)) > std::fabs(most)) most = row.step(0);
  for (int k = 0; k < count; k++)
    if (std::fabs(s[k]) > std::fabs(largest)) largest = s[k];
  d = to_half(largest / most);
  if (f.levels == 1) return;
  auto level = [&](float unit, float scale) {
    float l = unit != 0 ? std::nearbyint((scale / unit - f.step0) / f.step1) : 0;
    return (int)std::min(std::max(l, 0.0f), f.levels - 1.0f);
  };
  float best = kHuge, chosen = d;
  for (int t = 0; t < kTries; t++) {
    float unit = to_half(d * (0.88f + 0.02f * t)), cost = 0;
    for (int k = 0; k < count; k++) {
      float off = s[k] - unit * row.step(level(unit, s[k]));
      cost += weight[k] * off * off / (s[k] * s[k] + 1e-30f);
    }
    if (cost < best) best = cost, chosen = unit;
  }
  d = chosen;
  for (int k = 0; k < count; k++) row.scale(start + k * f.sub) = level(d, s[k]);
}

template <int V>
void begin_rows(const Format &f, const Rows &rows, const Panel &p) {
  for (int r = 0; r < rows.rows; r++) {
    Row row{f, rows, p, r};
    const float *x = row.weights();
    for (int block = 0; block < p.width; block += f.block) {
      int end = std::min(block + f.block, p.width), count = 0;
      float chosen[kPanel / 8], weight[kPanel / 8];
      for (int start = block; start < end; start += f.sub, count++) {
        int stop = std::min(start + f.sub, end);
        float tries[kTries], costs[kTries] = {0};
        scales_to_try<V>(f, x + start, stop - start, tries);
        weight[count] = 0;
        for (int j = start; j < stop; j += V) {
          const float *D = p.diagonal + (size_t)j * V;
          add_costs<V>(f, D, p.tables + (size_t)(j / V) * p.patterns * f.codes, x + j, tries, costs);
          for (int i = 0; i < V; i++) weight[count] += D[i * V + i] * x[j + i] * x[j + i];
        }
        chosen[count] = tries[std::min_element(costs, costs + kTries) - costs];
      }
      store_scales(row, block, chosen, weight, count);
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
