// Choose the scales to begin with, without codes.

#pragma once

#include "search.h"

namespace {

// The value of a code with the largest size.
float largest_value(const Format &f) {
  float value = f.values[0];
  for (int k = 0; k < f.codes * f.vector; k++)
    if (std::fabs(f.values[k]) > std::fabs(value)) value = f.values[k];
  return value;
}

// Scales to try for a sub-block: its largest weight becomes the largest `value`, times 0.8 to 1.3.
constexpr int kTries = 12;

inline void scales_to_try(const Format &f, const float *x, int n, float value, float *tries) {
  float largest = 0;
  for (int j = 0; j < n; j++)
    if (std::fabs(x[j]) > std::fabs(largest)) largest = x[j];
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
        linear += weighed[i] * values(f, i, k);
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
  // A codebook has thousands of values. The 16 of a scalar type are faster to look through again.
  const float value = V == 1 ? 0 : largest_value(f);
  for (int r = 0; r < rows.rows; r++) {
    Row row{f, rows, p, r};
    const float *x = row.weights();
    for (int block = 0; block < p.width; block += f.block) {
      int end = std::min(block + f.block, p.width), count = 0;
      float chosen[kPanel / 8], weight[kPanel / 8];
      for (int start = block; start < end; start += f.sub, count++) {
        int stop = std::min(start + f.sub, end);
        float tries[kTries], costs[kTries] = {0};
        float largest = V == 1 ? largest_value(f) : value;
        scales_to_try(f, x + start, stop - start, largest, tries);
        weight[count] = 0;
        for (int j = start; j < stop; j += V) {
          const float *D = p.diagonal + (size_t)j * V;
          const float *table = p.tables + (size_t)(j / V) * p.patterns * f.codes;
          add_costs<V>(f, D, table, x + j, tries, costs);
          for (int i = 0; i < V; i++) weight[count] += D[i * V + i] * x[j + i] * x[j + i];
        }
        chosen[count] = tries[std::min_element(costs, costs + kTries) - costs];
      }
      store_scales(row, block, chosen, weight, count);
    }
  }
}

}  // namespace
