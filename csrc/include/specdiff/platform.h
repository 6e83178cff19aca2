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

namespace specdiff {

template <class To, class From>
SPECDIFF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace specdiff
