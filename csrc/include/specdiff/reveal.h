// The decision whether a masked position is revealed.
#pragma once

#include "specdiff/elementary.h"
#include "specdiff/weights.h"

namespace specdiff {

enum Order : int32_t { kAll, kChunk, kMdlm, kSedd, kFirstHitting, kLowestEntropy, kConfidence };

// m = (1/V) sum_v exp(l_v), from the untruncated distribution at temperature 1.
SPECDIFF_HD double mean_exp(const RowDistribution& distribution, int64_t columns) {
  const double share = double(distribution.total) * 0x1p-44 / double(columns);
  const Weigher by = weigher_of(distribution);
  const double highest = double(distribution.max) * 1.4426950408889634;
  const double product = double(by.most) * double(distribution.scale);
  const double above = product - double(by.shift);
  return exp2(highest - above) * share;
}

// e(v) in units of 2^16 times -log2 of e(v) / 2^44 in units of 2^-10.
SPECDIFF_HD int64_t spread(float l, const Weigher& by) {
  const Exponent t = exponent(cut(l, by), by);
  const float sum = t.integer + t.fraction;
  return (whole_weight(l, by) >> 16) * int64_t(int32_t(-sum * 1024.0f));
}

// Entropy in nats from sum_v spread(v).
SPECDIFF_HD double entropy(int64_t spread, int64_t total) {
  const double Z = double(total);
  const double mean = double(spread) / Z * (64.0 * kLn2);
  return log(Z * 0x1p-44) + mean;
}

}  // namespace specdiff
