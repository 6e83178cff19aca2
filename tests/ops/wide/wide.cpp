// A model's forward on vectors that a processor need not have. Arguments are the numbers that the
// module `_C` takes.
#include "bindings/arguments.h"
#include "cpu/forward.h"
#include "cpu/ops.h"

namespace specdiff::cpu {

extern const decltype(Forward::multiply) multiply_wide;
extern const decltype(Forward::attend) attend_wide;
extern const decltype(Forward::merge) merge_wide;
extern const decltype(Forward::normalise) normalise_wide;
extern const decltype(Forward::rotate) rotate_wide;

const Forward& forward() {
  static const Forward wide = {multiply_wide, attend_wide, merge_wide, normalise_wide, rotate_wide};
  return wide;
}

}  // namespace specdiff::cpu

using namespace specdiff;

namespace {

template <class Params>
Params read(const int64_t* numbers, int64_t count) {
  return params<Params>(Numbers(numbers, numbers + count));
}

}  // namespace

extern "C" {

int64_t panels_size(int64_t m, int64_t k) { return cpu::panels_size(m, k); }

void skinny_linear(const int64_t* n) {
  cpu::skinny_linear({pointer<const float>(n[0]),
                      n[1],
                      n[2],
                      n[3],
                      {pointer<const void>(n[4]), int32_t(n[5]), int32_t(n[6]), n[7], n[8],
                       pointer<const float>(n[9])},
                      pointer<float>(n[10]),
                      pointer<float>(n[11]),
                      int32_t(n[12])});
}

void cached_attention(const int64_t* numbers, int64_t count, float scale, float softcap,
                      int threads) {
  AttentionParams p = read<AttentionParams>(numbers, count);
  p.scale = scale;
  p.softcap = softcap;
  p.threads = threads;
  cpu::cached_attention(p);
}

void row_norm(const float* x, int64_t m, int64_t k, const int64_t* norm, int64_t count,
              float epsilon, float offset, float* out, int threads) {
  Norm of = read<Norm>(norm, count);
  of.epsilon = epsilon;
  of.offset = offset;
  cpu::normalise(of, x, m, k, out, threads);
}

void decoder_layer(const int64_t* of, int64_t of_count, const float* numbers, const int64_t* call,
                   int64_t call_count, int threads) {
  DecoderLayer layer = read<DecoderLayer>(of, of_count);
  layer.attention_norm.epsilon = numbers[0];
  layer.attention_norm.offset = numbers[1];
  layer.mlp_norm.epsilon = numbers[2];
  layer.mlp_norm.offset = numbers[3];
  layer.scale = numbers[4];
  layer.softcap = numbers[5];
  DecoderLayerParams p = read<DecoderLayerParams>(call, call_count);
  p.layer = &layer;
  p.threads = threads;
  cpu::decoder_layer(p);
}

}  // extern "C"
