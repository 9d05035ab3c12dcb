#include "state.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace satchel {

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "blobs are little-endian, and written as they lie in memory"
#endif

namespace {

constexpr uint32_t kVersion = 2;           // 2: codes of four bits in digests of channels
constexpr uint32_t kRaggedVersion = 3;     // the heads of the layer hold different numbers of tokens; no archive
constexpr uint32_t kLowRankArchive = 2;    // in the place of the 1 that says that there is an archive
constexpr uint32_t kPruned = 2, kProjected = 3;  // how: to channels that the blob has, or pairs by the settings' basis
constexpr uint32_t kRetentionVersions = 2;  // more than these two, in caches with retention scores
constexpr uint32_t kStreamingVersion = 6;  // some heads of the layer stream; 7 with retention scores

[[noreturn]] void damaged(const std::string& what) {
  throw std::invalid_argument("a saved KV cache does not fit or is damaged: " + what);
}

size_t side_bytes(const CacheShape& s) { return size_t(kPageTokens) * s.head_size * element_bytes(s.storage); }

// Zeros in the slots that hold no token: what was forgotten is not saved, and no NaN comes in.
void clear_unused(const CacheShape& s, int tokens, uint8_t* keys, uint8_t* values) {
  const size_t element = element_bytes(s.storage), D = size_t(s.head_size);
  for (int slot = tokens; slot < kPageTokens; ++slot)
    for (size_t d = 0; d < D; ++d)
      std::memset(keys + (size_t(slot / 16) * 16 * D + d * 16 + slot % 16) * element, 0, element);
  std::memset(values + tokens * D * element, 0, (kPageTokens - tokens) * D * element);
}

// The settings that the bytes of an archive depend on.
struct ArchiveNumbers {
  int32_t numbers[13];
};
ArchiveNumbers numbers_of(const ArchiveSettings& s) {
  ArchiveNumbers n{};
  int at = 0;
  for (const Codec* c : {&s.high, &s.low})
    for (int number : {c->key_bits, c->value_bits, int(c->nonuniform), c->outliers, int(c->grouped)})
      n.numbers[at++] = number;
  n.numbers[at++] = int(s.retriever.digest);
  n.numbers[at++] = s.retriever.channels;
  n.numbers[at] = s.sinks;
  return n;
}
struct RankNumbers {  // only of archives of low rank
  uint32_t numbers[3];
};
RankNumbers ranks_of(const ArchiveSettings& s) {
  return {{s.basis ? kProjected : kPruned, uint32_t(s.low.key_rank), uint32_t(s.low.value_rank)}};
}
uint32_t archive_mark(const ArchiveSettings& s) { return s.low.low_rank() ? kLowRankArchive : 1; }

}  // namespace

// Counts bytes, and writes them when there is a place to.
class CacheState::Writer {
 public:
  explicit Writer(uint8_t* to) : to_(to) {}
  void put(const void* data, size_t bytes) {
    if (to_ && bytes) std::memcpy(to_ + size_, data, bytes);
    size_ += bytes;
  }
  void number(uint32_t x) { put(&x, sizeof x); }
  template <class T>
  void array(const std::vector<T>& v) { put(v.data(), v.size() * sizeof(T)); }
  void pad() { size_t rest = -size_ % 4; put("\0\0\0", rest); }
  uint8_t* reserve(size_t bytes) {  // null when only counting
    uint8_t* at = to_ ? to_ + size_ : nullptr;
    size_ += bytes;
    return at;
  }
  size_t size() const { return size_; }

 private:
  uint8_t* to_;
  size_t size_ = 0;
};

