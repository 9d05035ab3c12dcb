#include "kv_cache.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <unordered_map>

namespace satchel {

namespace {

constexpr int kTileTokens = 16;

uint16_t to_bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
void put(void* array, Storage storage, size_t index, float x) {
  if (storage == Storage::kFloat32)
    static_cast<float*>(array)[index] = x;
  else
    static_cast<uint16_t*>(array)[index] = to_bf16(x);
}
// Where channel d of token t lies in a page's keys: tiles of 16 tokens, channel-major inside a tile.
size_t key_index(int t, int d, int head_size) {
  return size_t(t / kTileTokens) * kTileTokens * head_size + size_t(d) * kTileTokens + t % kTileTokens;
}

// Half-split rotary embedding of one head: rope = [cos (half), sin (half)]; dimensions past 2 * half are copied.
void rotate(const float* x, const float* rope, int half, int head_size, float scale, float* out) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = (a * rope[i] - b * rope[half + i]) * scale;
    out[i + half] = (b * rope[i] + a * rope[half + i]) * scale;
  }
  for (int i = 2 * half; i < head_size; ++i) out[i] = x[i] * scale;
}
void rope_at(int32_t position, const std::vector<float>& frequencies, float factor, float* out) {
  const size_t half = frequencies.size();
  for (size_t i = 0; i < half; ++i) {
    const double angle = double(position) * double(frequencies[i]);
    out[i] = float(std::cos(angle)) * factor;
    out[half + i] = float(std::sin(angle)) * factor;
  }
}

}  // namespace

KVCache::KVCache(const CacheShape& shape) : shape_(shape) {
  if (shape.layers <= 0 || shape.kv_heads <= 0 || shape.heads <= 0 || shape.heads % shape.kv_heads != 0)
    throw std::invalid_argument("KVCache: heads must be a positive multiple of kv_heads");
  if (shape.head_size <= 0 || shape.head_size % 16 != 0 || shape.head_size > 256)
    throw std::invalid_argument("KVCache: head_size must be a multiple of 16, at most 256");
  pool_ = std::make_shared<PagePool>(shape.head_size, shape.storage, shape.limit_bytes);
  layers_.resize(shape.layers);
  for (Layer& layer : layers_) layer.heads.resize(shape.kv_heads);
}

std::unique_ptr<KVCache> KVCache::fork() const {
  std::unique_ptr<KVCache> copy(new KVCache(*this));
  copy->work_ = Workspace();
  return copy;
}

Page& KVCache::writable(Head& head, int page) {
  std::shared_ptr<Page>& slot = head.pages[page];
  if (slot.use_count() > 1) {
    auto own = std::make_shared<Page>(pool_, shape_.head_size, shape_.storage);
    own->copy_from(*slot);
    slot = std::move(own);
  }
  return *slot;
}

void KVCache::append(Head& head, const float* keys, const float* values, int64_t stride, const int32_t* positions,
                     int tokens, const float* rope) {
  const int D = shape_.head_size, half = int(work_.rope_frequencies.size());
  float rotated[256];
  for (int t = 0; t < tokens; ++t) {
    const int page_index = head.tokens / kPageTokens, slot = head.tokens % kPageTokens;
    if (page_index == int(head.pages.size()))
      head.pages.push_back(std::make_shared<Page>(pool_, D, shape_.storage));
    Page& page = t == 0 ? writable(head, page_index) : *head.pages[page_index];
    rotate(keys + t * stride, rope + size_t(t) * 2 * half, half, D, 1.0f, rotated);
    const float* v = values + t * stride;
    for (int d = 0; d < D; ++d) put(page.keys(), shape_.storage, key_index(slot, d, D), rotated[d]);
    for (int d = 0; d < D; ++d) put(page.values(), shape_.storage, size_t(slot) * D + d, v[d]);
    page.positions()[slot] = positions[t];
    ++head.tokens;
  }
}

void KVCache::truncate(Head& head, int tokens) {
  if (tokens >= head.tokens) return;
  const int pages = (tokens + kPageTokens - 1) / kPageTokens;
  head.pages.resize(pages);
  if (tokens % kPageTokens != 0) {
    Page& last = writable(head, pages - 1);
    std::fill(last.positions() + tokens % kPageTokens, last.positions() + kPageTokens, INT32_MAX);
  }
  head.tokens = tokens;
}

