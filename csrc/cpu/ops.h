// The ops. They write every output, and may be called from any thread. They allocate nothing, but
// for attention, decoder layers and MLPs, which keep memory for each thread that calls them.
#pragma once

#include "specdiff/params.h"

namespace specdiff::cpu {

void row_distribution(const RowDistributionParams& params);
void row_divergence(const RowDivergenceParams& params);
void row_divergence_backward(const RowDivergenceBackwardParams& params);
void sample(const SampleParams& params);
void denoise_step(const DenoiseStepParams& params);
void draw_in_order(const DrawInOrderParams& params);
void verify(const VerifyParams& params);
void build_tree(const BuildTreeParams& params);
int64_t build_tree_memory(int64_t n, int64_t columns);  // int64s of each thread
void verify_tree(const VerifyTreeParams& params);
void commit(const CommitParams& params);
void skinny_linear(const SkinnyLinearParams& params);
void cached_attention(const AttentionParams& params);
void decoder_layer(const DecoderLayerParams& params);

// Rows x [m, k] -> out [m, k].
void normalise(const Norm& norm, const float* x, int64_t m, int64_t k, float* out, int threads);

// Rows x [m, k] -> out [m, n].
void gated_mlp(const Mlp& mlp, const float* x, int64_t m, int64_t k, float* out, int threads);

// See reference/fingerprint.py.
uint64_t fingerprint(const int32_t* weight, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride);

}  // namespace specdiff::cpu