class CacheState::Reader {
 public:
  Reader(const uint8_t* data, size_t bytes) : data_(data), bytes_(bytes) {}
  const uint8_t* take(uint64_t bytes) {
    if (bytes > bytes_ - at_) damaged("it is cut short");
    at_ += size_t(bytes);
    return data_ + at_ - bytes;
  }
  uint32_t number() {
    uint32_t x;
    std::memcpy(&x, take(sizeof x), sizeof x);
    return x;
  }
  template <class T>
  std::vector<T> array(uint64_t count) {  // of 4-byte numbers, fewer than 2^61
    const uint8_t* from = take(count * sizeof(T));
    std::vector<T> v(static_cast<size_t>(count));
    if (count) std::memcpy(v.data(), from, size_t(count) * sizeof(T));
    return v;
  }
  // Positions or indices that ascend, all in [least, end).
  std::vector<int32_t> ascending(uint64_t count, int64_t least, int64_t end, const char* what) {
    std::vector<int32_t> v = array<int32_t>(count);
    for (int32_t x : v) {
      if (x < least || x >= end) damaged(std::string(what) + " are out of order or range");
      least = int64_t(x) + 1;
    }
    return v;
  }
  std::vector<float> finite(uint64_t count, const char* what) {
    std::vector<float> v = array<float>(count);
    for (float x : v)
      if (!std::isfinite(x)) damaged(std::string(what) + " are no numbers");
    return v;
  }
  void skip_pad() {
    for (; at_ % 4; ++at_)
      if (at_ >= bytes_ || data_[at_]) damaged("its padding");
  }
  void end() const {
    if (at_ != bytes_) damaged("it has bytes left over");
  }

 private:
  const uint8_t* data_;
  size_t bytes_, at_ = 0;
};

// --- Saving ----------------------------------------------------------------------------------------------------------

size_t CacheState::layer_bytes(const KVCache& cache, int layer) {
  Writer count(nullptr);
  write_layer(cache, layer, count);
  return count.size();
}

void CacheState::save_layer(const KVCache& cache, int layer, uint8_t* out) {
  Writer writer(out);
  write_layer(cache, layer, writer);
}

void CacheState::write_layer(const KVCache& cache, int layer_index, Writer& w) {
  const CacheShape& s = cache.shape_;
  const KVCache::Layer& layer = cache.layers_.at(layer_index);
  int most = 0;
  bool ragged = false;
  for (const KVCache::Head& head : layer.heads) {
    if (head.tokens != head.committed || layer.observing)
      throw std::invalid_argument("commit or roll back the last run before the KV cache is saved");
    ragged |= head.tokens != layer.heads[0].tokens;
    most = std::max(most, head.tokens);
  }
  const int index = cache.archive_index_[layer_index];
  const bool streams = s.any_streams(layer_index);
  if (ragged && index >= 0 && !streams)
    throw std::invalid_argument("the heads of a layer that is saved must hold equally many tokens");
  const Archive* archive = index >= 0 ? cache.archive_.get() : nullptr;
  const Archive::Layer* archived = archive ? &archive->layers_[index] : nullptr;
  const bool chosen = archived && archived->chosen_at >= 0;
  if (streams)
    w.number(kStreamingVersion + s.retention);
  else
    w.number((ragged ? kRaggedVersion : kVersion) + (s.retention ? kRetentionVersions : 0));
  for (int number : {s.heads, s.kv_heads, s.head_size, int(s.storage), most,
                     int(layer.observed_positions.size()), int(layer.frequencies.size())})
    w.number(uint32_t(number));
  w.put(&layer.attention_factor, sizeof(float));
  w.number(archive ? archive_mark(archive->settings_) : 0);
  if (archive) {
    const ArchiveNumbers settings = numbers_of(archive->settings_);
    w.put(&settings, sizeof settings);
    const RankNumbers ranks = ranks_of(archive->settings_);
    if (archive->settings_.low.low_rank()) w.put(&ranks, sizeof ranks);
    w.number(uint32_t(archive->end_));
    w.number(archived->heads[0].statistics ? 1 : 0);
    w.number(chosen ? uint32_t(archived->chosen_at) : UINT32_MAX);
  }
  if (ragged || streams)
    for (const KVCache::Head& head : layer.heads) w.number(uint32_t(head.tokens));
  if (streams) {
    for (int number : {s.streaming.sinks, s.streaming.window, int(s.streaming.compensated)}) w.number(uint32_t(number));
    for (int kv = 0; kv < s.kv_heads; ++kv) w.number(s.streams(layer_index, kv));
  }
  w.array(layer.frequencies);
  w.array(layer.observed_positions);
  w.array(layer.observed);
  for (size_t kv = 0; kv < layer.heads.size(); ++kv) {
    write_pages(cache, layer.heads[kv], w);
    if (s.streaming.compensated && s.streams(layer_index, int(kv))) {
      const auto& dropped = layer.heads[kv].dropped;
      w.number(dropped ? uint32_t(dropped->tokens) : 0);
      if (dropped) w.array(dropped->sums);
    }
    const int row = cache.archive_row(layer_index, int(kv));
    if (row >= 0 && archived->heads[row].statistics) write_head(*archive, archived->heads[row], chosen, w);
  }
}

