#include "../cpu/forward.h"
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

void build_tree(const Numbers& arguments, int64_t batch, Address base, const Numbers& correction,
                Address drawn, Address memory, int threads) {
  BuildTreeParams p = params<BuildTreeParams>(arguments);
  p.batch = batch;
  p.base = pointer<const float>(base);
  if (base) p.correction = params<Correction>(correction);
  p.drawn = pointer<float>(drawn);
  p.memory = pointer<int64_t>(memory);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::build_tree(p);
}

void verify_tree(const Numbers& arguments, Address scratch, int threads) {
  VerifyTreeParams p = params<VerifyTreeParams>(arguments);
  p.scratch = pointer<int64_t>(scratch);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::verify_tree(p);
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

void draw_in_order(const Numbers& step, const Numbers& correction, Address candidates,
                   Address scratch, int threads) {
  DrawInOrderParams p = params<DrawInOrderParams>(correction);
  p.step = params<DenoiseStepParams>(step);
  p.step.candidates = pointer<Candidate>(candidates);
  p.step.scratch = pointer<int64_t>(scratch);
  p.step.threads = threads;
  py::gil_scoped_release release;
  cpu::draw_in_order(p);
}

void commit(const Numbers& arguments, int threads) {
  CommitParams p = params<CommitParams>(arguments);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::commit(p);
}

void skinny_linear(Address x, int64_t m, int64_t k, int64_t x_stride, Address weight, int dtype,
                   bool packed, int64_t n, int64_t weight_stride, Address bias, Address out,
                   Address scratch, int threads) {
  py::gil_scoped_release release;
  cpu::skinny_linear(
      {pointer<const float>(x),
       m,
       k,
       x_stride,
       {pointer<const void>(weight), dtype, packed, n, weight_stride, pointer<const float>(bias)},
       pointer<float>(out),
       pointer<float>(scratch),
       threads});
}

void cached_attention(const Numbers& arguments, float scale, float softcap, int threads) {
  AttentionParams p = params<AttentionParams>(arguments);
  p.scale = scale;
  p.softcap = softcap;
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::cached_attention(p);
}

void row_norm(Address x, int64_t m, int64_t k, const Numbers& norm, float epsilon, float offset,
              Address out, int threads) {
  Norm of = params<Norm>(norm);
  of.epsilon = epsilon;
  of.offset = offset;
  py::gil_scoped_release release;
  cpu::normalise(of, pointer<const float>(x), m, k, pointer<float>(out), threads);
}

void gated_mlp(Address x, int64_t m, int64_t k, const Numbers& mlp, Address out, int threads) {
  const Mlp of = params<Mlp>(mlp);
  py::gil_scoped_release release;
  cpu::gated_mlp(of, pointer<const float>(x), m, k, pointer<float>(out), threads);
}

// A layer's weights and shape by themselves, since they stay while tokens come and go.
DecoderLayer make_layer(const Numbers& arguments, const std::vector<float>& numbers) {
  DecoderLayer layer = params<DecoderLayer>(arguments);
  if (numbers.size() != 6) throw std::length_error("six numbers, see DecoderLayer");
  layer.attention_norm.epsilon = numbers[0];
  layer.attention_norm.offset = numbers[1];
  layer.mlp_norm.epsilon = numbers[2];
  layer.mlp_norm.offset = numbers[3];
  layer.scale = numbers[4];
  layer.softcap = numbers[5];
  return layer;
}

void decoder_layer(const DecoderLayer& layer, const Numbers& arguments, int threads) {
  DecoderLayerParams p = params<DecoderLayerParams>(arguments);
  p.layer = &layer;
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::decoder_layer(p);
}

uint64_t fingerprint(Address weight, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride) {
  return cpu::fingerprint(pointer<const int32_t>(weight), rows, columns, row_stride, column_stride);
}

// One fingerprint of several weights, whose places were handed over before: address, rows, columns
// and the two strides of each.
class Fingerprints {
 public:
  explicit Fingerprints(const std::vector<Numbers>& places) : places_(places) {
    for (const Numbers& place : places) {
      if (place.size() != 5) throw std::length_error("five numbers for each weight");
    }
  }

  uint64_t operator()() const {
    uint64_t total = 0;
    for (const Numbers& p : places_) {
      total = total * 0x9E3779B97F4A7C15 + fingerprint(Address(p[0]), p[1], p[2], p[3], p[4]);
    }
    return total;
  }

 private:
  std::vector<Numbers> places_;
};

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
  m.def("draw_in_order", &draw_in_order);
  m.def("verify", &verify);
  m.def("build_tree", &build_tree);
  m.def("build_tree_memory", &cpu::build_tree_memory);
  m.def("verify_tree", &verify_tree);
  m.def("commit", &commit);
  m.def("skinny_linear", &skinny_linear);
  m.def("panels_size", &cpu::panels_size);
  m.def("cached_attention", &cached_attention);
  m.def("row_norm", &row_norm);
  m.def("gated_mlp", &gated_mlp);
  py::class_<DecoderLayer>(m, "DecoderLayer").def(py::init(&make_layer));
  m.def("decoder_layer", &decoder_layer);
  m.def("fingerprint", &fingerprint);
  py::class_<Fingerprints>(m, "Fingerprints")
      .def(py::init<const std::vector<Numbers>&>())
      .def("__call__", &Fingerprints::operator());
  m.def("isa", [] { return cpu::kernels().isa; }, "Instruction set in use.");
  m.def("supported_isas", &supported_isas, "Instruction sets that this processor has.");
  m.def("use_isa", &use_isa, "Switch to another instruction set, for tests.");
}
