// Rows of ggml's blocks, taken apart as blocks.py describes, and a panel of their columns.
//
// A panel is up to 256 columns of all rows, beginning at a block. Errors are e = w - q. Column
// numbers count from the panel's start.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int kPanel = 256;  // most columns of a panel
constexpr float kHuge = 3e38f;

extern "C" {

// How a type makes weights: d * (step0 + step1 * scale) * value * sign - dmin * min.
struct Format {
  int32_t block, sub, vector, codes, levels, mins, signs, shared_half;
  float step0, step1;
  const float *values;  // (codes, vector)
  const float *grid;    // the same, (vector, codes)
};

// Whole rows taken apart, with the weights of a panel and their errors, which lie `stride` apart.
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
// the form of every code by pattern of signs. A form without cross terms is null; it does not
// depend on the signs, and has one pattern.
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
  float *errors() { return all.errors + (size_t)row * all.stride; }
  const float *weights() { return all.weights + (size_t)row * all.stride; }

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

}  // namespace
