// The inner loop of skinny_linear: rows of x times rows of the weight. product.cpp is compiled once
// for each instruction set, with fused multiply-adds: this is no part of the sampling law.
#pragma once

#include "specdiff/params.h"

namespace specdiff::cpu {

// out[m][n] for all m and first <= n < last
using Product = void (*)(const SkinnyLinearParams& params, int64_t first, int64_t last);

// The one for the instruction set in use.
Product product();

}  // namespace specdiff::cpu
