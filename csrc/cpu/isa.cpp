// Choice of the instruction set at run time.
#include <atomic>
#include <cstring>

#include "divergence.h"
#include "forward.h"
#include "tile.h"

namespace specdiff::cpu {

// What each instruction set has.
#define SPECDIFF_KERNELS(isa)                                \
  extern const TileKernels kernels_##isa;                    \
  extern const DivergenceKernels divergence_##isa;           \
  extern const decltype(Forward::multiply) multiply_##isa;   \
  extern const decltype(Forward::attend) attend_##isa;       \
  extern const decltype(Forward::merge) merge_##isa;         \
  extern const decltype(Forward::normalise) normalise_##isa; \
  extern const decltype(Forward::rotate) rotate_##isa;

SPECDIFF_KERNELS(plain)
#ifndef SPECDIFF_ONLY_PLAIN
SPECDIFF_KERNELS(avx2)
SPECDIFF_KERNELS(avx512)
#endif

namespace {

struct Isa {
  const TileKernels* kernels;
  const DivergenceKernels* divergence;
  Forward forward;
  bool (*supported)();
};

#define SPECDIFF_ISA_OF(isa)                                                 \
  &kernels_##isa, &divergence_##isa, {                                       \
    multiply_##isa, attend_##isa, merge_##isa, normalise_##isa, rotate_##isa \
  }

const Isa kIsas[] = {
// best first
#ifndef SPECDIFF_ONLY_PLAIN
    {SPECDIFF_ISA_OF(avx512),
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
     }},
    {SPECDIFF_ISA_OF(avx2),
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
              __builtin_cpu_supports("fma");
     }},
#endif
    {SPECDIFF_ISA_OF(plain), [] { return true; }},
};

std::atomic<const Isa*> in_use{nullptr};

}  // namespace

int isa_count() { return sizeof(kIsas) / sizeof(kIsas[0]); }
const char* isa_name(int index) { return kIsas[index].kernels->isa; }
bool isa_supported(int index) { return kIsas[index].supported(); }

bool use_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.kernels->isa, name) == 0 && isa.supported()) {
      in_use = &isa;
      return true;
    }
  }
  return false;
}

namespace {

const Isa& isa() {
  if (in_use.load(std::memory_order_relaxed) == nullptr) {
    for (const Isa& best : kIsas) {
      if (best.supported() && use_isa(best.kernels->isa)) break;
    }
  }
  return *in_use.load(std::memory_order_relaxed);
}

}  // namespace

const TileKernels& kernels() { return *isa().kernels; }
const Forward& forward() { return isa().forward; }
const DivergenceKernels& divergence() { return *isa().divergence; }

}  // namespace specdiff::cpu
