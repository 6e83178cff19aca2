// The whole boundary between Python and native code: plain structs of pointers and sizes. The
// caller allocates, native code writes; nothing here knows of any framework.
#pragma once

#include "specdiff/accept.h"
#include "specdiff/weights.h"

namespace specdiff {

// Logits [batch, rows, columns], columns contiguous, strides in elements.
struct Logits {
  const void* data;
  int32_t dtype;
  int64_t columns;
  int64_t batch_stride;
  int64_t row_stride;
};

// Per-row sampling parameters; null: off.
struct Parameters {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
};

struct DistributionArrays {
  float* max;
  float* scale;
  int64_t* threshold;
  int64_t* total;
  int32_t* status;
};

SPECDIFF_HD RowDistribution load(const DistributionArrays& distribution, int64_t i) {
  return {distribution.max[i], distribution.scale[i], distribution.threshold[i],
          distribution.total[i], distribution.status[i]};
}

SPECDIFF_HD void store(const RowDistribution& distribution, const DistributionArrays& out,
                       int64_t i) {
  out.max[i] = distribution.max;
  out.scale[i] = distribution.scale;
  out.threshold[i] = distribution.threshold;
  out.total[i] = distribution.total;
  out.status[i] = distribution.status;
}

SPECDIFF_HD bool same_memory(const DistributionArrays& a, const DistributionArrays& b) {
  return a.max == b.max && a.scale == b.scale && a.threshold == b.threshold && a.total == b.total &&
         a.status == b.status;
}

SPECDIFF_HD bool valid(const Parameters& parameters, int64_t i) {
  if (!valid_temperature(parameters.temperature[i])) return false;
  if (parameters.top_k && parameters.top_k[i] < 0) return false;
  if (parameters.top_p && !(parameters.top_p[i] > 0 && parameters.top_p[i] <= 1)) return false;
  return !parameters.min_p || (parameters.min_p[i] >= 0 && parameters.min_p[i] <= 1);
}

// Random words, or null and the seeds and rounds that make them. Coupled draws take seeds and
// absolute positions.
struct Randomness {
  const int64_t* words;
  const int64_t* seed;
  const int64_t* round;
  const int64_t* position;
};

// scratch: int64 [threads, columns] for truncated rows, else null.
struct RowDistributionParams {
  Logits logits;
  int64_t rows;
  Parameters parameters;
  DistributionArrays distribution;
  int64_t* scratch;
  int32_t threads;
};

// Statistics of a row for the backward pass; all NaN: the row has no distribution.
struct RowStatistics {
  double target_max, target_sum;  // the sum of exp((l - max) / temperature)
  double draft_max, draft_sum;
  double drafted;  // sum of p over the drafted tokens
  double excess;   // sum of q where q > p
  double reverse_kl, draft_entropy;
};

struct RowDivergenceParams {
  Logits target, draft;
  int64_t rows;
  const int64_t* draft_ids;  // [draft.columns] or null
  const float* temperature;  // [rows], as all that follows
  float *tv, *kl, *reverse_kl, *target_entropy, *draft_entropy;
  RowStatistics* statistics;
  int32_t threads;
};

struct RowDivergenceBackwardParams {
  Logits target, draft;
  int64_t rows;
  const int64_t* draft_ids;
  const float* temperature;
  const RowStatistics* statistics;
  const float *tv, *kl, *reverse_kl, *draft_entropy;  // gradients of what was put out
  void* out;                                          // [rows, draft.columns] in the draft's dtype
  int32_t threads;
};

struct SampleParams {
  Logits logits;
  int64_t rows;
  DistributionArrays distribution;
  Randomness random;
  const int64_t* slot;
  uint32_t purpose;
  const int64_t* draft_ids;
  int64_t* tokens;
  int32_t threads;
};

enum Rule : int32_t { kTokenRule, kBlockRule, kGreedyRule, kCoupledRule, kLenientRule };
enum Record : int32_t { kOneHot, kFinal, kRunningMax, kEntangled };

// State of the block rule after a prefix of i drafted tokens.
struct Prefix {
  RowDistribution distribution;  // of the target behind it
  double chance;                 // P_i
  int64_t recorded;              // whether token i + 1 is
};

struct VerifyParams {
  Logits target;
  int64_t batch, k;
  const int64_t* tokens;  // [batch, k], as tau and rows
  const int32_t* tau;
  const int64_t* rows;
  Logits draft;  // data null: all positions one-hot
  int64_t draft_rows;
  DistributionArrays draft_distribution;
  const int64_t* draft_ids;  // [draft.columns], increasing, or null
  const int64_t* lengths;    // [batch], or null
  int32_t rule, record, final_step, lenience;
  Parameters parameters;  // [batch]
  const double* amounts;  // [batch] for the lenient rule, else null
  Randomness random;      // words [batch, k + 1], coupled [batch, k + 1, columns]
  int64_t* accepted;
  int64_t* emitted;  // [batch, k + 1]
  int32_t* status;
  double* bias;
  Prefix* prefixes;  // [batch, k + 1] for the block rule, else null
  int64_t* scratch;
  int32_t threads;
};

// A linear layer [n, k] -> y = x weight^T + bias, rows contiguous, stride in elements.
struct Weight {
  const void* data;  // f32 or bf16, [n, k], or packed: [ceil(n / 16), k, 16]
  int32_t dtype, packed;
  int64_t n, stride;  // stride: between rows, unless packed
  const float* bias;  // or null
};

// Of logits for the token before them, see ops/draw_in_order.py.
struct Correction {
  const float* codes;  // [vocabulary, rank], or null: there is none
  int64_t vocabulary, rank;
  const float* inner;     // [batch, positions, rank], or null
  Weight weight;          // [logits.columns, rank]
  const int64_t* anchor;  // [batch], the tokens before the first position
};

// See reference/build_tree.py.
struct BuildTreeParams {
  Logits logits;  // of nodes' children: row b k + depth, with a correction b (n + 1) + node + 1
  int64_t k, n;
  const int64_t* shape;  // [n], or null
  bool replacement;
  const int64_t* lengths;    // [batch], or null
  const int64_t* draft_ids;  // [logits.columns], or null
  Parameters parameters;     // [batch]
  Randomness random;         // words [batch, n]
  int64_t* tokens;           // [batch, n], as parents, rows and chances
  int64_t* parents;
  int64_t* rows;
  double* chances;
  DistributionArrays distribution;
  int64_t batch;
  const float* base;  // [batch k, logits.columns], what is corrected
  Correction correction;
  float* drawn;     // [threads, rank]
  int64_t* memory;  // [threads, build_tree_memory]
  int32_t threads;
};

enum TreeRule : int32_t { kTreeRejection, kTreeWalk, kTreeCoupled, kTreeGreedy };

// See trees.py. Row 0 of the target is the root's, row n + 1 that of node n.
struct VerifyTreeParams {
  Logits target;
  int64_t batch, n;
  const int64_t* tokens;  // [batch, n], as parents and rows
  const int64_t* parents;
  const int64_t* rows;
  Logits draft;  // data null: all nodes are bare guesses
  int64_t draft_rows;
  DistributionArrays draft_distribution;
  const int64_t* draft_ids;  // [draft.columns], increasing, or null
  bool replacement;
  int32_t rule;
  Parameters parameters;  // [batch]
  Randomness random;      // words [batch, n + 1], coupled [batch, n + 1, columns]
  int64_t* accepted;
  int64_t* emitted;  // [batch, n + 1], as path
  int64_t* path;
  int32_t* status;
  int64_t* scratch;  // [threads, 2, target.columns]
  int32_t threads;
};

// A masked position that the step may reveal.
struct Candidate {
  double rank;    // the lowest are revealed first
  int64_t token;  // -1: none
};

struct DenoiseStepParams {
  Logits logits;
  int64_t pool, batch, k;
  const int64_t* tokens;  // [batch, k], as tau, rows and pool_rows
  const int32_t* tau;
  const int64_t* rows;
  DistributionArrays distribution;  // [pool]
  const int64_t* draft_ids;         // [logits.columns] or null
  const int64_t* lengths;           // [batch], or null
  const int64_t* pool_rows;
  int32_t order;
  int64_t lo, hi, count;
  const double* rate;  // [batch]
  int32_t step;
  bool entropies;
  Parameters parameters;  // [batch]
  Randomness random;      // words [batch, k, 2], coupled [batch, k, 1 + columns]
  int64_t* new_tokens;
  int32_t* new_tau;
  int64_t* new_rows;
  DistributionArrays new_distribution;
  double* entropy;        // [batch, k]
  Candidate* candidates;  // [batch, k]
  int64_t* scratch;
  int32_t threads;
};

// Who holds which block of a paged cache; a null table: the cache is dense.
struct Pages {
  int32_t* tables;  // [batch, columns], -1: no block
  int64_t columns;
  int32_t* references;  // [blocks]
  int32_t* free;        // [blocks], the first *count are held by nobody
  int64_t blocks;
  int32_t* count;
  int64_t block_size;
};

// Caches of one geometry, [outer, positions, heads, bytes]; strides in bytes, the last one 1.
struct Caches {
  char* const* data;  // [count]
  int64_t count;
  int64_t outer, positions, heads, bytes;
  int64_t outer_stride, position_stride, head_stride;
};

struct CommitParams {
  const int64_t* lengths;
  const int64_t* emitted;
  int64_t batch, columns;
  const int64_t* stop_tokens;
  int64_t stops;
  const int64_t* limit;
  const bool* finished;
  Pages pages;
  bool release;
  const int64_t* path;  // [batch, columns], or null: nothing moves
  Caches caches[4];     // `geometries` of them; outer is batch, or pages.blocks
  int32_t geometries;
  int64_t* new_lengths;
  int64_t* kept;
  bool* new_finished;
  int64_t* last;
  int32_t threads;
};

// Positions step.lo, ..., hi - 1, one after another; `step` is that of the first.
struct DrawInOrderParams {
  DenoiseStepParams step;
  Correction correction;  // of positions lo to hi - 1
  int64_t hi;
  double* ignored;  // [batch, k], for what later steps say of entropies
  float* drawn;     // in panels: [batch, rank]
};

struct SkinnyLinearParams {
  const float* x;
  int64_t m, k, x_stride;
  Weight weight;
  float* out;      // [m, n]
  float* scratch;  // where x is laid out anew: rows of 256 for each 256 columns
  int32_t threads;
};

enum class NormKind : int32_t { kRms, kLayer };

// x / rms(x), or (x - mean) / deviation, times weight + offset, plus bias.
struct Norm {
  const float* weight;
  const float* bias;  // or null
  float epsilon, offset;
  NormKind kind;
};

enum class Activation : int32_t { kNone, kSilu, kGeluTanh, kGelu, kRelu };

// Keys and values of rows, strides in elements; without tables [rows, heads, positions, size], else
// [blocks, positions in a block, heads, size].
struct KeyValues {
  char* keys;
  char* values;
  int32_t dtype;
  int64_t key_row, key_head, key_position;
  int64_t value_row, value_head, value_position;
  int64_t slots;          // entries that a row can have
  const int32_t* tables;  // [batch, columns], or null
  int64_t columns, block_size, blocks;
};

struct AttentionParams {
  const float* query;  // [batch, queries, heads, size]
  int64_t batch, queries, heads, kv_heads, size;
  int64_t query_row, query_query, query_head;  // strides
  KeyValues cache;
  const int64_t* lengths;  // [batch]
  const int64_t* first;    // [batch], or null
  const int64_t* parents;  // [batch, queries], or null: each query follows the one before
  const int64_t* limits;  // [batch, queries], slots before it are seen; null: up to the query's own
  const float* sinks;     // [heads], or null
  int64_t window;         // 0: none
  float scale, softcap;   // softcap 0: none
  float* out;             // [batch, queries, heads, size]
  int32_t threads;
};

// down(activation(gate(x)) up(x)), without a gate down(activation(up(x))).
struct Mlp {
  Weight gate, up, down;  // gate.data null: none
  Activation activation;
};

// What a decoder layer is, apart from its tokens: a norm, attention, a norm, an MLP, each half
// added to what came in.
struct DecoderLayer {
  int64_t hidden, heads, kv_heads, size, inner;
  Norm attention_norm, mlp_norm;
  Weight qkv[3];  // or all in the first
  Weight output;
  Mlp mlp;
  int64_t window;
  float scale, softcap;
};

// One layer's forward over tokens [batch, queries], in two parts that may be one call.
struct DecoderLayerParams {
  const DecoderLayer* layer;
  bool before, after;  // attention's keys and values are at hand
  const float* x;      // [batch, queries, hidden]
  int64_t batch, queries;
  const float* cos;  // [batch or 1, queries, rotary], or null: no rotary positions
  const float* sin;
  int64_t rotary, rotary_row;  // columns, and the stride between rows of the batch
  float* query;                // [batch, queries, heads, size]
  const int64_t* slots;        // [batch, queries], where their keys and values go
  KeyValues cache;
  const int64_t* lengths;
  const int64_t* first;
  const int64_t* parents;
  const int64_t* limits;
  float* out;  // as x
  int32_t threads;
};

}  // namespace specdiff
