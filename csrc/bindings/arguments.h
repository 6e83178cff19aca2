// What Python hands over: addresses and sizes, in one tuple for each op. Tensors stay there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "specdiff/params.h"

namespace specdiff {

using Address = uintptr_t;  // of a tensor's first element, 0 for none
using AddressTuple = std::vector<Address>;
// (address, dtype, columns, batch stride, row stride)
using LogitsTuple = std::tuple<Address, int, int64_t, int64_t, int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Logits logits(const LogitsTuple& t) {
  const auto [address, dtype, columns, batch_stride, row_stride] = t;
  return {pointer<const void>(address), dtype, columns, batch_stride, row_stride};
}

inline Parameters parameters(const AddressTuple& a) {
  return {pointer<const float>(a.at(0)), pointer<const int64_t>(a.at(1)),
          pointer<const float>(a.at(2)), pointer<const float>(a.at(3))};
}

inline DistributionArrays distribution(const AddressTuple& a, int first = 0) {
  return {pointer<float>(a.at(first)), pointer<float>(a.at(first + 1)),
          pointer<int64_t>(a.at(first + 2)), pointer<int64_t>(a.at(first + 3)),
          pointer<int32_t>(a.at(first + 4))};
}

inline Randomness randomness(const AddressTuple& a) {
  return {pointer<const int64_t>(a.at(0)), pointer<const int64_t>(a.at(1)),
          pointer<const int64_t>(a.at(2)), pointer<const int64_t>(a.at(3))};
}

// logits, rows, parameters, distribution
using RowDistributionArguments = std::tuple<LogitsTuple, int64_t, AddressTuple, AddressTuple>;

inline RowDistributionParams params(const RowDistributionArguments& arguments) {
  const auto& [x, rows, parameters_, out] = arguments;
  return {logits(x), rows, parameters(parameters_), distribution(out), nullptr, 1};
}

// target, draft, rows, (draft_ids, temperature),
// (tv, kl, reverse_kl, target_entropy, draft_entropy, statistics)
using RowDivergenceArguments =
    std::tuple<LogitsTuple, LogitsTuple, int64_t, AddressTuple, AddressTuple>;

inline RowDivergenceParams params(const RowDivergenceArguments& arguments) {
  const auto& [target, draft, rows, in, out] = arguments;
  return {logits(target),
          logits(draft),
          rows,
          pointer<const int64_t>(in.at(0)),
          pointer<const float>(in.at(1)),
          pointer<float>(out.at(0)),
          pointer<float>(out.at(1)),
          pointer<float>(out.at(2)),
          pointer<float>(out.at(3)),
          pointer<float>(out.at(4)),
          pointer<RowStatistics>(out.at(5)),
          1};
}

// target, draft, rows, (draft_ids, temperature, statistics),
// gradients of (tv, kl, reverse_kl, draft_entropy), out
using RowDivergenceBackwardArguments =
    std::tuple<LogitsTuple, LogitsTuple, int64_t, AddressTuple, AddressTuple, Address>;

inline RowDivergenceBackwardParams params(const RowDivergenceBackwardArguments& arguments) {
  const auto& [target, draft, rows, in, upstream, out] = arguments;
  return {logits(target),
          logits(draft),
          rows,
          pointer<const int64_t>(in.at(0)),
          pointer<const float>(in.at(1)),
          pointer<const RowStatistics>(in.at(2)),
          pointer<const float>(upstream.at(0)),
          pointer<const float>(upstream.at(1)),
          pointer<const float>(upstream.at(2)),
          pointer<const float>(upstream.at(3)),
          pointer<void>(out),
          1};
}

// logits, rows, distribution, randomness, slot, purpose, draft_ids, tokens
using SampleArguments = std::tuple<LogitsTuple, int64_t, AddressTuple, AddressTuple, Address,
                                   uint32_t, Address, Address>;

inline SampleParams params(const SampleArguments& arguments) {
  const auto& [x, rows, distributions, random, slot, purpose, draft_ids, tokens] = arguments;
  return {logits(x),
          rows,
          distribution(distributions),
          randomness(random),
          pointer<const int64_t>(slot),
          purpose,
          pointer<const int64_t>(draft_ids),
          pointer<int64_t>(tokens),
          1};
}

// target, (batch, k), draft's (tokens, tau, rows), its logits, rows and distribution, (draft_ids,
// lengths), (rule, record, final step, kind of lenience), (parameters, its amounts), randomness,
// (accepted, emitted, status, bias)
using VerifyArguments =
    std::tuple<LogitsTuple, std::tuple<int64_t, int64_t>, AddressTuple, LogitsTuple, int64_t,
               AddressTuple, AddressTuple, std::tuple<int, int, int, int>, AddressTuple,
               AddressTuple, AddressTuple>;

inline VerifyParams params(const VerifyArguments& arguments) {
  const auto& [target, sizes, drafted, draft, draft_rows, draft_distribution, columns, how,
               parameters_, random, out] = arguments;
  const auto [batch, k] = sizes;
  const auto [rule, record, final_step, lenience] = how;
  return {logits(target),
          batch,
          k,
          pointer<const int64_t>(drafted.at(0)),
          pointer<const int32_t>(drafted.at(1)),
          pointer<const int64_t>(drafted.at(2)),
          logits(draft),
          draft_rows,
          distribution(draft_distribution),
          pointer<const int64_t>(columns.at(0)),
          pointer<const int64_t>(columns.at(1)),
          rule,
          record,
          final_step,
          lenience,
          parameters(parameters_),
          pointer<const double>(parameters_.at(4)),
          randomness(random),
          pointer<int64_t>(out.at(0)),
          pointer<int64_t>(out.at(1)),
          pointer<int32_t>(out.at(2)),
          pointer<double>(out.at(3)),
          nullptr,
          nullptr,
          1};
}

// logits, (pool, batch, k), (tokens, tau, rows, distribution), (draft_ids, lengths, pool_rows),
// (order, lo, hi, count, rate), step, entropies, parameters, randomness,
// (tokens, tau, rows, distribution, entropy)
using DenoiseStepArguments =
    std::tuple<LogitsTuple, std::tuple<int64_t, int64_t, int64_t>, AddressTuple, AddressTuple,
               std::tuple<int, int64_t, int64_t, int64_t, Address>, int, bool, AddressTuple,
               AddressTuple, AddressTuple>;

inline DenoiseStepParams params(const DenoiseStepArguments& arguments) {
  const auto& [x, sizes, state, columns, how, step, entropies, parameters_, random, out] =
      arguments;
  const auto [pool, batch, k] = sizes;
  const auto [order, lo, hi, count, rate] = how;
  return {logits(x),
          pool,
          batch,
          k,
          pointer<const int64_t>(state.at(0)),
          pointer<const int32_t>(state.at(1)),
          pointer<const int64_t>(state.at(2)),
          distribution(state, 3),
          pointer<const int64_t>(columns.at(0)),
          pointer<const int64_t>(columns.at(1)),
          pointer<const int64_t>(columns.at(2)),
          order,
          lo,
          hi,
          count,
          pointer<const double>(rate),
          step,
          entropies,
          parameters(parameters_),
          randomness(random),
          pointer<int64_t>(out.at(0)),
          pointer<int32_t>(out.at(1)),
          pointer<int64_t>(out.at(2)),
          distribution(out, 3),
          pointer<double>(out.at(8)),
          nullptr,
          nullptr,
          1};
}

// addresses, (outer, positions, heads, bytes), their strides in bytes but the last
using CachesTuple = std::tuple<AddressTuple, std::tuple<int64_t, int64_t, int64_t, int64_t>,
                               std::tuple<int64_t, int64_t, int64_t>>;

inline Caches caches(const CachesTuple& t) {
  const auto& [data, sizes, strides] = t;
  const auto [outer, positions, heads, bytes] = sizes;
  const auto [outer_stride, position_stride, head_stride] = strides;
  static_assert(sizeof(Address) == sizeof(char*));
  return {reinterpret_cast<char* const*>(data.data()),
          int64_t(data.size()),
          outer,
          positions,
          heads,
          bytes,
          outer_stride,
          position_stride,
          head_stride};
}

// (batch, columns, stops), (lengths, emitted, stop_tokens, limit, finished),
// pages' (tables, references, free, count), (columns, blocks, block size, release), path,
// caches of each geometry, (lengths, kept, finished)
using CommitArguments = std::tuple<std::tuple<int64_t, int64_t, int64_t>, AddressTuple,
                                   AddressTuple, std::tuple<int64_t, int64_t, int64_t, bool>,
                                   Address, std::vector<CachesTuple>, AddressTuple>;

// Points into the arguments, which have to outlive it.
inline CommitParams params(const CommitArguments& arguments) {
  const auto& [sizes, in, paged, page_sizes, path, moved, out] = arguments;
  const auto [batch, columns, stops] = sizes;
  const auto [table_columns, blocks, block_size, release] = page_sizes;
  CommitParams p = {
      pointer<const int64_t>(in.at(0)),
      pointer<const int64_t>(in.at(1)),
      batch,
      columns,
      pointer<const int64_t>(in.at(2)),
      stops,
      pointer<const int64_t>(in.at(3)),
      pointer<const bool>(in.at(4)),
      {pointer<int32_t>(paged.at(0)), table_columns, pointer<int32_t>(paged.at(1)),
       pointer<int32_t>(paged.at(2)), blocks, pointer<int32_t>(paged.at(3)), block_size},
      release,
      pointer<const int64_t>(path),
      {},
      0,
      pointer<int64_t>(out.at(0)),
      pointer<int64_t>(out.at(1)),
      pointer<bool>(out.at(2)),
      1};
  for (const auto& geometry : moved) p.caches[p.geometries++] = caches(geometry);
  return p;
}

}  // namespace specdiff
