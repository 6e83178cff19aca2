// Compiled once for each instruction set, with SPECDIFF_ISA naming it. Whole groups of logits go
// through lanes.h where there is one; the plain loops do the rest, or everything. Both follow the
// distribution bit by bit, because the compiler contracts and reorders nothing.
#include "tile.h"

#include <limits>

#include "lanes.h"
#include "specdiff/accept.h"
#include "specdiff/race.h"
#include "specdiff/reveal.h"

#define SPECDIFF_CONCAT_(a, b) a##b
#define SPECDIFF_CONCAT(a, b) SPECDIFF_CONCAT_(a, b)
#define SPECDIFF_STRING_(a) #a
#define SPECDIFF_STRING(a) SPECDIFF_STRING_(a)

namespace specdiff::cpu {
namespace {

void widen(const uint16_t* x, int dtype, int n, float* out) {
  if (dtype == kBFloat16) {
    for (int i = 0; i < n; ++i) out[i] = widen_bf16(x[i]);
  } else {
    for (int i = 0; i < n; ++i) out[i] = widen_f16(x[i]);
  }
}

float largest(const float* l, int n) {
  float found = -std::numeric_limits<float>::infinity();
  int i = 0;
#ifdef SPECDIFF_LANES
  if (n >= kGroup) found = largest_of_groups(l, n, i);
#endif
  // integers, whose maximum and minimum compilers vectorise
  int32_t high = order_key(found), low = high;
  for (; i < n; ++i) {
    const int32_t key = order_key(l[i]);
    high = key > high ? key : high;
    low = key < low ? key : low;
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const bool nan = high > order_key(kInfinity) || low < order_key(-kInfinity);
  return nan ? std::numeric_limits<float>::quiet_NaN() : from_order_key(high);
}

constexpr int kChunk = 64;

// The weights of n <= kChunk logits. The powers come first, in a loop that compilers vectorise.
void chunk_weights(const float* l, int n, const Weigher& weigher, int64_t* e) {
  float p[kChunk];
  for (int i = 0; i < n; ++i) p[i] = power(cut(l[i], weigher), weigher);
  for (int i = 0; i < n; ++i) {
    const int64_t whole = integer_of(p[i]);
    e[i] = whole < weigher.threshold ? 0 : whole;
  }
}

int least(int a, int b) { return a < b ? a : b; }

int64_t sum(const float* l, int n, Weigher weigher, [[maybe_unused]] bool own) {
  int64_t total = 0, e[kChunk];
  int i = 0;
#ifdef SPECDIFF_LANES
  const Needs needs = needs_of(weigher, own);
  const auto groups = needs == kNothing ? sum_groups<kNothing>
                      : needs == kLimit ? sum_groups<kLimit>
                                        : sum_groups<kAll>;
  total = groups(l, n, weigher, i);
#endif
  for (; i < n; i += kChunk) {
    const int m = least(n - i, kChunk);
    chunk_weights(l + i, m, weigher, e);
    for (int j = 0; j < m; ++j) total += e[j];
  }
  return total;
}

void weights(const float* l, int n, Weigher weigher, int64_t* e) {
  int i = 0;
#ifdef SPECDIFF_LANES
  for (; i + kGroup <= n; i += kGroup) store(group_weights<kAll>(l + i, weigher), e + i);
#endif
  for (; i < n; i += kChunk) chunk_weights(l + i, least(n - i, kChunk), weigher, e + i);
}

int64_t residual(const int64_t* e_p, const int64_t* e_q, int n, Scales by, int64_t* w) {
  int64_t total = 0;
  for (int i = 0; i < n; ++i) {
    w[i] = residual_weight(by.a * probability(e_p[i], by.inverse_p),
                           probability(e_q[i], by.inverse_q));
    total += w[i];
  }
  return total;
}

int64_t excess(const float* l_p, const float* l_q, int n, Weigher p, Weigher q, Scales by) {
  int64_t total = 0;
  int i = 0;
#ifdef SPECDIFF_LANES
  const bool plain = needs_of(p, true) == kNothing && needs_of(q, false) == kLimit;
  const auto groups = plain ? excess_groups<kNothing, kLimit> : excess_groups<kAll, kAll>;
  total = groups(l_p, l_q, n, p, q, by, i);
#endif
  int64_t e_p[kChunk], e_q[kChunk], w[kChunk];
  for (; i < n; i += kChunk) {
    const int m = least(n - i, kChunk);
    chunk_weights(l_p + i, m, p, e_p);
    chunk_weights(l_q + i, m, q, e_q);
    total += residual(e_p, e_q, m, by, w);
  }
  return total;
}

int64_t bias(const float* l_p, const float* l_q, int n, Weigher p, Weigher q, Scales by,
             Raise raise) {
  int64_t total = 0;
  int i = 0;
#ifdef SPECDIFF_LANES
  const bool plain = needs_of(p, true) == kNothing && needs_of(q, false) == kLimit;
  const auto groups = plain ? bias_groups<kNothing, kLimit> : bias_groups<kAll, kAll>;
  total = groups(l_p, l_q, n, p, q, by, raise, i);
#endif
  int64_t e_p[kChunk], e_q[kChunk];
  for (; i < n; i += kChunk) {
    const int m = least(n - i, kChunk);
    chunk_weights(l_p + i, m, p, e_p);
    chunk_weights(l_q + i, m, q, e_q);
    for (int j = 0; j < m; ++j) {
      total +=
          bias_weight(probability(e_p[j], by.inverse_p), probability(e_q[j], by.inverse_q), raise);
    }
  }
  return total;
}

int64_t spreads(const float* l, int n, Weigher weigher) {
  int64_t total = 0;
  for (int i = 0; i < n; ++i) total += spread(l[i], weigher);
  return total;
}

void noise(uint64_t seed, int64_t position, int64_t pair, int pairs, uint64_t* words) {
  int i = 0;
#ifdef SPECDIFF_LANES
  for (; i + kNoise <= pairs; i += kNoise) {
    noise_group(seed, uint32_t(position), uint32_t(pair + i), words + 2 * i);
  }
#endif
  for (; i < pairs; ++i) {
    words[2 * i] = race_word(seed, position, 2 * (pair + i));
    words[2 * i + 1] = race_word(seed, position, 2 * (pair + i) + 1);
  }
}

// A group at a time is asked whether any of it may win, which hardly ever is so.
int race(const int64_t* e, const int64_t* words, int n, double* best) {
  constexpr int kAsked = 16;
  int winner = -1;
  for (int first = 0; first < n; first += kAsked) {
    const int end = first + kAsked < n ? first + kAsked : n;
    int64_t any = end - first < kAsked;
    if (!any) {
      for (int i = 0; i < kAsked; ++i) {
        any |= may_win(uint64_t(words[first + i]), exact_double(e[first + i]), *best) ? 1 : 0;
      }
    }
    for (int i = first; any && i < end; ++i) {
      const double weight = exact_double(e[i]);
      if (!may_win(uint64_t(words[i]), weight, *best)) continue;
      const double time = exponential(uint64_t(words[i])) / weight;
      if (time < *best) {
        *best = time;
        winner = i;
      }
    }
  }
  return winner;
}

}  // namespace

extern const TileKernels SPECDIFF_CONCAT(kernels_, SPECDIFF_ISA);
const TileKernels SPECDIFF_CONCAT(kernels_, SPECDIFF_ISA) = {SPECDIFF_STRING(SPECDIFF_ISA),
                                                             widen,
                                                             largest,
                                                             sum,
                                                             weights,
                                                             residual,
                                                             excess,
                                                             bias,
                                                             spreads,
                                                             noise,
                                                             race};

}  // namespace specdiff::cpu
