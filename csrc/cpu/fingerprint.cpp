#include <algorithm>

#include "ops.h"

namespace specdiff::cpu {
namespace {

// As in reference/fingerprint.py, which says why.
constexpr int kPlaces = 16;
constexpr int64_t kRun = 4;  // within a line of cache, where rows are aligned
constexpr uint32_t kRows = 0x69E22929, kColumns = 0xF13AF3DF;
constexpr uint64_t kWord = 0x9E3779B97F4A7C15, kPlace = 0xD1342543DE82EF95;

int64_t part(int64_t size, uint32_t fraction) {
  return static_cast<int64_t>((static_cast<uint64_t>(size) * fraction) >> 32);
}

}  // namespace

uint64_t fingerprint(const int32_t* weight, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride) {
  uint64_t total = reinterpret_cast<uintptr_t>(weight);
  for (const int64_t x : {rows, columns, row_stride, column_stride}) total = total * kWord + x;
  if (rows == 0 || columns == 0) return total;
  if (row_stride < column_stride) {
    std::swap(rows, columns);
    std::swap(row_stride, column_stride);
  }
  const int64_t run = std::min(kRun, columns);
  const int32_t* places[kPlaces];
  for (uint32_t i = 0; i < kPlaces; ++i) {  // all on their way before the first is read
    const int64_t row = part(rows, (i + 1) * kRows);
    const int64_t column = part(columns - run + 1, (i + 1) * kColumns) / kRun * kRun;
    places[i] = weight + row * row_stride + column * column_stride;
    __builtin_prefetch(places[i]);
  }
  for (const int32_t* place : places) {
    uint64_t words = 0;
    for (int64_t j = 0; j < run; ++j) words = words * kWord + place[j * column_stride];
    total = total * kPlace + words;
  }
  return total;
}

}  // namespace specdiff::cpu
