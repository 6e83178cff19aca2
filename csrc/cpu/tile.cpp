// Compiled once for each instruction set, with SPECDIFF_ISA naming it. Whole groups of logits go
// through lanes.h where there is one; the plain loops do the rest, or everything. Both follow the
// distribution bit by bit, because the compiler contracts and reorders nothing.
#include "tile.h"

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

void extremes(const float* l, int n, int32_t* low, int32_t* high) {
  int32_t lowest = *low, highest = *high;
  for (int i = 0; i < n; ++i) {
    const int32_t key = order_key(l[i]);
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  *low = lowest;
  *high = highest;
}

int64_t sum(const float* l, int n, RowDistribution distribution) {
  int64_t total = 0;
  int i = 0;
#ifdef SPECDIFF_LANES
  total = plain(distribution) ? sum_groups<true>(l, n, distribution, i)
                              : sum_groups<false>(l, n, distribution, i);
#endif
  for (; i < n; ++i) total += sampled_weight(l[i], distribution);
  return total;
}

void weights(const float* l, int n, RowDistribution distribution, int64_t* e) {
  int i = 0;
#ifdef SPECDIFF_LANES
  for (; i + kGroup <= n; i += kGroup)
    store(distribution_weights<false>(l + i, distribution), e + i);
#endif
  for (; i < n; ++i) e[i] = sampled_weight(l[i], distribution);
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

int64_t excess(const float* l_p, const float* l_q, int n, RowDistribution p, RowDistribution q,
               Scales by) {
  int64_t total = 0;
  int i = 0;
#ifdef SPECDIFF_LANES
  const auto groups = plain(p) && plain(q) ? excess_groups<true> : excess_groups<false>;
  total = groups(l_p, l_q, n, p, q, by, i);
#endif
  for (; i < n; ++i) {
    total += residual_weight(by.a * probability(sampled_weight(l_p[i], p), by.inverse_p),
                             probability(sampled_weight(l_q[i], q), by.inverse_q));
  }
  return total;
}

int64_t bias(const float* l_p, const float* l_q, int n, RowDistribution p, RowDistribution q,
             Scales by, Raise raise) {
  int64_t total = 0;
  int i = 0;
#ifdef SPECDIFF_LANES
  const auto groups = plain(p) && plain(q) ? bias_groups<true> : bias_groups<false>;
  total = groups(l_p, l_q, n, p, q, by, raise, i);
#endif
  for (; i < n; ++i) {
    total += bias_weight(probability(sampled_weight(l_p[i], p), by.inverse_p),
                         probability(sampled_weight(l_q[i], q), by.inverse_q), raise);
  }
  return total;
}

int64_t spreads(const float* l, int n, RowDistribution distribution) {
  int64_t total = 0;
  for (int i = 0; i < n; ++i) total += spread(l[i], distribution);
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
                                                             extremes,
                                                             sum,
                                                             weights,
                                                             residual,
                                                             excess,
                                                             bias,
                                                             spreads,
                                                             noise,
                                                             race};

}  // namespace specdiff::cpu
