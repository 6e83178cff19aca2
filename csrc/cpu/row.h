// One row of logits: its distribution, its tile sums, and draws from it.
#pragma once

#include <limits>

#include "specdiff/accept.h"
#include "specdiff/philox.h"
#include "specdiff/scan.h"
#include "tile.h"

namespace specdiff::cpu {

class Row {
 public:
  Row(const Logits& logits, int64_t batch, int64_t row)
      : columns(logits.columns), dtype_(logits.dtype) {
    const int64_t size = dtype_ == kFloat32 ? 4 : 2;
    data_ = static_cast<const char*>(logits.data) +
            size * (batch * logits.batch_stride + row * logits.row_stride);
  }

  float at(int64_t v) const {
    if (dtype_ == kFloat32) return reinterpret_cast<const float*>(data_)[v];
    const uint16_t x = reinterpret_cast<const uint16_t*>(data_)[v];
    return dtype_ == kBFloat16 ? widen_bf16(x) : widen_f16(x);
  }

  // n logits from v on as f32, in place or widened into the buffer
  const float* tile(int64_t v, int n, float* buffer) const {
    if (dtype_ == kFloat32) return reinterpret_cast<const float*>(data_) + v;
    kernels().widen(reinterpret_cast<const uint16_t*>(data_) + v, dtype_, n, buffer);
    return buffer;
  }

  // the logits of n ids
  void gather(const int64_t* ids, int n, float* out) const {
    if (dtype_ != kFloat32) {
      for (int i = 0; i < n; ++i) out[i] = at(ids[i]);
    } else {
      const float* l = reinterpret_cast<const float*>(data_);
      for (int i = 0; i < n; ++i) out[i] = l[ids[i]];
    }
  }

  int64_t tiles() const { return (columns + kTile - 1) / kTile; }
  int tile_size(int64_t tile) const {
    return int(columns - tile * kTile < kTile ? columns - tile * kTile : kTile);
  }

  int64_t columns;

 private:
  const char* data_;
  int32_t dtype_;
};

// The weights of one tile, greedy rows included.
void tile_weights(const Row& row, const RowDistribution& distribution, int64_t tile, int64_t* e);

// The largest logit of a row, never -0, or why the row has no distribution.
Status find_max(const Row& row, float* max);

// The distribution of a row; sums[tile] becomes the sum of a tile's weights. scratch: int64
// [columns], needed when the row is truncated.
RowDistribution make_distribution(const Row& row, const Parameters& parameters, int64_t index,
                                  int64_t* sums, int64_t* scratch);

// The token of mulhi(word, distribution.total), found by the tile sums and one tile's weights.
int64_t draw(const Row& row, const RowDistribution& distribution, const int64_t* sums,
             uint64_t word);

// Where the exponential variates of a coupled draw come from.
struct Noise {
  const int64_t* words;  // of each column, or null
  uint64_t seed;
  int64_t position;
};

// argmin_v E_v / e_v; ids: token ids of the columns, or null.
int64_t race(const Row& row, const RowDistribution& distribution, const int64_t* ids,
             const Noise& noise);

}  // namespace specdiff::cpu
