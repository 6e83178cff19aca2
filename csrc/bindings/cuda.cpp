#include "../cuda/ops.h"
#include "arguments.h"

namespace py = pybind11;

namespace specdiff {
namespace {

// device, stream, workspace
using QueueTuple = std::tuple<int, Address, Address>;

// An op of what Python hands over.
template <class Params, auto op>
void call(const Numbers& arguments, const QueueTuple& queue) {
  const auto [device, stream, workspace] = queue;
  const auto p = params<Params>(arguments);
  py::gil_scoped_release release;
  op(p, {device, pointer<void>(stream), pointer<int64_t>(workspace)});
}

}  // namespace
}  // namespace specdiff

PYBIND11_MODULE(_C_cuda, m) {
  using namespace specdiff;
  m.doc() = "The CUDA kernels. Arguments are checked in Python, not here.";
  m.def("row_distribution", &call<RowDistributionParams, cuda::row_distribution>);
  m.def("sample", &call<SampleParams, cuda::sample>);
  m.def("denoise_step", &call<DenoiseStepParams, cuda::denoise_step>);
  m.def("verify", &call<VerifyParams, cuda::verify>);
  m.def("commit", &call<CommitParams, cuda::commit>);
  m.def("fault", &cuda::fault, "Why kernels cannot run on a device, or nothing.");
  m.def("workspace_size", &cuda::workspace_size, "Words of scratch for rows of so many columns.");
}
