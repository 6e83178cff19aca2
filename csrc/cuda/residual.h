// The distributions that drafted tokens were drawn from, residuals behind them, and what leniency
// costs.
#pragma once

#include "distribution.h"

namespace specdiff::cuda {

// The first of n increasing ids that is at least v, or n.
__device__ inline int64_t lower_bound(const int64_t* ids, int64_t n, int64_t v) {
  int64_t low = 0;
  while (low < n) {
    const int64_t middle = (low + n) / 2;
    if (ids[middle] < v) {
      low = middle + 1;
    } else {
      n = middle;
    }
  }
  return low;
}

// The distribution that a drafted token x came from: a row of the draft's logits, or all weight on
// x.
struct DraftDistribution {
  const VerifyParams& p;
  int64_t x;
  int64_t row;  // -1: one-hot
  RowDistribution distribution;

  // at: a position in [batch, k], -1 for none
  __device__ DraftDistribution(const VerifyParams& p, int64_t at, bool recorded)
      : p(p), x(at < 0 ? -1 : p.tokens[at]), row(recorded ? p.rows[at] : -1) {
    distribution.total = kOne;
    if (row >= 0 && row < p.draft_rows && p.draft.data)
      distribution = load(p.draft_distribution, row);
  }

  // What makes it no distribution of x, else kOk.
  __device__ int32_t fault() const {
    if (x < 0 || x >= p.target.columns) return kToken;
    if (row < 0) return kOk;
    if (row >= p.draft_rows || !p.draft.data) return kToken;
    return weight_of_token() == 0 ? kDraft : kOk;
  }

  __device__ int64_t weight_of_token() const {
    if (row < 0) return kOne;
    if (distribution.status != kOk) return 0;
    int64_t column = x;
    if (p.draft_ids) {
      column = lower_bound(p.draft_ids, p.draft.columns, x);
      if (column == p.draft.columns || p.draft_ids[column] != x) return 0;
    }
    return weight(Row(p.draft, 0, row).at(column), column, distribution);
  }

  // Weights of the target's ids v to v + 7.
  __device__ void weights(int64_t v, int64_t (&e)[8]) const {
    if (row < 0) {
      for (int j = 0; j < 8; ++j) e[j] = v + j == x ? kOne : 0;
      return;
    }
    const Row logits(p.draft, 0, row);
    if (!p.draft_ids) return row_weights(logits, distribution, v, e);
    const Weigher by = weigher_of(distribution);
    int64_t column = lower_bound(p.draft_ids, p.draft.columns, v);
    for (int j = 0; j < 8; ++j) {
      const bool exists = column < p.draft.columns && p.draft_ids[column] == v + j;
      e[j] = !exists                   ? 0
             : distribution.scale == 0 ? weight(0, column, distribution)
                                       : sampled_weight(logits.at(column), by);
      column += exists;
    }
  }
};

// weigh(p, q) of columns v to v + 7.
template <class Weigh>
__device__ void weigh_both(const Row& target, const RowDistribution& distribution,
                           const DraftDistribution& draft, int64_t v, Weigh weigh,
                           int64_t (&w)[8]) {
  const double inverse_p = inverse(distribution.total),
               inverse_q = inverse(draft.distribution.total);
  int64_t e[8];
  row_weights(target, distribution, v, e);
  draft.weights(v, w);
  for (int j = 0; j < 8; ++j) {
    w[j] = weigh(probability(e[j], inverse_p), probability(w[j], inverse_q));
  }
}

// The sum of weigh(p, q) over a block's part.
template <class Weigh>
__device__ int64_t sum_both(const Row& target, const RowDistribution& distribution,
                            const DraftDistribution& draft, const Split& split, int64_t part,
                            Weigh weigh, Shared& shared) {
  int64_t sum = 0;
#pragma unroll 1
  for (int k = 0; k < split.groups; ++k) {
    int64_t w[8];
    weigh_both(target, distribution, draft, column_of(target, split, part, k), weigh, w);
    for (int j = 0; j < 8; ++j) sum += w[j];
  }
  return block_sum(sum, shared);
}

// A row that is sampled from, with nothing cut off.
struct Plain {
  Weigher by;
  double inverse;  // 2^60 / Z

  explicit __device__ Plain(const RowDistribution& distribution)
      : by(weigher_of(distribution)), inverse(specdiff::inverse(distribution.total) * 0x1p60) {}

  static __device__ bool fits(const RowDistribution& distribution) {
    return distribution.status == kOk && distribution.scale != 0 && distribution.threshold == 0 &&
           weigher_of(distribution).offset == 0;
  }

  // 2^60 times the probability. own: the distribution is of the very row.
  template <bool own>
  __device__ double chance(float l) const {
    const float x = at_least(l, by.least);
    return floor_of(power(own ? x : at_most(x, by.most), by)) * inverse;
  }
};

// The residual weights of eight columns, given both rows' logits. A power of two as a factor
// changes nothing but exponents.
template <Dtype dtype>
__device__ int64_t plain_residual(const Eight& target, const Eight& draft, const Plain& p,
                                  const Plain& q, double a) {
  float l_p[8], l_q[8];
  widen<dtype>(target, l_p);
  widen<dtype>(draft, l_q);
  int64_t sum = 0;
  for (int j = 0; j < 8; ++j) {
    const double excess = a * p.chance<true>(l_p[j]) - q.chance<false>(l_q[j]);
    const int64_t w = int64_t(excess);
    if (w > 0) sum += w;
  }
  return sum;
}

// int(max(a p - q, 0) 2^60)
struct ResidualWeight {
  double a;
  __device__ int64_t operator()(double p, double q) const { return residual_weight(a * p, q); }
};

// The sum of residual weights over a block's part.
template <Dtype dtype>
__device__ int64_t residual_sum(const Row& target, const RowDistribution& distribution,
                                const DraftDistribution& draft, const Split& split, int64_t part,
                                double a, Shared& shared) {
  const bool plain = draft.row >= 0 && !draft.p.draft_ids && draft.p.draft.dtype == dtype &&
                     Plain::fits(distribution) && Plain::fits(draft.distribution);
  if (!plain) {
    return sum_both(target, distribution, draft, split, part, ResidualWeight{a}, shared);
  }
  const Row logits(draft.p.draft, 0, draft.row);
  const Plain p(distribution), q(draft.distribution);
  int64_t sum = 0;
#pragma unroll 1
  for (int k = 0; k < split.groups; ++k) {
    const int64_t v = column_of(target, split, part, k);
    sum += plain_residual<dtype>(target.load(v), logits.load(v), p, q, a);
  }
  return block_sum(sum, shared);
}

struct BiasWeight {
  Raise by;
  __device__ int64_t operator()(double p, double q) const { return bias_weight(p, q, by); }
};

}  // namespace specdiff::cuda
