// What a model's forward is made of, below the ops: products, attention, norms, rotations. The
// files product.cpp, attention.cpp and tokens.cpp are compiled once for each instruction set. All
// of it is row-consistent: what a token gets depends on its own values alone, as each sum has one
// order.
#pragma once

#include "specdiff/params.h"

namespace specdiff::cpu {

constexpr int64_t kPack = 16;    // rows of a weight side by side
constexpr int64_t kPanel = 256;  // most columns of a panel, and its row stride

// Columns of a panel of rows with k columns: a multiple of kPack.
static inline int64_t panel_length(int64_t k) {
  const int64_t panels = k <= kPanel ? 1 : (k + kPanel - 1) / kPanel;
  const int64_t length = (k + panels - 1) / panels;
  return length <= kPack ? kPack : (length + kPack - 1) / kPack * kPack;
}

// Rows of floats, whose columns lie in panels of `length` columns, one panel after another.
struct Rows {
  float* data;
  int64_t row_stride, panel_stride, length;
};

static inline float* at(const Rows& rows, int64_t row, int64_t column) {
  return rows.data + column / rows.length * rows.panel_stride + row * rows.row_stride +
         column % rows.length;
}
static inline Rows plain_rows(float* data, int64_t stride) { return {data, stride, 0, INT64_MAX}; }
static inline Rows in_panels(float* data, int64_t rows, int64_t k) {
  return {data, kPanel, rows * kPanel, panel_length(k)};
}
static inline int64_t panels_size(int64_t rows, int64_t k) {  // floats
  const int64_t length = panel_length(k);
  return (k + length - 1) / length * rows * kPanel;
}

// x [k] -> row `row` of rows.
void lay_out(const float* x, int64_t k, const Rows& rows, int64_t row);

// out [m, n] = x [m, k] weight^T + bias; with a gate, times activation(x gate^T + gate_bias);
// without one, activation of that; then the residual is added.
struct Product {
  Rows x;  // in panels; for one row, however they lie
  int64_t m, k;
  Weight weight, gate;  // of the same form; gate.data null: none
  Activation activation;
  const float* residual;  // [m, n], or null
  int64_t residual_stride;
  Rows out;
};

// How attention is cut into items that threads take. An item is a tile of queries of one row and
// key head; if it is `split`, over one span of positions alone, and items of `merge` follow.
constexpr int64_t kTileRows = 48;   // most queries times heads of a tile
constexpr int64_t kSpan = 256;      // positions whose sums are made apart from others'
constexpr int64_t kMostSize = 256;  // columns of a head
struct AttentionPlan {
  int64_t tiles, spans;
  bool split;
  int64_t items, merges;
  float* partial;         // [batch, kv_heads, tiles, spans, kTileRows, 2 + size] if split
  const int64_t* depths;  // of a tree: [batch, queries], number of ancestors; else null
  const int64_t* paths;   // [batch, queries, queries]: a query's ancestors, itself last
  Rows out;               // a row for each query, heads side by side
};

// All outputs of a product.
void multiply(const Product& product, int threads);

// silu(codes[token] + inner), a row of `to`: what a sequential head's weight is multiplied with.
void sequential_code(const Correction& correction, int64_t token, const float* inner,
                     const Rows& to, int64_t row);

struct Forward {
  // Outputs first <= n < last; first is a multiple of kPack, and so is last, or it is the end.
  void (*multiply)(const Product& product, int64_t first, int64_t last);

  // Items of `AttentionPlan`.
  void (*attend)(const AttentionParams& params, const AttentionPlan& plan, int64_t item);
  void (*merge)(const AttentionParams& params, const AttentionPlan& plan, int64_t item);

  // A token's values x [k] -> out, in row `row`.
  void (*normalise)(const Norm& norm, const float* x, int64_t k, const Rows& out, int64_t row);

  // x [size] -> out [size], both contiguous: the first 2 h columns by cos and sin [2 h], all times
  // the scale.
  void (*rotate)(const float* x, int64_t size, const float* cos, const float* sin, int64_t h,
                 float scale, float* out);
};

// The one for the instruction set in use.
const Forward& forward();

}  // namespace specdiff::cpu
