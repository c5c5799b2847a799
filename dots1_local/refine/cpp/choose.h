// Choose scale, min and codes of a sub-block, with error feedback or by coordinate descent.

#pragma once

#include "search.h"

namespace {

// A neighbouring scale is tried if the best one, with codes as they are, is at least so many steps
// away. Trying all lowers the error by another 1% and takes a third more time.
constexpr float kLeastStep = 0.2f;

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

}  // namespace
