#include "attention_plan.h"
#include "ops.h"
#include "threads.h"

namespace specdiff::cpu {

void cached_attention(const AttentionParams& p) {
  thread_local AttentionMemory memory;
  if (p.batch * p.queries * p.heads == 0) return;
  const AttentionPlan plan = memory.plan(p, plain_rows(p.out, p.heads * p.size));
  const int64_t work = plan.spans * kSpan * p.batch * p.queries * p.heads * p.size;
  Team team(work <= kElementsPerThread ? 1 : p.threads);
  team.run([&] {
    team.each(plan.items, [&](int64_t item) { forward().attend(p, plan, item); });
    if (plan.split) team.each(plan.merges, [&](int64_t item) { forward().merge(p, plan, item); });
  });
}

}  // namespace specdiff::cpu
