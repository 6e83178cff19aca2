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
    int64_t column = lower_bound(p.draft_ids, p.draft.columns, v);
    for (int j = 0; j < 8; ++j) {
      const bool exists = column < p.draft.columns && p.draft_ids[column] == v + j;
      e[j] = exists ? weight(logits.at(column), column, distribution) : 0;
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
  float l[8];
  target.widen(target.load(v), l);
  draft.weights(v, w);
  for (int j = 0; j < 8; ++j) {
    const double p = probability(weight(l[j], v + j, distribution), inverse_p);
    w[j] = weigh(p, probability(w[j], inverse_q));
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

// int(max(a p - q, 0) 2^60)
struct ResidualWeight {
  double a;
  __device__ int64_t operator()(double p, double q) const { return residual_weight(a * p, q); }
};

struct BiasWeight {
  Raise by;
  __device__ int64_t operator()(double p, double q) const { return bias_weight(p, q, by); }
};

}  // namespace specdiff::cuda