void KVCache::commit() {
  for (Layer& layer : layers_) {
    for (Head& head : layer.heads) head.committed = head.tokens;
    layer.observing = false;
  }
}
void KVCache::rollback() {
  for (Layer& layer : layers_) {
    for (Head& head : layer.heads) truncate(head, head.committed);
    if (!layer.observing) continue;
    layer.observed.swap(layer.committed_observed);
    layer.observed_positions.swap(layer.committed_positions);
    layer.observing = false;
  }
}
void KVCache::forget_from(int position) {
  const size_t row = size_t(shape_.heads) * shape_.head_size;
  for (Layer& layer : layers_) {
    for (Head& head : layer.heads) {
      int kept = head.tokens;
      while (kept > 0 && head.pages[(kept - 1) / kPageTokens]->positions()[(kept - 1) % kPageTokens] >= position) --kept;
      truncate(head, kept);
      head.committed = kept;
    }
    auto& seen = layer.observed_positions;
    seen.erase(std::lower_bound(seen.begin(), seen.end(), position), seen.end());
    layer.observed.resize(seen.size() * row);
    layer.observing = false;
  }
}
void KVCache::clear() {
  for (Layer& layer : layers_) {
    for (Head& head : layer.heads) head = Head();
    layer.observed.clear();
    layer.observed_positions.clear();
  }
}

void KVCache::prepare_rope(const AttentionSettings& s, const int64_t* positions, int tokens, const float* frequencies) {
  const size_t half = size_t(s.rope_dims / 2);
  Workspace& w = work_;
  bool same = int(w.positions.size()) == tokens && w.rope_factor == s.rope_attention_factor &&
              w.rope_frequencies.size() == half &&
              std::equal(frequencies, frequencies + half, w.rope_frequencies.begin());
  for (int t = 0; same && t < tokens; ++t) same = w.positions[t] == positions[t];
  if (!same) {
    for (int t = 0; t < tokens; ++t) {
      if (positions[t] < 0 || positions[t] >= INT_MAX) throw std::invalid_argument("a position is out of range");
      if (t && positions[t] < positions[t - 1]) throw std::invalid_argument("positions must ascend");
    }
    w.positions.assign(positions, positions + tokens);
    w.rope_frequencies.assign(frequencies, frequencies + half);
    w.rope_factor = s.rope_attention_factor;
    w.rope.resize(size_t(tokens) * 2 * half);
    for (int t = 0; t < tokens; ++t)
      rope_at(w.positions[t], w.rope_frequencies, w.rope_factor, w.rope.data() + size_t(t) * 2 * half);
  }
  Layer& layer = layers_[s.layer];
  if (layer.frequencies != w.rope_frequencies) layer.frequencies = w.rope_frequencies;
  layer.attention_factor = s.rope_attention_factor;
}

void KVCache::observe(Layer& layer, const float* queries, int tokens) {
  if (shape_.observed_queries <= 0) return;
  if (!layer.observing) {
    layer.committed_observed = layer.observed;
    layer.committed_positions = layer.observed_positions;
    layer.observing = true;
  }
  // A window over the stream of queries: a short chunk (a turn's last words) pushes out only as many as it brings.
  const size_t row = size_t(shape_.heads) * shape_.head_size;
  const int fresh = std::min(tokens, shape_.observed_queries);
  const int kept = std::min(int(layer.observed_positions.size()), shape_.observed_queries - fresh);
  const int dropped = int(layer.observed_positions.size()) - kept;
  layer.observed.erase(layer.observed.begin(), layer.observed.begin() + dropped * row);
  layer.observed_positions.erase(layer.observed_positions.begin(), layer.observed_positions.begin() + dropped);
  layer.observed.insert(layer.observed.end(), queries + (tokens - fresh) * row, queries + tokens * row);
  layer.observed_positions.insert(layer.observed_positions.end(), work_.positions.end() - fresh, work_.positions.end());
}

void KVCache::attend(const AttentionSettings& s, const float* queries, const float* keys, const float* values,
                     const int64_t* positions, int tokens, const float* frequencies, float* out,
                     const Parallel& parallel) {
  if (s.layer < 0 || s.layer >= shape_.layers) throw std::invalid_argument("the cache has no such layer");
  if (s.rope_dims < 0 || s.rope_dims % 2 || s.rope_dims > shape_.head_size)
    throw std::invalid_argument("rope_dims must be even and at most head_size");
  if (tokens == 0) return;
  Layer& layer = layers_[s.layer];
  for (const Head& head : layer.heads)  // pages are skipped by their first and last position
    if (head.tokens && head.pages[(head.tokens - 1) / kPageTokens]->positions()[(head.tokens - 1) % kPageTokens] > positions[0])
      throw std::invalid_argument("positions must ascend: the cache holds later ones already");
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
             work_.rope.data());
      return;
    }
    const int first = int(task - KV) * kSlice, last = std::min(tokens, first + kSlice);
    for (int t = first; t < last; ++t)
      for (int h = 0; h < shape_.heads; ++h)
        rotate(queries + (size_t(t) * shape_.heads + h) * D, work_.rope.data() + size_t(t) * 2 * half, half, D, s.scale,
               work_.queries.data() + ((size_t(h / G) * tokens + t) * G + h % G) * D);
  });
  run_tasks(s, tokens, out, parallel);
}

