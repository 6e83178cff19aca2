// The ops. They allocate nothing, write every output, and may be called from any thread.
#pragma once

#include "specdiff/params.h"

namespace specdiff::cpu {

void row_distribution(const RowDistributionParams& params);
void row_divergence(const RowDivergenceParams& params);
void row_divergence_backward(const RowDivergenceBackwardParams& params);
void sample(const SampleParams& params);
void denoise_step(const DenoiseStepParams& params);
void verify(const VerifyParams& params);
void commit(const CommitParams& params);
void skinny_linear(SkinnyLinearParams params);

// See reference/fingerprint.py.
uint64_t fingerprint(const int32_t* weight, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride);

}  // namespace specdiff::cpu
