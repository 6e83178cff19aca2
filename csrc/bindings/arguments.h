// What Python hands over: addresses and numbers, one after another, as `pack` of
// python/specdiff_kernels/arguments.py lists the fields of an op's records. Tensors stay there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <type_traits>

#include "specdiff/params.h"

namespace specdiff {

using Address = uintptr_t;  // of a tensor's first element, 0 for none
using Numbers = std::vector<int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Reads numbers into the fields it is called with, in that order.
class Arguments {
 public:
  explicit Arguments(const Numbers& numbers)
      : next_(numbers.data()), end_(numbers.data() + numbers.size()) {}

  template <class... T>
  void operator()(T&... fields) {
    (read(fields), ...);
  }

  void expect_end() const {
    if (next_ != end_) throw std::length_error("more arguments than fields");
  }

 private:
  const int64_t* take(int64_t count = 1) {
    if (end_ - next_ < count) throw std::length_error("more fields than arguments");
    return (next_ += count) - count;
  }

  template <class T>
  void read(T*& field) {
    field = pointer<T>(static_cast<Address>(*take()));
  }

  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  void read(T& field) {
    field = static_cast<T>(*take());
  }

  void read(Logits& x) { (*this)(x.data, x.dtype, x.columns, x.batch_stride, x.row_stride); }

  void read(Parameters& p) { (*this)(p.temperature, p.top_k, p.top_p, p.min_p); }

  void read(DistributionArrays& d) { (*this)(d.max, d.scale, d.threshold, d.total, d.status); }

  void read(Randomness& r) { (*this)(r.words, r.seed, r.round, r.position); }

  // Points into the numbers, which have to outlive it.
  void read(Caches& c) {
    static_assert(sizeof(int64_t) == sizeof(char*));
    read(c.count);
    c.data = reinterpret_cast<char* const*>(take(c.count));
    (*this)(c.outer, c.positions, c.heads, c.bytes, c.outer_stride, c.position_stride,
            c.head_stride);
  }

  const int64_t *next_, *end_;
};

inline void read(Arguments& in, RowDistributionParams& p) {
  in(p.logits, p.rows, p.parameters, p.distribution);
}

inline void read(Arguments& in, RowDivergenceParams& p) {
  in(p.target, p.rows, p.draft, p.rows, p.draft_ids, p.temperature);
  in(p.tv, p.kl, p.reverse_kl, p.target_entropy, p.draft_entropy, p.statistics);
}

inline void read(Arguments& in, RowDivergenceBackwardParams& p) {
  in(p.target, p.rows, p.draft, p.rows, p.draft_ids, p.temperature, p.statistics);
  in(p.tv, p.kl, p.reverse_kl, p.draft_entropy, p.out);
}

inline void read(Arguments& in, SampleParams& p) {
  in(p.logits, p.rows, p.distribution, p.random, p.slot, p.purpose, p.draft_ids, p.tokens);
}

inline void read(Arguments& in, VerifyParams& p) {
  int64_t positions;
  in(p.target, positions, p.tokens, p.batch, p.k, p.tau, p.rows, p.draft, p.draft_rows);
  in(p.draft_distribution, p.draft_ids, p.lengths, p.final_step, p.rule, p.record);
  in(p.lenience, p.amounts, p.parameters, p.random, p.accepted, p.emitted, p.status, p.bias);
}

inline void read(Arguments& in, BuildTreeParams& p) {
  int64_t rows;
  in(p.logits, rows, p.k, p.n, p.shape, p.replacement, p.lengths, p.draft_ids, p.parameters);
  in(p.random, p.tokens, p.parents, p.rows, p.chances, p.distribution);
}

inline void read(Arguments& in, VerifyTreeParams& p) {
  int64_t rows;
  in(p.target, rows, p.tokens, p.batch, p.n, p.parents, p.rows, p.draft, p.draft_rows);
  in(p.draft_distribution, p.draft_ids, p.replacement, p.rule, p.parameters, p.random);
  in(p.accepted, p.emitted, p.path, p.status);
}

inline void read(Arguments& in, DenoiseStepParams& p) {
  int64_t final_step;
  in(p.tokens, p.batch, p.k, p.tau, p.rows, p.logits, p.pool, p.distribution, p.draft_ids);
  in(p.lengths, final_step, p.pool_rows, p.order, p.lo, p.hi, p.count, p.rate, p.step);
  in(p.entropies, p.parameters, p.random);
  in(p.new_tokens, p.new_tau, p.new_rows, p.new_distribution, p.entropy);
}

inline void read(Arguments& in, CommitParams& p) {
  int64_t rows;
  in(p.emitted, p.batch, p.columns, p.lengths, p.stop_tokens, p.stops, p.limit, p.finished);
  in(p.pages.tables, rows, p.pages.columns, p.pages.references, p.pages.blocks, p.pages.free);
  in(p.pages.count, p.pages.block_size, p.release, p.path, p.geometries);
  for (int i = 0; i < p.geometries; ++i) in(p.caches[i]);
  in(p.new_lengths, p.kept, p.new_finished, p.last);
}

inline void read(Arguments& in, KeyValues& c) {
  in(c.keys, c.values, c.dtype, c.key_row, c.key_head, c.key_position);
  in(c.value_row, c.value_head, c.value_position, c.slots, c.tables, c.columns, c.block_size,
     c.blocks);
}

inline void read(Arguments& in, AttentionParams& p) {
  in(p.query, p.batch, p.queries, p.heads, p.kv_heads, p.size);
  in(p.query_row, p.query_query, p.query_head);
  read(in, p.cache);
  in(p.lengths, p.first, p.parents, p.sinks, p.window, p.out);
}

inline void read(Arguments& in, Norm& norm) {
  int kind;
  in(norm.weight, norm.bias, kind);
  norm.kind = static_cast<NormKind>(kind);
}

inline void read(Arguments& in, Weight& weight) {
  in(weight.data, weight.dtype, weight.packed, weight.n, weight.stride, weight.bias);
}

inline void read(Arguments& in, Correction& c) {
  in(c.codes, c.vocabulary, c.rank, c.inner);
  read(in, c.weight);
  in(c.anchor);
}

inline void read(Arguments& in, DrawInOrderParams& p) {
  read(in, p.correction);
  in(p.hi, p.ignored, p.drawn);
}

inline void read(Arguments& in, Mlp& mlp) {
  int activation;
  for (Weight* weight : {&mlp.gate, &mlp.up, &mlp.down}) read(in, *weight);
  in(activation);
  mlp.activation = static_cast<Activation>(activation);
}

inline void read(Arguments& in, DecoderLayer& layer) {
  in(layer.hidden, layer.heads, layer.kv_heads, layer.size, layer.inner);
  read(in, layer.attention_norm);
  read(in, layer.mlp_norm);
  for (Weight& weight : layer.qkv) read(in, weight);
  read(in, layer.output);
  read(in, layer.mlp);
  in(layer.window);
}

inline void read(Arguments& in, DecoderLayerParams& p) {
  in(p.before, p.after, p.x, p.batch, p.queries, p.cos, p.sin, p.rotary, p.rotary_row, p.query);
  in(p.slots);
  read(in, p.cache);
  in(p.lengths, p.first, p.parents, p.limits, p.out);
}

template <class Params>
Params params(const Numbers& numbers) {
  Arguments in(numbers);
  Params p = {};
  read(in, p);
  in.expect_end();
  return p;
}

}  // namespace specdiff
