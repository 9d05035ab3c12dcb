// Which pairs queries look at: the largest share of a query's attention that each of some pairs has had.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "kv_cache.h"

namespace satchel {

namespace {
constexpr float kNone = -std::numeric_limits<float>::infinity();
}

void KVCache::watch(int first, int end) {
  watch_.reset();
  if (first == end) return;
  if (first < 0 || end < first) throw std::invalid_argument("watch: positions must ascend");
  auto watch = std::make_unique<Watch>();
  watch->first = first;
  watch->end = end;
  for (int l = 0; l < shape_.layers; ++l) {
    watch->best.emplace_back();
    if (shape_.window(l)) continue;
    for (const Head& head : layers_[l].heads)
      if (first_at(head, end) - first_at(head, first) != end - first)
        throw std::invalid_argument("watch: not all of these tokens are hot");
    watch->best.back().assign(size_t(shape_.kv_heads) * (end - first), kNone);
  }
  watch_ = std::move(watch);
}

std::vector<float> KVCache::watched(int layer, int kv_head) const {
  if (!watch_) throw std::invalid_argument("nothing is watched");
  const std::vector<float>& best = watch_->best.at(layer);
  if (best.empty() || kv_head < 0 || kv_head >= shape_.kv_heads)
    throw std::invalid_argument("of this layer and head nothing is watched");
  const size_t count = watch_->end - watch_->first;
  return {best.begin() + kv_head * count, best.begin() + (kv_head + 1) * count};
}

std::vector<float> KVCache::value_norms(int layer, int kv_head, int first, int end) const {
  const Head& head = layers_.at(layer).heads.at(kv_head);
  const int D = shape_.head_size, from = first_at(head, first), until = first_at(head, end);
  std::vector<float> norms(std::max(until - from, 0)), keys(size_t(kPageTokens) * D), values(keys.size());
  int32_t positions[kPageTokens];
  for (int done = 0; done < int(norms.size()); done += kPageTokens) {
    const int n = std::min(kPageTokens, int(norms.size()) - done);
    read_range(head, from + done, n, keys.data(), values.data(), positions);
    for (int t = 0; t < n; ++t) {
      const float* value = values.data() + size_t(t) * D;
      norms[done + t] = std::sqrt(std::inner_product(value, value + D, value, 0.0f));
    }
  }
  return norms;
}

// After attention: the maxima and weights of all splits are in the workspace.
void KVCache::note_watched(const AttentionSettings& s, int tokens, int splits, const Parallel& parallel) {
  const Watch& watch = *watch_;
  if (s.window || work_.positions.front() < watch.end || watch.best[s.layer].empty()) return;
  const int KV = shape_.kv_heads, D = shape_.head_size, rows = tokens * shape_.heads / KV, count = watch.end - watch.first;
  std::vector<float> totals(size_t(KV) * rows);
  for (size_t row = 0; row < totals.size(); ++row) {
    float peak = kNone, total = 0;
    for (int split = 0; split < splits; ++split) peak = std::max(peak, work_.maxima[split * totals.size() + row]);
    for (int split = 0; split < splits; ++split) {
      const size_t at = split * totals.size() + row;
      if (work_.weights[at] > 0) total += work_.weights[at] * std::exp(work_.maxima[at] - peak);
    }
    totals[row] = total > 0 ? peak + std::log(total) : -kNone;  // a row that sees nothing has no share to give
  }
  struct Part {
    int kv, page, from;  // `from`: the head's token at the first watched position
  };
  std::vector<Part> parts;
  for (int kv = 0; kv < KV; ++kv) {
    const Head& head = layers_[s.layer].heads[kv];
    const int from = first_at(head, watch.first);
    if (first_at(head, watch.end) - from != count) throw std::invalid_argument("watched tokens were forgotten");
    for (int page = from / kPageTokens; page * kPageTokens < from + count; ++page) parts.push_back({kv, page, from});
  }
  parallel(parts.size(), [&](size_t index) {
    const Part& part = parts[index];
    const Head& head = layers_[s.layer].heads[part.kv];
    const Page& page = *head.pages[part.page];
    const int begin = part.page * kPageTokens, held = std::min(kPageTokens, head.tokens - begin);
    float best[kPageTokens];
    active_variant().largest_shares({work_.queries.data() + size_t(part.kv) * rows * D, totals.data() + size_t(part.kv) * rows,
                                     rows, {page.keys(), page.values(), page.positions(), held}, D, shape_.storage,
                                     s.softcap, best});
    float* noted = watch_->best[s.layer].data() + size_t(part.kv) * count;
    for (int t = std::max(0, part.from - begin); t < std::min(held, part.from + count - begin); ++t) {
      float& so_far = noted[begin + t - part.from];
      so_far = std::max(so_far, best[t]);
    }
  });
}

}  // namespace satchel