void KVCache::run_tasks(const AttentionSettings& s, int tokens, float* out, const Parallel& parallel) {
  const int D = shape_.head_size, KV = shape_.kv_heads, G = shape_.heads / KV, rows = tokens * G;
  constexpr int kTaskRows = 96;
  const int blocks = (rows + kTaskRows - 1) / kTaskRows;
  const Layer& layer = layers_[s.layer];
  std::vector<std::vector<PageView>> pages(KV);
  int most_pages = 0;
  for (int kv = 0; kv < KV; ++kv) {
    const Head& head = layer.heads[kv];
    for (size_t p = 0; p < head.pages.size(); ++p) {
      const Page& page = *head.pages[p];
      pages[kv].push_back({page.keys(), page.values(), page.positions(),
                           std::min(kPageTokens, head.tokens - int(p) * kPageTokens)});
    }
    most_pages = std::max(most_pages, int(pages[kv].size()));
  }
  // Few rows (a decode step): the keys are split too, so that every core has work; at least 4 pages a task.
  const int wanted = (4 * shape_.threads + KV * blocks - 1) / (KV * blocks);
  const int splits = shape_.threads == 1 ? 1 : std::max(1, std::min(wanted, most_pages / 4));

  Workspace& w = work_;
  const size_t all_rows = size_t(splits) * KV * rows;
  w.out.resize(all_rows * D);
  w.maxima.resize(all_rows);
  w.weights.resize(all_rows);
  const Variant& variant = active_variant();
  const size_t count = size_t(splits) * KV * blocks;
  parallel(count, [&](size_t index) {
    // Later rows see more keys: they go first, so that no core is left with the longest task.
    const int block = blocks - 1 - int(index / (size_t(splits) * KV));
    const int split = int(index % splits), kv = int(index / splits % KV);
    const int first = block * kTaskRows, last = std::min(rows, first + kTaskRows);
    const int all = int(pages[kv].size()), page_first = all * split / splits, page_last = all * (split + 1) / splits;
    const size_t at = (size_t(split) * KV + kv) * rows + first;
    AttentionTask task{};
    task.queries = w.queries.data() + (size_t(kv) * rows + first) * D;
    task.row_positions = w.row_positions.data() + first;
    task.rows = last - first;
    task.pages = pages[kv].data() + page_first;
    task.pages_count = page_last - page_first;
    task.head_size = D;
    task.storage = shape_.storage;
    task.softcap = s.softcap;
    task.window = s.window;
    task.out = w.out.data() + at * D;
    task.maxima = w.maxima.data() + at;
    task.weights = w.weights.data() + at;
    task.normalize = splits == 1;
    variant.attend(task);
    if (splits > 1) return;
    for (int row = first; row < last; ++row)  // [kv, token, group] -> [token, head]
      std::memcpy(out + (size_t(row / G) * shape_.heads + kv * G + row % G) * D, task.out + size_t(row - first) * D,
                  D * sizeof(float));
  });
  if (splits == 1) return;
  for (int kv = 0; kv < KV; ++kv)  // merge the partial results by their log-sum-exp
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

namespace {
template <class T>
void copy_token(const Page& source, int from, Page& target, int to, int head_size) {
  const T* keys = static_cast<const T*>(source.keys()) + key_index(from, 0, head_size);
  T* keys_to = static_cast<T*>(target.keys()) + key_index(to, 0, head_size);
  for (int d = 0; d < head_size; ++d) keys_to[d * kTileTokens] = keys[d * kTileTokens];
  std::memcpy(static_cast<T*>(target.values()) + size_t(to) * head_size,
              static_cast<const T*>(source.values()) + size_t(from) * head_size, head_size * sizeof(T));
  target.positions()[to] = source.positions()[from];
}
}  // namespace

// Checks the indices and makes all copies of shared pages that will be written; the first token that moves.
int KVCache::prepare_retain(Head& head, const int32_t* kept, int count) {
  for (int i = 0; i < count; ++i)
    if (kept[i] < 0 || kept[i] >= head.tokens || (i && kept[i] <= kept[i - 1]))
      throw std::invalid_argument("retain: indices must ascend and lie inside the head");
  int first = 0;
  while (first < count && kept[first] == first) ++first;
  for (int page = first / kPageTokens; page * kPageTokens < count && first < count; ++page) writable(head, page);
  if (count < head.tokens && count % kPageTokens) writable(head, count / kPageTokens);
  return first;
}

void KVCache::retain(int layer, int kv_head, const int32_t* kept, int count) {
  Head& head = layers_.at(layer).heads.at(kv_head);
  for (int to = prepare_retain(head, kept, count); to < count; ++to) {
    const int from = kept[to];
    Page& target = *head.pages[to / kPageTokens];
    const Page& source = *head.pages[from / kPageTokens];
    if (shape_.storage == Storage::kFloat32)
      copy_token<float>(source, from % kPageTokens, target, to % kPageTokens, shape_.head_size);
    else
      copy_token<uint16_t>(source, from % kPageTokens, target, to % kPageTokens, shape_.head_size);
  }
  truncate(head, count);
  head.committed = head.tokens;
}

void KVCache::retain_layer(int layer, const int32_t* kept, int count) {
  auto& heads = layers_.at(layer).heads;
  for (size_t kv = 0; kv < heads.size(); ++kv) prepare_retain(heads[kv], kept + kv * count, count);
  for (size_t kv = 0; kv < heads.size(); ++kv) retain(layer, int(kv), kept + kv * count, count);
}

int KVCache::tokens(int layer, int kv_head) const { return layers_.at(layer).heads.at(kv_head).tokens; }

namespace {
// A page's tokens as floats [tokens, D], keys out of their channel-major tiles.
template <class T, class Convert>
void copy_page(const Page& page, int tokens, int head_size, Convert convert, float* keys, float* values) {
  const T* from = static_cast<const T*>(page.keys());
  for (int first = 0; first < tokens; first += kTileTokens, from += kTileTokens * head_size)
    for (int t = 0, n = std::min(kTileTokens, tokens - first); t < n; ++t)
      for (int d = 0; d < head_size; ++d)
        keys[size_t(first + t) * head_size + d] = convert(from[d * kTileTokens + t]);
  const T* value = static_cast<const T*>(page.values());
  for (size_t i = 0; i < size_t(tokens) * head_size; ++i) values[i] = convert(value[i]);
}
}  // namespace

void KVCache::read(int layer, int kv_head, bool rotated, float* keys, float* values, int32_t* positions) const {
  const Layer& l = layers_.at(layer);
  const Head& head = l.heads.at(kv_head);
  const int D = shape_.head_size, half = int(l.frequencies.size());
  for (int first = 0; first < head.tokens; first += kPageTokens) {
    const Page& page = *head.pages[first / kPageTokens];
    const int n = std::min(kPageTokens, head.tokens - first);
    std::copy_n(page.positions(), n, positions + first);
    float *to_keys = keys + size_t(first) * D, *to_values = values + size_t(first) * D;
    if (shape_.storage == Storage::kFloat32)
      copy_page<float>(page, n, D, [](float x) { return x; }, to_keys, to_values);
    else
      copy_page<uint16_t>(page, n, D, from_bf16, to_keys, to_values);
  }
  if (rotated) return;
  std::vector<float> rope(2 * half), key(D);
  const float undo = 1.0f / (l.attention_factor * l.attention_factor);
  for (int t = 0; t < head.tokens; ++t) {
    rope_at(positions[t], l.frequencies, l.attention_factor, rope.data());
    for (int i = 0; i < half; ++i) rope[half + i] = -rope[half + i];  // the rotation backwards
    float* to = keys + size_t(t) * D;
    std::copy_n(to, D, key.begin());
    rotate(key.data(), rope.data(), half, D, 1.0f, to);
    for (int i = 0; i < 2 * half; ++i) to[i] *= undo;
  }
}

void KVCache::positions(int layer, int kv_head, int32_t* out) const {
  const Head& head = layers_.at(layer).heads.at(kv_head);
  for (int t = 0; t < head.tokens; ++t) out[t] = head.pages[t / kPageTokens]->positions()[t % kPageTokens];
}

size_t KVCache::bytes() const {
  size_t pages = 0;
  for (const Layer& layer : layers_)
    for (const Head& head : layer.heads) pages += head.pages.size();
  return pages * pool_->page_bytes();
}

namespace {
std::mutex registry_mutex;
std::unordered_map<int64_t, std::shared_ptr<KVCache>>& registry() {
  static std::unordered_map<int64_t, std::shared_ptr<KVCache>> caches;
  return caches;
}
int64_t next_handle = 1;
}  // namespace

int64_t register_cache(std::shared_ptr<KVCache> cache) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry().emplace(next_handle, std::move(cache));
  return next_handle++;
}
void unregister_cache(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry().erase(handle);
}
std::shared_ptr<KVCache> find_cache(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  auto found = registry().find(handle);
  if (found == registry().end()) throw std::invalid_argument("this KV cache is closed");
  return found->second;
}

}  // namespace satchel