void CacheState::write_pages(const KVCache& cache, const KVCache::Head& head, Writer& w) {
  const size_t side = side_bytes(cache.shape_);
  for (size_t p = 0; p < head.pages.size(); ++p)
    w.put(head.pages[p]->positions(), std::min(kPageTokens, head.tokens - int(p) * kPageTokens) * sizeof(int32_t));
  for (size_t p = 0; p < head.pages.size(); ++p) {
    const int tokens = std::min(kPageTokens, head.tokens - int(p) * kPageTokens);
    uint8_t* to = w.reserve(2 * side);
    if (!to) continue;
    std::memcpy(to, head.pages[p]->keys(), side);
    std::memcpy(to + side, head.pages[p]->values(), side);
    clear_unused(cache.shape_, tokens, to, to + side);
  }
  for (size_t p = 0; p < head.pages.size() && cache.shape_.retention; ++p)
    w.put(head.pages[p]->retention(), std::min(kPageTokens, head.tokens - int(p) * kPageTokens) * sizeof(float));
}

void CacheState::write_head(const Archive& archive, const Archive::Head& h, bool chosen, Writer& w) {
  const HeadStatistics& s = *h.statistics;
  for (const auto* values : {&s.key_center, &s.key_spread, &s.value_center, &s.value_spread}) w.array(*values);
  for (const auto* values : {&s.key_mean, &s.value_mean}) w.array(*values);
  if (s.key_projection) w.array(s.key_projection->channels);
  for (const auto* values : {&s.key_levels, &s.value_levels, &h.basis->center}) {
    w.number(uint32_t(values->size()));
    w.array(*values);
  }
  w.number(uint32_t(h.basis->pairs.size()));
  w.array(h.basis->pairs);
  if (archive.end_) {
    w.array(h.sinks);
    w.array(h.high_of_cell);
    w.pad();
    for (const auto& tile : h.tiles) {
      w.array(tile->data);
      w.array(tile->order);
    }
  }
  w.number(chosen ? uint32_t(h.chosen.size()) : 0);
  if (chosen) w.array(h.chosen);
}

uint64_t CacheState::payload_bytes(const KVCache& cache, int layer) {
  const int index = cache.archive_index_.at(layer);
  if (index < 0) return 0;
  const Archive& a = *cache.archive_;
  uint64_t cells = 0;
  for (const auto& extent : a.layers_[index].extents) {
    if (extent->lost())
      throw std::runtime_error("a KV cache that has lost pairs, for want of memory and disk, cannot be saved");
    cells += extent->cells;
  }
  return cells * a.layers_[index].heads.size() * a.cell_bytes_;
}

void CacheState::read_payload(const KVCache& cache, int layer, int row, int first_cell, int cells, uint8_t* out) {
  if (!payload_bytes(cache, layer)) return;  // which throws when something was lost
  const Archive& a = *cache.archive_;
  for (const auto& extent : a.layers_[cache.archive_index_[layer]].extents) {
    const int first = std::max(first_cell, extent->first_cell);
    const int end = std::min(first_cell + cells, extent->first_cell + extent->cells);
    if (first >= end) continue;
    const uint64_t at = extent->place(size_t(row), first, a.cell_bytes_);
    const size_t bytes = size_t(end - first) * a.cell_bytes_;
    uint8_t* to = out + size_t(first - first_cell) * a.cell_bytes_;
    if (extent->memory)
      std::memcpy(to, extent->memory.get() + at, bytes);
    else
      extent->file->read(to, bytes, extent->offset + at);
  }
}

