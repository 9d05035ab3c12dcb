// KVCache::attend: a chunk's pairs are appended, its queries attend to the hot pages, then to what is recalled for them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "kv_cache.h"
#include "rotate.h"

namespace satchel {

namespace {
constexpr int kTaskRows = 96;        // query rows of one attention task: a page is converted once for them
constexpr int kScoredTokens = 128;   // of a chunk: evenly spaced ones choose the blocks for all
constexpr int kQuestionTokens = 64;  // up to so many, a block that one query needs is chosen; above, what all need
}  // namespace

void KVCache::attend(const AttentionSettings& s, const float* queries, const float* keys, const float* values,
                     const int64_t* positions, int tokens, const float* frequencies, float* out,
                     const Parallel& parallel) {
  if (s.layer < 0 || s.layer >= shape_.layers) throw std::invalid_argument("the cache has no such layer");
  if (s.rope_dims < 0 || s.rope_dims % 2 || s.rope_dims > shape_.head_size)
    throw std::invalid_argument("rope_dims must be even and at most head_size");
  if (tokens == 0) return;
  Layer& layer = layers_[s.layer];
  for (const Head& head : layer.heads)  // pages are skipped by their first and last position
    if (head.tokens && position_of(head, head.tokens - 1) > positions[0])
      throw std::invalid_argument("positions must ascend: the cache holds later ones already");
  if (positions[0] < archived_until()) throw std::invalid_argument("positions must ascend: the archive holds later ones");
  prepare_rope(s, positions, tokens, frequencies);
  const int D = shape_.head_size, KV = shape_.kv_heads, G = shape_.heads / KV, half = s.rope_dims / 2;
  observe(layer, queries, tokens);
  work_.queries.resize(size_t(tokens) * shape_.heads * D);
  work_.row_positions.resize(size_t(tokens) * G);
  for (int t = 0; t < tokens; ++t)
    std::fill_n(work_.row_positions.begin() + size_t(t) * G, G, work_.positions[t]);

  // Queries are rotated in slices of tokens, keys appended head by head.
  constexpr int kSlice = 64;
  const size_t slices = size_t(tokens + kSlice - 1) / kSlice;
  parallel(slices + KV, [&](size_t task) {
    if (task < size_t(KV)) {
      append(layer.heads[task], keys + task * D, values + task * D, int64_t(KV) * D, work_.positions.data(), tokens,
             work_.rope.data(), half);
      return;
    }
    const int first = int(task - KV) * kSlice, last = std::min(tokens, first + kSlice);
    for (int t = first; t < last; ++t)
      for (int h = 0; h < shape_.heads; ++h)
        rotate(queries + (size_t(t) * shape_.heads + h) * D, work_.rope.data() + size_t(t) * 2 * half, half, D, s.scale,
               work_.queries.data() + ((size_t(h / G) * tokens + t) * G + h % G) * D);
  });

  const bool recall = archive_ && !archive_->empty() && s.window == 0;  // a sliding window needs nothing older
  const int splits = splits_for(tokens * G, recall);
  attend_hot(s, tokens, splits, recall, out, parallel);
  if (recall) {
    prepare_archive_rope(s, work_.positions.back());
    choose_blocks(s, tokens, splits, parallel);
    attend_recalled(s, tokens, splits, out, parallel);
  }
  if (splits > 1) merge(splits, tokens, out);
}

// Few rows (a decode step): the keys are split too, so that every core has work; at least 4 pages a task.
int KVCache::splits_for(int rows, bool recall) const {
  if (shape_.threads == 1) return 1;
  const int KV = shape_.kv_heads, blocks = (rows + kTaskRows - 1) / kTaskRows;
  size_t pages = 0;
  for (const Layer& layer : layers_)
    for (const Head& head : layer.heads) pages = std::max(pages, head.pages.size());
  if (recall) pages += size_t(archive_->settings().recall_tokens + archive_->settings().sinks) / kPageTokens;
  const int wanted = (4 * shape_.threads + KV * blocks - 1) / (KV * blocks);
  return std::max(1, std::min(wanted, int(pages) / 4));
}

// The task of some rows of one KV head, and of one of `splits` parts of its keys.
AttentionTask KVCache::task_of(const AttentionSettings& s, int kv, int split, int first_row, int last_row, int rows) {
  const size_t at = (size_t(split) * shape_.kv_heads + kv) * rows + first_row;
  AttentionTask task{};
  task.queries = work_.queries.data() + (size_t(kv) * rows + first_row) * shape_.head_size;
  task.row_positions = work_.row_positions.data() + first_row;
  task.rows = last_row - first_row;
  task.head_size = shape_.head_size;
  task.storage = shape_.storage;
  task.softcap = s.softcap;
  task.window = s.window;
  task.out = work_.out.data() + at * shape_.head_size;
  task.maxima = work_.maxima.data() + at;
  task.weights = work_.weights.data() + at;
  return task;
}

// [kv, token, group] -> [token, head]
void KVCache::copy_rows(const AttentionTask& task, int kv, int first_row, float* out) const {
  const int D = shape_.head_size, G = shape_.heads / shape_.kv_heads;
  for (int r = 0; r < task.rows; ++r) {
    const int row = first_row + r;
    std::memcpy(out + (size_t(row / G) * shape_.heads + kv * G + row % G) * D, task.out + size_t(r) * D, D * sizeof(float));
  }
}

void KVCache::attend_hot(const AttentionSettings& s, int tokens, int splits, bool more_follows, float* out,
                         const Parallel& parallel) {
  const int KV = shape_.kv_heads, rows = tokens * shape_.heads / KV;
  const int blocks = (rows + kTaskRows - 1) / kTaskRows;
  const Layer& layer = layers_[s.layer];
  std::vector<std::vector<PageView>> pages(KV);
  for (int kv = 0; kv < KV; ++kv) {
    const Head& head = layer.heads[kv];
    for (size_t p = 0; p < head.pages.size(); ++p) {
      const Page& page = *head.pages[p];
      pages[kv].push_back({page.keys(), page.values(), page.positions(),
                           std::min(kPageTokens, head.tokens - int(p) * kPageTokens)});
    }
  }
  const size_t all_rows = size_t(splits) * KV * rows;
  work_.out.resize(all_rows * shape_.head_size);
  work_.maxima.resize(all_rows);
  work_.weights.resize(all_rows);
  parallel(size_t(splits) * KV * blocks, [&](size_t index) {
    // Later rows see more keys: they go first, so that no core is left with the longest task.
    const int block = blocks - 1 - int(index / (size_t(splits) * KV));
    const int split = int(index % splits), kv = int(index / splits % KV);
    const int first = block * kTaskRows, last = std::min(rows, first + kTaskRows), all = int(pages[kv].size());
    AttentionTask task = task_of(s, kv, split, first, last, rows);
    task.pages = pages[kv].data() + all * split / splits;
    task.pages_count = all * (split + 1) / splits - all * split / splits;
    task.normalize = splits == 1 && !more_follows;
    active_variant().attend(task);
    if (task.normalize) copy_rows(task, kv, first, out);
  });
}

void KVCache::prepare_archive_rope(const AttentionSettings& s, int last) {
  Workspace& w = work_;
  const int half = s.rope_dims / 2, pages = archive_->pages();
  w.table.prepare(w.rope_frequencies.data(), half, s.rope_attention_factor, last + 1);
  if (w.page_ropes_last == last && w.page_ropes_factor == s.rope_attention_factor &&
      w.page_ropes_frequencies == w.rope_frequencies && w.page_ropes.size() == size_t(pages) * 2 * half)
    return;  // as another layer of this run had it
  w.page_ropes.resize(size_t(pages) * 2 * half);
  for (int page = 0; page < pages; ++page) {
    float* row = w.page_ropes.data() + size_t(page) * 2 * half;
    w.table.at(archive_->seen_position(page, last), row);
    for (int i = 0; i < 2 * half; ++i) row[i] /= s.rope_attention_factor;
  }
  w.page_ropes_last = last;
  w.page_ropes_factor = s.rope_attention_factor;
  w.page_ropes_frequencies = w.rope_frequencies;
}

// Chooses the blocks that this chunk's queries need, for each KV head; while decoding, every few steps.
void KVCache::choose_blocks(const AttentionSettings& s, int tokens, int splits, const Parallel& parallel) {
  const ArchiveSettings& settings = archive_->settings();
  const int KV = shape_.kv_heads, D = shape_.head_size, G = shape_.heads / KV, rows = tokens * G;
  const int last = work_.positions.back();
  int& chosen_at = archive_->chosen_at(s.layer);
  if (tokens == 1 && chosen_at >= 0 && last >= chosen_at && last - chosen_at < settings.recall_every) return;
  chosen_at = last;
  const int first_block = settings.sinks / kBlockTokens, all = archive_->blocks();
  const int wanted = std::min(settings.recall_tokens / kBlockTokens, all - first_block);
  const size_t width = size_t(archive_->pages()) * kDigestBlocks;
  std::vector<std::vector<float>> votes(KV, std::vector<float>(width, 0));

  if (wanted > 0 && wanted < all - first_block) {
    // The rows that vote, with what the hot tier gave them.
    const int stride = (tokens + kScoredTokens - 1) / kScoredTokens, voters = (tokens + stride - 1) / stride * G;
    std::vector<float> queries(size_t(KV) * voters * D), maxima(size_t(KV) * voters), weights(maxima.size());
    for (int kv = 0; kv < KV; ++kv)
      for (int v = 0; v < voters; ++v) {
        const size_t row = size_t(kv) * rows + size_t(v / G) * stride * G + v % G, at = size_t(kv) * voters + v;
        std::copy_n(work_.queries.data() + row * D, D, queries.data() + at * D);
        float peak = -std::numeric_limits<float>::infinity(), total = 0;
        for (int i = 0; i < splits; ++i) peak = std::max(peak, work_.maxima[size_t(i) * KV * rows + row]);
        for (int i = 0; i < splits; ++i)
          if (const float w = work_.weights[size_t(i) * KV * rows + row]; w > 0)
            total += w * std::exp(work_.maxima[size_t(i) * KV * rows + row] - peak);
        maxima[at] = peak;
        weights[at] = total;
      }
    constexpr int kVoters = 48;  // of one task
    const int groups = (voters + kVoters - 1) / kVoters;
    std::vector<std::vector<DigestPage>> pages(KV);
    for (int kv = 0; kv < KV; ++kv) archive_->digests(s.layer, kv, work_.page_ropes, s.rope_dims / 2, pages[kv]);
    std::mutex mutex;
    const bool strongest = tokens <= kQuestionTokens;
    parallel(size_t(KV) * groups, [&](size_t index) {
      const int kv = int(index / groups), first = int(index % groups) * kVoters;
      std::vector<float> own(width, 0);
      const size_t at = size_t(kv) * voters + first;
      ScoreTask task{settings.retriever, &archive_->basis(s.layer, kv), D, s.rope_dims / 2, queries.data() + at * D,
                     std::min(kVoters, voters - first), pages[kv].data(), int(pages[kv].size()), maxima.data() + at,
                     weights.data() + at, strongest, own.data()};
      active_variant().score(task);
      std::lock_guard<std::mutex> lock(mutex);
      for (size_t i = 0; i < width; ++i) votes[kv][i] = strongest ? std::max(votes[kv][i], own[i]) : votes[kv][i] + own[i];
    });
  }
  archive_->expect((s.layer + 1) % shape_.layers);
  parallel(size_t(KV), [&](size_t kv) {
    std::vector<int32_t> chosen;
    for (int block = first_block; block < all; ++block)
      if (archive_->available(s.layer, block)) chosen.push_back(block);
    if (int(chosen.size()) > wanted) {
      const std::vector<float>& v = votes[kv];
      std::nth_element(chosen.begin(), chosen.begin() + wanted, chosen.end(),
                       [&](int32_t a, int32_t b) { return v[a] != v[b] ? v[a] > v[b] : a > b; });
      chosen.resize(wanted);
      std::sort(chosen.begin(), chosen.end());
    }
    archive_->recall(s.layer, int(kv), chosen);
  });
}

void KVCache::attend_recalled(const AttentionSettings& s, int tokens, int splits, float* out, const Parallel& parallel) {
  const int KV = shape_.kv_heads, rows = tokens * shape_.heads / KV;
  const int row_blocks = (rows + kTaskRows - 1) / kTaskRows;
  const Layer& layer = layers_[s.layer];
  std::vector<std::vector<StoredBlock>> blocks(KV);
  std::vector<int32_t> still_hot;
  for (int kv = 0; kv < KV; ++kv) {
    const Head& head = layer.heads[kv];
    still_hot.clear();
    for (int t = 0; t < head.tokens && position_of(head, t) < archive_->end(); ++t)
      still_hot.push_back(position_of(head, t));
    archive_->attended(s.layer, kv, work_.positions.back(), still_hot, blocks[kv]);
  }
  parallel(size_t(splits) * KV * row_blocks, [&](size_t index) {
    const int row_block = int(index / (size_t(splits) * KV)), split = int(index % splits), kv = int(index / splits % KV);
    const int first = row_block * kTaskRows, last = std::min(rows, first + kTaskRows), all = int(blocks[kv].size());
    AttentionTask task = task_of(s, kv, split, first, last, rows);
    task.blocks = blocks[kv].data() + all * split / splits;
    task.blocks_count = all * (split + 1) / splits - all * split / splits;
    task.rope = work_.table.view();
    task.resume = true;
    task.normalize = splits == 1;
    active_variant().attend(task);
    if (task.normalize) copy_rows(task, kv, first, out);
  });
}

// Joins the partial results of the splits by their log-sum-exp.
void KVCache::merge(int splits, int tokens, float* out) const {
  const Workspace& w = work_;
  const int D = shape_.head_size, KV = shape_.kv_heads, G = shape_.heads / KV, rows = tokens * G;
  for (int kv = 0; kv < KV; ++kv)
    for (int row = 0; row < rows; ++row) {
      float* to = out + (size_t(row / G) * shape_.heads + kv * G + row % G) * D;
      std::fill_n(to, D, 0.0f);
      float peak = -std::numeric_limits<float>::infinity(), total = 0;
      for (int split = 0; split < splits; ++split)
        peak = std::max(peak, w.maxima[(size_t(split) * KV + kv) * rows + row]);
      for (int split = 0; split < splits; ++split) {
        const size_t at = (size_t(split) * KV + kv) * rows + row;
        if (w.weights[at] <= 0) continue;
        const float share = std::exp(w.maxima[at] - peak);
        total += share * w.weights[at];
        for (int d = 0; d < D; ++d) to[d] += share * w.out[at * D + d];
      }
      if (total > 0)
        for (int d = 0; d < D; ++d) to[d] /= total;
    }
}

}  // namespace satchel
