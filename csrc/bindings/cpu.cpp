// Python sees functions of addresses and sizes; tensors stay on the Python side.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/ops.h"
#include "../cpu/tile.h"

namespace py = pybind11;

namespace specdiff {
namespace {

using Address = uintptr_t;  // of a tensor's first element, 0 for none

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, columns, batch stride, row stride)
using LogitsTuple = std::tuple<Address, int, int64_t, int64_t, int64_t>;
using AddressTuple = std::vector<Address>;

Logits logits(const LogitsTuple& t) {
  const auto [address, dtype, columns, batch_stride, row_stride] = t;
  return {pointer<const void>(address), dtype, columns, batch_stride, row_stride};
}

Parameters parameters(const AddressTuple& a) {
  return {pointer<const float>(a.at(0)), pointer<const int64_t>(a.at(1)),
          pointer<const float>(a.at(2)), pointer<const float>(a.at(3))};
}

LawArrays law(const AddressTuple& a, int first = 0) {
  return {pointer<float>(a.at(first)), pointer<float>(a.at(first + 1)),
          pointer<int64_t>(a.at(first + 2)), pointer<int64_t>(a.at(first + 3)),
          pointer<int32_t>(a.at(first + 4))};
}

Randomness randomness(const AddressTuple& a) {
  return {pointer<const int64_t>(a.at(0)), pointer<const int64_t>(a.at(1)),
          pointer<const int64_t>(a.at(2)), pointer<const int64_t>(a.at(3))};
}

void row_law(const LogitsTuple& x, int64_t rows, const AddressTuple& params,
             const AddressTuple& out, Address scratch, int threads) {
  py::gil_scoped_release release;
  cpu::row_law({logits(x), rows, parameters(params), law(out), pointer<int64_t>(scratch), threads});
}

void sample(const LogitsTuple& x, int64_t rows, const AddressTuple& laws,
            const AddressTuple& random, Address slot, uint32_t purpose, Address draft_ids,
            Address tokens, int threads) {
  py::gil_scoped_release release;
  cpu::sample({logits(x), rows, law(laws), randomness(random), pointer<const int64_t>(slot),
               purpose, pointer<const int64_t>(draft_ids), pointer<int64_t>(tokens), threads});
}

// drafted: tokens, tau, rows; columns: draft_ids, lengths; how: rule, record, final step
void verify(const LogitsTuple& target, int64_t batch, int64_t k, const AddressTuple& drafted,
            const LogitsTuple& draft, int64_t draft_rows, const AddressTuple& draft_law,
            const AddressTuple& columns, const std::tuple<int, int, int>& how,
            const AddressTuple& params, const AddressTuple& random, const AddressTuple& out,
            Address prefixes, Address scratch, int threads) {
  static_assert(sizeof(Prefix) == 6 * sizeof(int64_t), "see PREFIX_WORDS");
  const auto [rule, record, final_step] = how;
  py::gil_scoped_release release;
  cpu::verify({logits(target),
               batch,
               k,
               pointer<const int64_t>(drafted.at(0)),
               pointer<const int32_t>(drafted.at(1)),
               pointer<const int64_t>(drafted.at(2)),
               logits(draft),
               draft_rows,
               law(draft_law),
               pointer<const int64_t>(columns.at(0)),
               pointer<const int64_t>(columns.at(1)),
               rule,
               record,
               final_step,
               parameters(params),
               randomness(random),
               pointer<int64_t>(out.at(0)),
               pointer<int64_t>(out.at(1)),
               pointer<int32_t>(out.at(2)),
               pointer<Prefix>(prefixes),
               pointer<int64_t>(scratch),
               threads});
}

// state: tokens, tau, rows, law; columns: draft_ids, lengths, pool_rows; how: order, lo, hi, count,
// rate; out: tokens, tau, rows, law, entropy
void denoise_step(const LogitsTuple& pool, int64_t rows, int64_t batch, int64_t k,
                  const AddressTuple& state, const AddressTuple& columns,
                  const std::tuple<int, int64_t, int64_t, int64_t, Address>& how, int step,
                  bool entropies, const AddressTuple& params, const AddressTuple& random,
                  const AddressTuple& out, Address candidates, Address scratch, int threads) {
  static_assert(sizeof(Candidate) == 2 * sizeof(int64_t), "see CANDIDATE_WORDS");
  const auto [order, lo, hi, count, rate] = how;
  py::gil_scoped_release release;
  cpu::denoise_step({logits(pool),
                     rows,
                     batch,
                     k,
                     pointer<const int64_t>(state.at(0)),
                     pointer<const int32_t>(state.at(1)),
                     pointer<const int64_t>(state.at(2)),
                     law(state, 3),
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
                     parameters(params),
                     randomness(random),
                     pointer<int64_t>(out.at(0)),
                     pointer<int32_t>(out.at(1)),
                     pointer<int64_t>(out.at(2)),
                     law(out, 3),
                     pointer<double>(out.at(8)),
                     pointer<Candidate>(candidates),
                     pointer<int64_t>(scratch),
                     threads});
}

void commit(Address lengths, Address emitted, int64_t batch, int64_t columns, Address stop_tokens,
            int64_t stops, Address limit, Address finished, Address new_lengths, Address kept,
            Address new_finished) {
  py::gil_scoped_release release;
  cpu::commit({pointer<const int64_t>(lengths), pointer<const int64_t>(emitted), batch, columns,
               pointer<const int64_t>(stop_tokens), stops, pointer<const int64_t>(limit),
               pointer<const bool>(finished), pointer<int64_t>(new_lengths), pointer<int64_t>(kept),
               pointer<bool>(new_finished)});
}

void skinny_linear(Address x, int64_t m, int64_t k, int64_t x_stride, Address weight, int dtype,
                   int64_t n, int64_t weight_stride, Address bias, Address out, int threads) {
  py::gil_scoped_release release;
  cpu::skinny_linear({pointer<const float>(x), m, k, x_stride, pointer<const void>(weight), dtype,
                      n, weight_stride, pointer<const float>(bias), pointer<float>(out), threads});
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
  m.def("row_law", &row_law);
  m.def("sample", &sample);
  m.def("denoise_step", &denoise_step);
  m.def("verify", &verify);
  m.def("commit", &commit);
  m.def("skinny_linear", &skinny_linear);
  m.def("isa", [] { return cpu::kernels().isa; }, "Instruction set in use.");
  m.def("supported_isas", &supported_isas, "Instruction sets that this processor has.");
  m.def("use_isa", &use_isa, "Switch to another instruction set, for tests.");
}