// --- Restoring -------------------------------------------------------------------------------------------------------

struct CacheState::Counts {
  std::vector<int> tokens;  // of each KV head
  int observed, half, chosen_at;
  float attention_factor;
  bool calibrated;
};

CacheState::CacheState(const CacheShape& shape, int tokens, std::shared_ptr<FlashFile> file)
    : tokens_(tokens), file_(std::move(file)), cache_(std::make_shared<KVCache>(shape)) {
  if (tokens < 0 || tokens == INT_MAX) throw std::invalid_argument("a KV cache cannot hold so many tokens");
}

CacheState::Counts CacheState::read_counts(Reader& r) {
  const CacheShape& s = cache_->shape_;
  uint32_t version = r.number();
  if (version < kVersion || version > kStreamingVersion + 1) damaged("another version wrote it");
  const bool streams = version >= kStreamingVersion;
  if (streams != s.any_streams(next_layer_)) damaged("it has streaming heads where none are, or the reverse");
  if (s.retention != (version == kStreamingVersion + 1 || (!streams && version > kRaggedVersion)))
    damaged("it has retention scores where none are kept, or the reverse");
  if (s.retention && !streams) version -= kRetentionVersions;
  for (int expected : {s.heads, s.kv_heads, s.head_size, int(s.storage)})
    if (r.number() != uint32_t(expected)) damaged("it is of another model or storage");
  Counts c{};
  const uint32_t tokens = r.number(), observed = r.number(), half = r.number();
  if (tokens > uint32_t(tokens_)) damaged("more hot tokens than the conversation has");
  if (observed > uint32_t(std::max(s.observed_queries, 0))) damaged("more observed queries than are kept");
  if (half > uint32_t(s.head_size / 2)) damaged("more frequencies than a head has");
  c.tokens.assign(s.kv_heads, int(tokens));
  c.observed = int(observed);
  c.half = int(half);
  c.attention_factor = r.finite(1, "attention factors")[0];
  c.chosen_at = -1;
  const uint32_t archives = r.number();
  const int index = cache_->archive_index_[next_layer_];
  if (archives != (index >= 0 ? archive_mark(cache_->archive_->settings_) : 0u))
    damaged("it has an archive where none is set, or one of low rank, or the reverse");
  if (archives) read_archive_counts(r, index, c);
  if (version == kRaggedVersion || streams) {
    const bool differ = read_head_tokens(r, c.tokens);
    if (!streams && (archives || !differ)) damaged("its heads' tokens are not as they are written");
  }
  if (streams) read_streaming(r);
  return c;
}

void CacheState::read_archive_counts(Reader& r, int index, Counts& c) {
  const ArchiveNumbers expected = numbers_of(cache_->archive_->settings_);
  if (std::memcmp(r.take(sizeof expected), &expected, sizeof expected)) damaged("its archive has other settings");
  const RankNumbers ranks = ranks_of(cache_->archive_->settings_);
  if (archive_mark(cache_->archive_->settings_) == kLowRankArchive && std::memcmp(r.take(sizeof ranks), &ranks, sizeof ranks))
    damaged("its archive has other ranks");
  const uint32_t end = r.number(), calibrated = r.number(), chosen_at = r.number();
  if (end > uint32_t(tokens_) || end % uint32_t(cache_->archive_->step_tokens()) || (end && end < uint32_t(cache_->archive_->settings_.sinks)))
    damaged("its archive ends at no such position");
  if (index > 0 && int(end) != archived_until_) damaged("the layers' archives differ in length");
  if (calibrated > 1 || (end && !calibrated)) damaged("its archive has no statistics");
  if (chosen_at != UINT32_MAX && (chosen_at >= uint32_t(tokens_) || !end)) damaged("blocks were chosen at no such position");
  archived_until_ = int(end);
  c.calibrated = calibrated;
  c.chosen_at = int32_t(chosen_at);
}

