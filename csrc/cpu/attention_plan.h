// Attention's items and the memory that they share.
#pragma once

#include <algorithm>
#include <vector>

#include "forward.h"

namespace specdiff::cpu {

class AttentionMemory {
 public:
  // A plan that keeps `threads` threads busy. It is valid until the next call.
  AttentionPlan plan(const AttentionParams& p, const Rows& out) {
    AttentionPlan plan = {};
    const int64_t rows = p.queries * (p.heads / p.kv_heads), heads = p.batch * p.kv_heads;
    plan.tiles = std::max<int64_t>(1, (rows + kTileRows - 1) / kTileRows);
    plan.out = out;
    int64_t longest = 0;
    for (int64_t b = 0; b < p.batch; ++b) longest = std::max(longest, p.lengths[b]);
    longest = std::min(longest, p.cache.slots) + p.queries;
    for (int64_t i = 0; p.limits && i < p.batch * p.queries; ++i) {
      longest = std::max(longest, p.limits[i]);
    }
    longest = std::min(longest, p.cache.slots);
    plan.spans = (longest + kSpan - 1) / kSpan;
    plan.items = heads * plan.tiles;
    plan.split = p.threads > 1 && plan.spans > 1 && plan.items < 4 * p.threads;
    if (plan.split) {
      plan.merges = plan.items * kTileRows;
      plan.items *= plan.spans;
      partial_.resize(std::max(partial_.size(), size_t(plan.items * kTileRows * (p.size + 2))));
      plan.partial = partial_.data();
    }
    if (p.parents) {
      follow(p);
      plan.depths = depths_.data();
      plan.paths = paths_.data();
    }
    return plan;
  }

 private:
  // Each query's ancestors. A parent that does not come before its child counts as none.
  void follow(const AttentionParams& p) {
    const int64_t Q = p.queries;
    depths_.resize(p.batch * Q);
    paths_.resize(p.batch * Q * Q);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < Q; ++i) {
        const int64_t parent = p.parents[b * Q + i];
        int64_t depth = 0, *path = paths_.data() + (b * Q + i) * Q;
        if (parent >= 0 && parent < i) {
          depth = depths_[b * Q + parent] + 1;
          std::copy_n(paths_.data() + (b * Q + parent) * Q, depth, path);
        }
        path[depth] = i;
        depths_[b * Q + i] = depth;
      }
    }
  }

  std::vector<float> partial_;
  std::vector<int64_t> depths_, paths_;
};

}  // namespace specdiff::cpu
