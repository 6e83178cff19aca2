// The ops on a GPU. They allocate nothing, wait for nothing, and write every output. Scratch and
// threads of the parameters are not used.
#pragma once

#include <string>

#include "specdiff/params.h"

namespace specdiff::cuda {

// Where launches go, and the scratch that they use in turn.
struct Queue {
  int device;
  void* stream;
  int64_t* workspace;  // of workspace_size words, which need not be set
};

int64_t workspace_size(int64_t rows, int64_t columns);

// Why kernels cannot run on a device: its driver is too old, or there is no code for it; "" if they
// can.
std::string fault(int device);

void row_distribution(const RowDistributionParams& params, const Queue& queue);
void sample(const SampleParams& params, const Queue& queue);
void denoise_step(const DenoiseStepParams& params, const Queue& queue);
void verify(const VerifyParams& params, const Queue& queue);
void commit(const CommitParams& params, const Queue& queue);

}  // namespace specdiff::cuda
