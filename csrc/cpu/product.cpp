// Compiled once for each instruction set, with SPECDIFF_ISA naming it.
//
// The weight goes by in packs: 16 of its rows side by side, [k][16], as it was packed before or as
// `pack_columns` turns them. A vector of a pack meets one value of x for each row of x, all sums in
// registers, so that the weight is read from memory once for all of x. An output is a sum over k in
// order, a panel at a time: the same operations whatever else is computed beside it.
#include <cmath>

#include "forward.h"
#include "tile_product.h"

namespace specdiff::cpu {
namespace {

constexpr int kGroup = 36;  // rows of x that a weight is read once for

inline Floats activate(Floats x, Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return x / (exponential(-x) + 1.0f);
    case Activation::kGeluTanh: {  // x (1 + tanh u) / 2 = x / (1 + exp(-2 u))
      const Floats twice = x * x * x * 0.0713548162726f + x * 1.59576912160573f;
      return x / (exponential(-twice) + 1.0f);
    }
    case Activation::kGelu:
      for (int i = 0; i < kLanes; ++i) x[i] *= 0.5f * (1.0f + std::erf(x[i] * 0.70710678f));
      return x;
    case Activation::kRelu:
      return x < 0.0f ? Floats{} : x;
    default:
      return x;
  }
}

// Outputs n, ... of `rows` <= kPack rows of the weight, and of the gate, from their totals [kPack]
SPECDIFF_ONE_COPY void finish(const Product& p, int64_t m, int64_t n, int64_t rows, float* out,
                              const float* totals, const float* gate_totals) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t left = std::min<int64_t>(rows - r, kLanes);
    Floats y = load(totals + r);
    if (p.weight.bias) y = y + load_some(p.weight.bias + n + r, left);
    if (p.gate.data) {
      Floats gate = load(gate_totals + r);
      if (p.gate.bias) gate = gate + load_some(p.gate.bias + n + r, left);
      y = activate(gate, p.activation) * y;
    } else if (p.activation != Activation::kNone) {
      y = activate(y, p.activation);
    }
    if (p.residual) y = y + load_some(p.residual + m * p.residual_stride + n + r, left);
    store_some(out + r, y, left);
  }
}

// Packs that are read at once: of the weight, or of the gate and the weight in turn.
template <class T>
struct Stream {
  const T* packs[4];
  const T* next[4];  // what is read after them
};

// Rows n, ..., of the weight, P packs of it (and of the gate), by all of x.
template <int P, class T>
void block(const Product& p, const Stream<T>& stream, int64_t n, int64_t last) {
  alignas(64) float totals[P][kGroup * kPack];
  const int64_t length = p.x.length < p.k ? p.x.length : panel_length(p.k);
  const int64_t panels = std::max<int64_t>(1, (p.k + length - 1) / length);
  for (int64_t m = 0; m < p.m; m += kGroup) {
    const int64_t group = std::min<int64_t>(p.m - m, kGroup);
    for (int i = 0; i < P; ++i) std::fill(totals[i], totals[i] + group * kPack, 0.0f);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t k = panel * length, count = std::min(p.k - k, length);
      const float* x = at(p.x, m, k);
      const T* packs[P];
      const char* ahead[P];
      for (int i = 0; i < P; ++i) {
        packs[i] = stream.packs[i] + k * kPack;
        const T* next = panel + 1 < panels ? packs[i] + count * kPack : stream.next[i];
        ahead[i] = reinterpret_cast<const char*>(next);
      }
      multiply_panel<P>(packs, ahead, x, group, count, totals[0], kGroup * kPack);
    }
    const int each = p.gate.data ? 2 : 1;  // packs that give one output
    for (int j = 0; j < P; j += each) {
      const int64_t column = n + j / each * kPack, rows = std::min(last - column, kPack);
      float* out = at(p.out, m, column);  // a pack lies in one panel
      for (int64_t i = 0; i < group; ++i, out += p.out.row_stride) {
        finish(p, m + i, column, rows, out, totals[j + each - 1] + i * kPack,
               totals[j] + i * kPack);
      }
    }
  }
}

// Outputs first, ... of packed weights.
template <class T>
void packed(const Product& p, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(p.weight.data);
  const T* gate = static_cast<const T*>(p.gate.data);
  const int64_t step = p.k * kPack;
  int64_t n = first;
  const auto at_once = [&](auto count) {
    constexpr int P = count;
    for (; n < last; n += (gate ? P / 2 : P) * kPack) {
      const int64_t packs = (last - n + kPack - 1) / kPack;
      if (packs < (gate ? P / 2 : P)) return;
      Stream<T> stream;
      for (int i = 0; i < P; ++i) {
        const T* of = !gate || i % 2 ? weight : gate;
        stream.packs[i] = of + (n / kPack + (gate ? i / 2 : i)) * step;
        stream.next[i] = stream.packs[i] + (gate ? P / 2 : P) * step;
      }
      block<P>(p, stream, n, last);
    }
  };
  at_once(std::integral_constant<int, 4>{});
  at_once(std::integral_constant<int, 2>{});
  if (!gate) at_once(std::integral_constant<int, 1>{});
}

// Outputs n, ..., n + rows - 1 of weights that are used where they lie.
template <class T>
void where_they_lie(const Product& p, int64_t n, int64_t rows) {
  alignas(64) float totals[2][kGroup * kPack];  // of the weight and the gate
  alignas(64) float turned[kPanel * kPack];
  const Weight* weights[] = {&p.weight, &p.gate};
  const int64_t length = p.x.length < p.k ? p.x.length : panel_length(p.k);
  for (int64_t m = 0; m < p.m; m += kGroup) {
    const int64_t group = std::min<int64_t>(p.m - m, kGroup);
    for (int i = 0; i < (p.gate.data ? 2 : 1); ++i) {
      const Weight& weight = *weights[i];
      std::fill(totals[i], totals[i] + group * kPack, 0.0f);
      for (int64_t k = 0; k < p.k; k += length) {
        const int64_t count = std::min(p.k - k, length);
        const T* from = static_cast<const T*>(weight.data) + n * weight.stride + k;
        pack_columns(from, weight.stride, rows, count, turned);
        const float* packs[] = {turned};
        const char* ahead[] = {reinterpret_cast<const char*>(from + kPack * weight.stride)};
        multiply_panel<1>(packs, ahead, at(p.x, m, k), group, count, totals[i], 0);
      }
    }
    float* out = at(p.out, m, n);
    for (int64_t i = 0; i < group; ++i, out += p.out.row_stride) {
      finish(p, m + i, n, rows, out, totals[0] + i * kPack, totals[1] + i * kPack);
    }
  }
}

template <class T>
void multiply(const Product& p, int64_t first, int64_t last) {
  if (p.weight.packed) return packed<T>(p, first, last);
  for (int64_t n = first; n < last; n += kPack) {
    where_they_lie<T>(p, n, std::min(last - n, kPack));
  }
}

void product_of(const Product& p, int64_t first, int64_t last) {
  if (p.weight.dtype == kBFloat16) return multiply<BFloat16>(p, first, last);
  multiply<float>(p, first, last);
}

}  // namespace

using Multiply = decltype(Forward::multiply);
extern const Multiply SPECDIFF_CONCAT(multiply_, SPECDIFF_ISA);
const Multiply SPECDIFF_CONCAT(multiply_, SPECDIFF_ISA) = product_of;

}  // namespace specdiff::cpu