// The tokens [kv_heads] of each head; `tokens` comes with the most of them. Whether they differ.
bool CacheState::read_head_tokens(Reader& r, std::vector<int>& tokens) {
  const uint32_t most = uint32_t(tokens[0]);
  uint32_t found = 0;
  bool differ = false;
  for (int& count : tokens) {
    const uint32_t number = r.number();
    if (number > most) damaged("a head holds more tokens than the layer");
    found = std::max(found, number);
    count = int(number);
    differ |= count != tokens[0];
  }
  if (found != most) damaged("its heads' tokens are not as they are written");
  return differ;
}

// Which heads stream, and how: as this cache's do.
void CacheState::read_streaming(Reader& r) const {
  const CacheShape& s = cache_->shape_;
  for (int expected : {s.streaming.sinks, s.streaming.window, int(s.streaming.compensated)})
    if (r.number() != uint32_t(expected)) damaged("its streaming heads hold more or less");
  for (int kv = 0; kv < s.kv_heads; ++kv)
    if (r.number() != uint32_t(s.streams(next_layer_, kv))) damaged("other heads of it stream");
}

void CacheState::restore_layer(const uint8_t* blob, size_t bytes, uint64_t payload_offset) {
  const CacheShape& s = cache_->shape_;
  if (next_layer_ >= s.layers) damaged("there are more layers than the model has");
  Reader r(blob, bytes);
  const Counts c = read_counts(r);
  KVCache::Layer& layer = cache_->layers_[next_layer_];
  layer.attention_factor = c.attention_factor;
  layer.frequencies = r.finite(uint64_t(c.half), "frequencies");
  layer.observed_positions = r.ascending(uint64_t(c.observed), 0, tokens_, "observed positions");
  layer.observed = r.array<float>(uint64_t(c.observed) * s.heads * s.head_size);
  const int index = cache_->archive_index_[next_layer_];
  for (int kv = 0; kv < s.kv_heads; ++kv) {
    read_pages(layer, kv, c, r);
    const int row = cache_->archive_row(next_layer_, kv);
    if (c.calibrated && row >= 0) read_head(cache_->archive_->head(index, row), size_t(index) * s.kv_heads + row, c, r);
  }
  r.end();
  if (index >= 0) cache_->archive_->layers_[index].chosen_at = c.chosen_at;
  if (index >= 0 && archived_until_) place_payload(index, payload_offset);
  ++next_layer_;
}

// What is neither archived nor out of a window is hot, and so are a streaming head's sinks.
void CacheState::expect_recent(int kv_head, const std::vector<int32_t>& positions) const {
  const CacheShape& s = cache_->shape_;
  const int window = s.window(next_layer_, kv_head), all = int(positions.size());
  const int from = window ? std::max(0, tokens_ - window + 1) : archived_until_;  // what the next query sees
  const auto first = std::lower_bound(positions.begin(), positions.end(), from);
  if (positions.end() - first != tokens_ - from)
    damaged(window ? "tokens are missing in a layer's window" : "tokens are missing after the archive");
  if (!s.streams(next_layer_, kv_head)) return;
  const int sinks = std::min(s.streaming.sinks, tokens_);
  if (all < sinks || (sinks && positions[sinks - 1] != sinks - 1)) damaged("a streaming head's sinks are missing");
  // Behind them whole pages were dropped at one place, or none: with those that are held, each lies where it was read.
  const int dropped = tokens_ - all;
  if (dropped % kPageTokens || (dropped && (all == sinks || positions[sinks] != sinks + dropped)))
    damaged("a streaming head's tokens are not in pages");
}

