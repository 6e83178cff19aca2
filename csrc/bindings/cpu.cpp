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

LawArrays law(const AddressTuple& a) {
  return {pointer<float>(a.at(0)), pointer<float>(a.at(1)), pointer<int64_t>(a.at(2)),
          pointer<int64_t>(a.at(3)), pointer<int32_t>(a.at(4))};
}

Randomness randomness(const AddressTuple& a) {
  return {pointer<const int64_t>(a.at(0)), pointer<const int64_t>(a.at(1)),
          pointer<const int64_t>(a.at(2))};
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

void verify(const LogitsTuple& target, int64_t batch, int64_t k, Address tokens, Address tau,
            Address rows, const LogitsTuple& draft, int64_t draft_rows,
            const AddressTuple& draft_law, Address draft_ids, Address lengths, bool value_dependent,
            const AddressTuple& params, const AddressTuple& random, Address accepted,
            Address emitted, Address status, Address scratch, int threads) {
  py::gil_scoped_release release;
  cpu::verify({logits(target), batch, k, pointer<const int64_t>(tokens),
               pointer<const int32_t>(tau), pointer<const int64_t>(rows), logits(draft), draft_rows,
               law(draft_law), pointer<const int64_t>(draft_ids), pointer<const int64_t>(lengths),
               value_dependent, parameters(params), randomness(random), pointer<int64_t>(accepted),
               pointer<int64_t>(emitted), pointer<int32_t>(status), pointer<int64_t>(scratch),
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
  m.def("verify", &verify);
  m.def("commit", &commit);
  m.def("skinny_linear", &skinny_linear);
  m.def("isa", [] { return cpu::kernels().isa; }, "Instruction set in use.");
  m.def("supported_isas", &supported_isas, "Instruction sets that this processor has.");
  m.def("use_isa", &use_isa, "Switch to another instruction set, for tests.");
}
