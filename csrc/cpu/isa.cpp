// Choice of the instruction set at run time.
#include <atomic>
#include <cstring>

#include "divergence.h"
#include "product.h"
#include "tile.h"

namespace specdiff::cpu {

extern const TileKernels kernels_plain;
extern const Product product_plain;
extern const DivergenceKernels divergence_plain;
#ifndef SPECDIFF_ONLY_PLAIN
extern const TileKernels kernels_avx2, kernels_avx512;
extern const Product product_avx2, product_avx512;
extern const DivergenceKernels divergence_avx2, divergence_avx512;
#endif

namespace {

struct Isa {
  const TileKernels* kernels;
  const Product* product;
  const DivergenceKernels* divergence;
  bool (*supported)();
};

const Isa kIsas[] = {
// best first
#ifndef SPECDIFF_ONLY_PLAIN
    {&kernels_avx512, &product_avx512, &divergence_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
     }},
    {&kernels_avx2, &product_avx2, &divergence_avx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
              __builtin_cpu_supports("fma");
     }},
#endif
    {&kernels_plain, &product_plain, &divergence_plain, [] { return true; }},
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
Product product() { return *isa().product; }
const DivergenceKernels& divergence() { return *isa().divergence; }

}  // namespace specdiff::cpu