void CacheState::read_pages(KVCache::Layer& layer, int kv_head, const Counts& c, Reader& r) {
  const CacheShape& s = cache_->shape_;
  KVCache::Head& head = layer.heads[kv_head];
  const size_t side = side_bytes(s);
  const int all = c.tokens[kv_head];
  const std::vector<int32_t> positions = r.ascending(uint64_t(all), 0, tokens_, "positions");
  const bool streams = s.streams(next_layer_, kv_head);
  if (cache_->archive_ || streams) expect_recent(kv_head, positions);
  if (s.window(next_layer_)) layer.trimmed_until = std::max(layer.trimmed_until, all ? positions[0] : tokens_);
  if (streams && all < tokens_) layer.trimmed_until = std::max(layer.trimmed_until, s.streaming.sinks + tokens_ - all);
  for (int at = 0; at < all; at += kPageTokens) {
    const int tokens = std::min(kPageTokens, all - at);
    const uint8_t* from = r.take(2 * side);
    auto page = std::make_shared<Page>(cache_->pool_, s.head_size, s.storage);
    std::memcpy(page->keys(), from, side);
    std::memcpy(page->values(), from + side, side);
    clear_unused(s, tokens, static_cast<uint8_t*>(page->keys()), static_cast<uint8_t*>(page->values()));
    std::copy_n(positions.begin() + at, tokens, page->positions());
    head.pages.push_back(std::move(page));
  }
  if (s.retention) {
    const std::vector<float> scores = r.finite(uint64_t(all), "retention scores");
    for (int t = 0; t < all; ++t) head.pages[t / kPageTokens]->retention()[t % kPageTokens] = scores[t];
  }
  head.tokens = head.committed = all;
  if (streams && s.streaming.compensated) read_dropped(head, tokens_ - all, r);
}

// The sums of the pairs that a streaming head no longer holds: of all of them.
void CacheState::read_dropped(KVCache::Head& head, int tokens, Reader& r) const {
  if (r.number() != uint32_t(tokens)) damaged("the mean of what a streaming head has dropped is of other tokens");
  if (!tokens) return;
  auto dropped = std::make_shared<KVCache::Dropped>(cache_->shape_.head_size);
  dropped->tokens = tokens;
  const uint8_t* from = r.take(dropped->sums.size() * sizeof(double));
  std::memcpy(dropped->sums.data(), from, dropped->sums.size() * sizeof(double));
  for (double x : dropped->sums)
    if (!std::isfinite(x)) damaged("the mean of what a streaming head has dropped is no number");
  head.dropped = std::move(dropped);
}

// Center, spread and mean of a head's numbers, and what makes its coefficients.
void CacheState::read_sides(size_t head, HeadStatistics& s, Reader& r) const {
  const ArchiveSettings& settings = cache_->archive_->settings_;
  const Codec& codec = settings.low;
  const int D = cache_->archive_->head_size_;
  for (auto* values : {&s.key_center, &s.key_spread}) *values = r.array<float>(padded_numbers(codec.key_numbers(D)));
  for (auto* values : {&s.value_center, &s.value_spread})
    *values = r.array<float>(padded_numbers(codec.value_numbers(D)));
  if (codec.key_rank) s.key_mean = r.array<float>(D);
  if (codec.value_rank) s.value_mean = r.array<float>(D);
  if (codec.key_rank)
    s.key_projection = settings.basis ? settings.basis->keys[head]
                                      : keep_channels(r.ascending(codec.key_rank, 0, D, "channels"), D);
  if (codec.value_rank) s.value_projection = settings.basis->values[head];
  if (codec.rest_numbers(D)) s.rest_projection = settings.basis->rests[head];
}

void CacheState::read_statistics(Archive::Head& h, size_t head, Reader& r) {
  const Archive& archive = *cache_->archive_;
  const ArchiveSettings& settings = archive.settings_;
  const uint64_t D = uint64_t(archive.head_size_);
  auto statistics = std::make_shared<HeadStatistics>();
  read_sides(head, *statistics, r);
  for (auto* values : {&statistics->key_levels, &statistics->value_levels}) *values = r.array<float>(r.number());
  if (!statistics->fit(settings.high, int(D)) || !statistics->fit(settings.low, int(D)))
    damaged("its statistics are not of this codec");
  h.high = {settings.high, statistics.get(), int(D)};
  h.low = {settings.low, statistics.get(), int(D)};
  h.half = {Codec{}, statistics.get(), int(D)};
  h.statistics = std::move(statistics);
  auto basis = std::make_shared<DigestBasis>();
  basis->center = r.array<float>(r.number());
  const Digest digest = settings.retriever.digest;
  if (basis->center.size() != (digest == Digest::kNone ? 0 : D * kDigestBlocks))
    damaged("its digests are of another kind");
  const uint32_t pairs = r.number();
  if (pairs != (digest == Digest::kChannels ? uint32_t(settings.retriever.pairs_of(int(D))) : 0))
    damaged("its digests are of another kind");
  basis->pairs = r.ascending(pairs, 0, int64_t(D / 2), "channels");
  h.basis = std::move(basis);
}

