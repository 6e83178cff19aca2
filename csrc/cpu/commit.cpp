#include <algorithm>

#include "ops.h"

namespace specdiff::cpu {

void commit(const CommitParams& p) {
  const auto stops = [&](int64_t token) {
    return std::find(p.stop_tokens, p.stop_tokens + p.stops, token) != p.stop_tokens + p.stops;
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t* emitted = p.emitted + b * p.columns;
    const int64_t length = p.lengths[b];
    const bool limited = p.limit != nullptr;
    const int64_t limit = limited ? p.limit[b] : 0;
    bool done = p.finished && p.finished[b];
    int64_t room = done ? 0 : p.columns;
    if (limited) room = std::min(room, std::max<int64_t>(limit - length, 0));
    int64_t kept = 0;
    while (kept < room && emitted[kept] >= 0 && !done) done = stops(emitted[kept++]);
    p.new_lengths[b] = length + kept;
    p.kept[b] = kept;
    p.new_finished[b] = done || (limited && length + kept >= limit);
  }
}

}  // namespace specdiff::cpu
