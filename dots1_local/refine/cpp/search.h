// Find the best code of a group: a scalar, or an entry of a codebook with its signs.

#pragma once

#include "blocks.h"

namespace {

constexpr int kLanes = 16;  // floats that are searched at a time

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Places __attribute__((vector_size(kLanes * 4)));

// Values of the codes from k on in a column of the group.
const Lanes &values(const Format &f, int column, int k) {
  return *(const Lanes *)(f.grid + (size_t)column * f.codes + k);
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
    for (int i = 0; i < V; i++) cost += factor[i] * values(f, i, k);
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
    for (int i = 0; i < V; i++) g[i] = values(f, i, k) * factor[i];
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

}  // namespace
