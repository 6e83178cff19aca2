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

// e(v) in units of 2^16 times -log2 of e(v) / e(m) in units of 2^-10, m the largest logit.
SPECDIFF_HD int64_t spread(float l, const Weigher& by) {
  const float x = l - by.offset;
  const float shifted = x - by.most;
  const float t = at_least(shifted * by.scale, -46.0f);
  return (whole_weight(l, by) >> 16) * int64_t(int32_t(-t * 1024.0f));
}

// Entropy in nats from sum_v spread(v), of the untruncated distribution at temperature 1.
SPECDIFF_HD double entropy(int64_t spread, const RowDistribution& distribution) {
  const double Z = double(distribution.total);
  const double share = Z / double(whole_weight(distribution.max, weigher_of(distribution)));
  const double mean = double(spread) / Z * (64.0 * kLn2);
  return log(share) + mean;
}

}  // namespace specdiff
