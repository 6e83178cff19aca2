#include "ops.h"
#include "row.h"
#include "threads.h"

namespace specdiff::cpu {

void row_distribution(const RowDistributionParams& p) {
  const int64_t columns = p.logits.columns;
  parallel_for(p.rows, p.rows * columns, p.threads, [&](int64_t i, int thread) {
    int64_t sums[kMaxTiles];
    int64_t* scratch = p.scratch ? p.scratch + thread * columns : nullptr;
    store(make_distribution(Row(p.logits, 0, i), p.parameters, i, sums, scratch), p.distribution,
          i);
  });
}

}  // namespace specdiff::cpu
