// The distribution's headers compile as plain C++ and as CUDA, and depend on nothing.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SPECDIFF_HD __host__ __device__ __forceinline__
#ifdef __CUDA_ARCH__
#define SPECDIFF_CUDA  // device code; an emulator of it sets this too
#endif
#else
#define SPECDIFF_HD static inline
#endif

// fp64 and conversions to 64 bits are fast on GPUs for data centers (sm_80, 90, 100). They are slow
// on sm_86, 89 and 120.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ % 100 == 0 && __CUDA_ARCH__ < 1200
#define SPECDIFF_FAST_DOUBLES
#endif

namespace specdiff {

template <class To, class From>
SPECDIFF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace specdiff
