// The inner loop of skinny_linear: rows of x times rows of the weight. product.cpp is compiled once
// for each instruction set, with fused multiply-adds: this is no part of the sampling distribution.
#pragma once

#include "specdiff/params.h"

namespace specdiff::cpu {

constexpr int64_t kPack = 16;  // rows of the weight side by side

// out[m][n] for all m and first <= n < last; first is a multiple of kPack, and so is last, or it is
// the end.
using Product = void (*)(const SkinnyLinearParams& params, int64_t first, int64_t last);

// The one for the instruction set in use.
Product product();

}  // namespace specdiff::cpu
