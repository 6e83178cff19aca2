#include "../cpu/ops.h"
#include "../cpu/tile.h"
#include "arguments.h"

namespace py = pybind11;

namespace specdiff {
namespace {

void row_distribution(const Numbers& arguments, Address scratch, int threads) {
  RowDistributionParams p = params<RowDistributionParams>(arguments);
  p.scratch = pointer<int64_t>(scratch);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::row_distribution(p);
}

void row_divergence(const Numbers& arguments, int threads) {
  static_assert(sizeof(RowStatistics) == 8 * sizeof(double), "see RowStatistics in types.py");
  RowDivergenceParams p = params<RowDivergenceParams>(arguments);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::row_divergence(p);
}

void row_divergence_backward(const Numbers& arguments, int threads) {
  RowDivergenceBackwardParams p = params<RowDivergenceBackwardParams>(arguments);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::row_divergence_backward(p);
}

void sample(const Numbers& arguments, int threads) {
  SampleParams p = params<SampleParams>(arguments);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::sample(p);
}

void verify(const Numbers& arguments, Address prefixes, Address scratch, int threads) {
  static_assert(sizeof(Prefix) == 6 * sizeof(int64_t), "see PREFIX_WORDS");
  VerifyParams p = params<VerifyParams>(arguments);
  p.prefixes = pointer<Prefix>(prefixes);
  p.scratch = pointer<int64_t>(scratch);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::verify(p);
}

void denoise_step(const Numbers& arguments, Address candidates, Address scratch, int threads) {
  static_assert(sizeof(Candidate) == 2 * sizeof(int64_t), "see CANDIDATE_WORDS");
  DenoiseStepParams p = params<DenoiseStepParams>(arguments);
  p.candidates = pointer<Candidate>(candidates);
  p.scratch = pointer<int64_t>(scratch);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::denoise_step(p);
}

void commit(const Numbers& arguments, int threads) {
  CommitParams p = params<CommitParams>(arguments);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::commit(p);
}

void skinny_linear(Address x, int64_t m, int64_t k, int64_t x_stride, Address weight, int dtype,
                   bool packed, int64_t n, int64_t weight_stride, Address bias, Address out,
                   Address x_columns, int threads) {
  py::gil_scoped_release release;
  cpu::skinny_linear({pointer<const float>(x), m, k, x_stride, pointer<const void>(weight), dtype,
                      packed, n, weight_stride, pointer<const float>(bias), pointer<float>(out),
                      pointer<float>(x_columns), threads});
}

uint64_t fingerprint(Address weight, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride) {
  return cpu::fingerprint(pointer<const int32_t>(weight), rows, columns, row_stride, column_stride);
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::isa_count(); ++i) {
    if (cpu::isa_supported(i)) names.push_back(cpu::isa_name(i));
  }
  return names;
}

void use_isa(const std::string& name) {
  if (!cpu::use_isa(name.c_str())) {
    throw py::value_error("isa: expected one that supported_isas() lists, got '" + name + "'");
  }
}

}  // namespace
}  // namespace specdiff

PYBIND11_MODULE(_C, m) {
  using namespace specdiff;
  m.doc() = "The CPU kernels. Arguments are checked in Python, not here.";
  m.def("row_distribution", &row_distribution);
  m.def("row_divergence", &row_divergence);
  m.def("row_divergence_backward", &row_divergence_backward);
  m.def("sample", &sample);
  m.def("denoise_step", &denoise_step);
  m.def("verify", &verify);
  m.def("commit", &commit);
  m.def("skinny_linear", &skinny_linear);
  m.def("fingerprint", &fingerprint);
  m.def("isa", [] { return cpu::kernels().isa; }, "Instruction set in use.");
  m.def("supported_isas", &supported_isas, "Instruction sets that this processor has.");
  m.def("use_isa", &use_isa, "Switch to another instruction set, for tests.");
}