// Which token lies in each slot of a page: every one once, and the sinks in their places.
std::vector<uint8_t> CacheState::read_order(int sinks, Reader& r) {
  const uint8_t* from = r.take(kDigestTokens);
  std::vector<bool> seen(kDigestTokens);
  for (int slot = 0; slot < kDigestTokens; ++slot) {
    if (seen[from[slot]] || (slot < sinks && from[slot] != slot)) damaged("a page's tokens are not in any order");
    seen[from[slot]] = true;
  }
  return {from, from + kDigestTokens};
}

void CacheState::read_head(Archive::Head& h, size_t head, const Counts& c, Reader& r) {
  const Archive& archive = *cache_->archive_;
  const int cells = archived_until_ / kCellTokens, blocks = cells * kCellBlocks;
  const int sink_blocks = archive.settings_.sinks / kBlockTokens;
  read_statistics(h, head, r);
  if (cells) {
    const size_t sinks = size_t(sink_blocks) * archive.half_bytes_;
    const uint8_t* from = r.take(sinks);
    h.sinks.assign(from, from + sinks);
    from = r.take(uint64_t(cells));
    h.high_of_cell.assign(from, from + cells);
    for (uint8_t high : h.high_of_cell)
      if (high >= kCellBlocks) damaged("a cell has no such block");
    r.skip_pad();
    const size_t digest = digest_page_bytes(archive.settings_.retriever, archive.head_size_);
    for (int block = 0; digest && block < blocks; block += kDigestBlocks) {
      from = r.take(digest);
      h.tiles.push_back(std::make_shared<Archive::DigestTile>());
      h.tiles.back()->data.assign(from, from + digest);
      if (archive.settings_.retriever.clustered())
        h.tiles.back()->order = read_order(archive.settings_.sinks - block * kBlockTokens, r);
    }
  }
  const uint32_t recalled = r.number();
  if (recalled && c.chosen_at < 0) damaged("blocks are recalled that nobody has chosen");
  h.chosen = r.ascending(recalled, sink_blocks, blocks, "recalled blocks");
}

// The whole archive of a layer is one extent: in memory while the limit allows, otherwise where it lies in the file.
void CacheState::place_payload(int index, uint64_t offset) {
  Archive& archive = *cache_->archive_;
  const int cells = archived_until_ / kCellTokens;
  const uint64_t bytes = uint64_t(cells) * archive.layers_[index].heads.size() * archive.cell_bytes_;
  if (!file_ || offset > file_->bytes() || bytes > file_->bytes() - offset) damaged("its payload is not in the file");
  auto extent = std::make_shared<Extent>();
  extent->first_cell = 0;
  extent->cells = extent->row_cells = cells;
  if (bytes <= archive.settings_.warm_limit_bytes && archive.warm_bytes() <= archive.settings_.warm_limit_bytes - bytes) {
    extent->memory.reset(new uint8_t[size_t(bytes)]);
    file_->read(extent->memory.get(), size_t(bytes), offset);
  } else {
    extent->file = archive.snapshot_ = file_;
    extent->offset = offset;
  }
  archive.layers_[index].extents.push_back(std::move(extent));
}

std::shared_ptr<KVCache> CacheState::finish() {
  if (next_layer_ != cache_->shape_.layers) damaged("layers are missing");
  if (cache_->archive_) {
    cache_->archive_->end_ = archived_until_;
    cache_->archive_->cells_ = archived_until_ / kCellTokens;
  }
  return std::move(cache_);
}

}  // namespace satchel
