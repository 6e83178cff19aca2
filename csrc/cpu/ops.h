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

}  // namespace specdiff::cpu
