#include "archive.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rotate.h"

namespace satchel {

namespace {
const Codec kHalf{};  // 16 bits

void check_ranks(const ArchiveSettings& s, const std::vector<int>& kv_heads, int head_size) {
  const Codec &codec = s.high, &other = s.low;
  if (codec.key_rank != other.key_rank || codec.value_rank != other.value_rank || codec.key_rank > head_size ||
      codec.value_rank > head_size)
    throw std::invalid_argument("Archive: all blocks have the same ranks, at most the head size");
  const LowRankBasis* basis = s.basis.get();
  if (!basis && codec.value_rank) throw std::invalid_argument("Archive: without a basis only keys can be pruned");
  if (basis && (kv_heads != std::vector<int>(basis->layers, basis->kv_heads) || basis->head_size != head_size ||
                basis->key_rank != codec.key_rank || basis->value_rank != codec.value_rank))
    throw std::invalid_argument("Archive: the basis has other layers, heads or ranks");
}

}  // namespace

Archive::Archive(const ArchiveSettings& settings, const std::vector<int>& kv_heads, int head_size)
    : settings_(settings), head_size_(head_size) {
  if (!settings.high.known() || !settings.low.known()) throw std::invalid_argument("Archive: unknown codec");
  if (!settings.retriever.known()) throw std::invalid_argument("Archive: unknown retriever");
  if (settings.sinks % kBlockTokens || settings.recall_tokens % kBlockTokens || settings.sinks < 0 ||
      settings.recall_tokens < 0 || settings.recall_every < 1)
    throw std::invalid_argument("Archive: sinks and recall_tokens must be multiples of 16");
  if (settings.window < 0 || settings.reach < 0) throw std::invalid_argument("Archive: window and reach must not be negative");
  check_ranks(settings, kv_heads, head_size);
  high_bytes_ = block_bytes(settings.high, head_size);
  low_bytes_ = block_bytes(settings.low, head_size);
  half_bytes_ = block_bytes(kHalf, head_size);
  cell_bytes_ = high_bytes_ + (kCellBlocks - 1) * low_bytes_;
  for (int heads : kv_heads) layers_.emplace_back().heads.resize(heads);
}

const Extent& Archive::extent_of(const Layer& layer, int cell) const {
  auto after = std::upper_bound(layer.extents.begin(), layer.extents.end(), cell,
                                [](int c, const std::shared_ptr<Extent>& e) { return c < e->first_cell; });
  return **(after - 1);
}

size_t Archive::block_at(const Head& h, int block) const {
  const int inside = block % kCellBlocks, high = h.high_of_cell[block / kCellBlocks];
  return inside * low_bytes_ + (high < inside ? high_bytes_ - low_bytes_ : 0);
}

void Archive::calibrate_head(int layer, int kv_head, const Incoming& in, const RopeTable& rope) {
  Head& h = head(layer, kv_head);
  const int D = head_size_, tokens = int(in.keys.size()) / D;
  // The sinks are unlike all other keys: statistics come from what follows, when there is anything.
  const int from = settings_.sinks < tokens ? settings_.sinks : 0;
  const Codec& codec = settings_.low.key_bits < 16 ? settings_.low : settings_.high;
  const float *keys = in.keys.data() + size_t(from) * D, *values = in.values.data() + size_t(from) * D;
  std::shared_ptr<const Projection> of_keys, of_values, of_rest;
  if (settings_.basis) {
    const size_t at = size_t(layer) * layers_[layer].heads.size() + kv_head;
    if (codec.key_rank) of_keys = settings_.basis->keys[at];
    if (codec.value_rank) of_values = settings_.basis->values[at];
    if (codec.rest_numbers(D)) of_rest = settings_.basis->rests[at];
  } else if (codec.key_rank) {
    of_keys = keep_channels(choose_channels(codec.key_rank, D, rope.half(), keys, tokens - from, in.query_energy), D);
  }
  auto statistics =
      std::make_shared<HeadStatistics>(calibrate(codec, D, keys, values, tokens - from, of_keys, of_values, of_rest));
  h.high = {settings_.high, statistics.get(), D};
  h.low = {settings_.low, statistics.get(), D};
  h.half = {kHalf, statistics.get(), D};
  h.statistics = std::move(statistics);
  h.basis = std::make_shared<const DigestBasis>(make_basis(settings_.retriever, D, rope, keys, tokens - from,
                                                           in.query_energy));
}

// Keys [tokens, D] before RoPE to the frame of their page: rotated by their distance from its first position.
void Archive::to_frame(const float* keys, int distance, int tokens, const RopeTable& rope, float* framed) const {
  std::vector<float> row(2 * rope.half());
  for (int t = 0; t < tokens; ++t) {
    rope.at(distance + t, row.data());
    rotate(keys + size_t(t) * head_size_, row.data(), rope.half(), head_size_, 1.0f, framed + size_t(t) * head_size_);
  }
}

// A page's digests, to be written: a new page, or a copy of what a fork shares.
Archive::DigestTile& Archive::own_tile(Head& h, int page) {
  if (page == int(h.tiles.size())) {
    h.tiles.push_back(std::make_shared<DigestTile>());
    h.tiles.back()->data.assign(digest_page_bytes(settings_.retriever, head_size_), 0);
  } else if (h.tiles[page].use_count() > 1) {
    h.tiles[page] = std::make_shared<DigestTile>(*h.tiles[page]);
  }
  return *h.tiles[page];
}

// Whole pages whose blocks are to be clusters: their tokens in that order, which the pages' digests keep. Sinks stay.
Archive::Incoming Archive::group_tokens(Head& h, const Incoming& in, const RopeTable& rope) {
  const size_t D = head_size_, page_values = kDigestTokens * D;
  const int first_page = cells_ / (kDigestBlocks / kCellBlocks), pages = int(in.keys.size() / page_values);
  Incoming out = in;
  std::vector<float> framed(page_values), grouped(page_values);
  for (int i = 0; i < pages; ++i) {
    const int page = first_page + i;
    const float *keys = in.keys.data() + i * page_values, *values = in.values.data() + i * page_values;
    to_frame(keys, 0, kDigestTokens, rope, framed.data());
    DigestTile& tile = own_tile(h, page);
    tile.order.resize(kDigestTokens);
    const int sinks = std::min(std::max(settings_.sinks - page * kDigestTokens, 0), kDigestTokens);
    cluster_page(framed.data(), head_size_, sinks, tile.order.data());
    if (!out.block_scores.empty()) std::fill_n(out.block_scores.begin() + i * kDigestBlocks, kDigestBlocks, 0.0f);
    for (int slot = 0; slot < kDigestTokens; ++slot) {
      const int token = tile.order[slot];
      std::copy_n(keys + token * D, D, out.keys.data() + i * page_values + slot * D);
      std::copy_n(values + token * D, D, out.values.data() + i * page_values + slot * D);
      std::copy_n(framed.data() + token * D, D, grouped.data() + slot * D);
      if (!out.block_scores.empty())  // of the blocks that a cluster's tokens come from, the mean
        out.block_scores[i * kDigestBlocks + slot / kBlockTokens] +=
            in.block_scores[i * kDigestBlocks + token / kBlockTokens] / kBlockTokens;
    }
    write_clusters(*h.basis, head_size_, grouped.data(), tile.data.data());
  }
  return out;
}

void Archive::append_head(Head& h, const Incoming& in, int cells, uint8_t* out, const RopeTable& rope) {
  const int D = head_size_;
  const size_t block_values = size_t(kBlockTokens) * D;
  const bool digests = digest_page_bytes(settings_.retriever, D) && !settings_.retriever.clustered();
  std::vector<float> framed(block_values);
  for (int cell = 0; cell < cells; ++cell) {
    int best = 0;
    if (!in.block_scores.empty()) {
      const float* scores = in.block_scores.data() + size_t(cell) * kCellBlocks;
      best = int(std::max_element(scores, scores + kCellBlocks) - scores);
    }
    h.high_of_cell.push_back(uint8_t(best));
    for (int b = 0; b < kCellBlocks; ++b) {
      const int block = (cells_ + cell) * kCellBlocks + b, inside = block % kDigestBlocks;
      const size_t at = size_t(cell * kCellBlocks + b) * block_values;
      const float *keys = in.keys.data() + at, *values = in.values.data() + at;
      uint8_t* to = out + cell * cell_bytes_ + block_at(h, block);
      encode_block(b == best ? settings_.high : settings_.low, *h.statistics, D, keys, values, to);
      if (!digests) continue;
      to_frame(keys, inside * kBlockTokens, kBlockTokens, rope, framed.data());
      write_digest(settings_.retriever, *h.basis, D, rope.half(), inside, framed.data(),
                   own_tile(h, block / kDigestBlocks).data.data());
    }
  }
}

void Archive::append_layer(int layer_index, const std::vector<Incoming>& heads, int until, const RopeTable& rope,
                           const Parallel& parallel) {
  Layer& layer = layers_[layer_index];
  const int D = head_size_, cells = (until - end_) / kCellTokens;
  if (cells <= 0 || until % step_tokens() || until < settings_.sinks)
    throw std::invalid_argument("Archive: pairs come in whole steps of " + std::to_string(step_tokens()) +
                                " tokens, the first with all sinks");
  auto extent = std::make_shared<Extent>();
  extent->first_cell = cells_;
  extent->cells = extent->row_cells = cells;
  extent->memory.reset(new uint8_t[heads.size() * cells * cell_bytes_]);
  parallel(heads.size(), [&](size_t kv) {
    Head& h = layer.heads[kv];
    const Incoming& in = heads[kv];
    if (!h.statistics) calibrate_head(layer_index, int(kv), in, rope);
    if (end_ == 0) {
      h.sinks.resize(settings_.sinks / kBlockTokens * half_bytes_);
      for (int b = 0; b < settings_.sinks / kBlockTokens; ++b)
        encode_block(kHalf, *h.statistics, D, in.keys.data() + size_t(b) * kBlockTokens * D,
                     in.values.data() + size_t(b) * kBlockTokens * D, h.sinks.data() + b * half_bytes_);
    }
    uint8_t* out = extent->memory.get() + kv * cells * cell_bytes_;
    if (settings_.retriever.clustered())
      append_head(h, group_tokens(h, in, rope), cells, out, rope);
    else
      append_head(h, in, cells, out, rope);
  });
  layer.extents.push_back(std::move(extent));
  spill();
}

void Archive::finish_append(int until) {
  cells_ = until / kCellTokens;
  end_ = until;
  for (Layer& layer : layers_) layer.chosen_at = -1;  // there is more to choose from
}

// Moves extents to the file until memory is below its limit, the oldest first. What the disk has no room for is lost:
// the conversation goes on without it.
void Archive::spill() {
  uint64_t warm = warm_bytes();
  for (size_t index = 0; warm > settings_.warm_limit_bytes; ++index) {
    bool any = false;
    for (Layer& layer : layers_) {
      if (index >= layer.extents.size()) continue;
      any = true;
      Extent& extent = *layer.extents[index];
      if (!extent.memory || warm <= settings_.warm_limit_bytes) continue;
      const size_t bytes = extent.cells * layer.heads.size() * cell_bytes_;
      if (!file_ && !settings_.cold_folder.empty())
        file_ = std::make_shared<FlashFile>(settings_.cold_folder, settings_.cold_limit_bytes);
      const int64_t at = file_ ? file_->append(extent.memory.get(), bytes) : -1;
      if (at >= 0) {
        extent.offset = uint64_t(at);
        extent.file = file_;
      }
      extent.memory.reset();
      warm -= bytes;
    }
    if (!any) break;
  }
}

void Archive::truncate(int until) {
  if (until >= end_) return;
  cells_ = until / step_tokens() * (step_tokens() / kCellTokens);
  if (cells_ * kCellTokens < settings_.sinks) cells_ = 0;
  end_ = cells_ * kCellTokens;
  trim();
}

void Archive::trim() {
  for (Layer& layer : layers_) {
    while (!layer.extents.empty() && layer.extents.back()->first_cell >= cells_) layer.extents.pop_back();
    if (!layer.extents.empty()) {
      std::shared_ptr<Extent>& tail = layer.extents.back();
      if (tail->first_cell + tail->cells > cells_) {  // a part of it stays: the rest of its bytes is passed over
        auto part = std::make_shared<Extent>();
        const int kept = cells_ - tail->first_cell;
        part->first_cell = tail->first_cell;
        part->cells = kept;
        part->row_cells = tail->memory ? kept : tail->row_cells;
        part->file = tail->file;  // from there nothing moves: a document may lie in one extent
        part->offset = tail->offset;
        if (tail->memory) {
          const size_t row = kept * cell_bytes_;
          part->memory.reset(new uint8_t[layer.heads.size() * row]);
          for (size_t kv = 0; kv < layer.heads.size(); ++kv)
            std::memcpy(part->memory.get() + kv * row, tail->memory.get() + tail->place(kv, tail->first_cell, cell_bytes_),
                        row);
        }
        tail = std::move(part);
      }
    }
    for (Head& h : layer.heads) {
      h.high_of_cell.resize(cells_);
      h.tiles.resize(std::min(h.tiles.size(), size_t(pages())));
      h.chosen.clear();
      if (end_ > 0) continue;
      h.sinks.clear();
      h.statistics.reset();  // what comes first next time is measured anew
      h.basis.reset();
    }
  }
  forget_choices();
}

void Archive::forget_choices() {
  for (Layer& layer : layers_) layer.chosen_at = -1;
}

void Archive::fetch(const Layer& layer, const Head& h, int kv_head, int block, uint8_t* out) const {
  const int cell = block / kCellBlocks;
  const Extent& extent = extent_of(layer, cell);
  const uint64_t at = extent.place(size_t(kv_head), cell, cell_bytes_) + block_at(h, block);
  if (extent.memory)
    std::memcpy(out, extent.memory.get() + at, bytes_of(h, block));
  else if (extent.file)
    extent.file->read(out, bytes_of(h, block), extent.offset + at);
  else
    throw std::runtime_error("a block of the KV archive was lost: there was no room for it");
}

void Archive::read(int layer_index, int kv_head, int from, int until, float* keys, float* values) const {
  const Layer& layer = layers_[layer_index];
  const Head& h = layer.heads[kv_head];
  const int D = head_size_;
  std::vector<uint8_t> bytes(std::max({high_bytes_, low_bytes_, half_bytes_}));
  std::vector<float> k(size_t(kBlockTokens) * D), v(size_t(kBlockTokens) * D);
  const int whole = settings_.retriever.clustered() ? kDigestTokens : kBlockTokens;  // tokens may lie anywhere in it
  const int stop = std::min(end_, (until + whole - 1) / whole * whole);
  for (int position = from / whole * whole; position < stop; position += kBlockTokens) {
    const uint8_t* data = bytes.data();
    const BlockFormat* format = &h.half;
    const uint8_t* order = nullptr;
    const int block = position / kBlockTokens, page_at = position / kDigestTokens * kDigestTokens;
    if (position < settings_.sinks) {
      data = h.sinks.data() + block * half_bytes_;
    } else {
      if (extent_of(layer, block / kCellBlocks).lost())
        std::fill(bytes.begin(), bytes.end(), uint8_t(0));
      else
        fetch(layer, h, kv_head, block, bytes.data());
      format = is_high(h, block) ? &h.high : &h.low;
      order = order_of(h, block / kDigestBlocks);
    }
    active_variant().decode_block(*format, data, k.data(), v.data());
    for (int t = 0; t < kBlockTokens; ++t) {
      const int token = order ? page_at + order[position - page_at + t] : position + t;
      if (token < from || token >= until) continue;
      float *to_keys = keys + size_t(token - from) * D, *to_values = values + size_t(token - from) * D;
      for (int d = 0; d < D; ++d) to_keys[d] = k[size_t(d) * kBlockTokens + t];
      std::copy_n(v.data() + size_t(t) * D, D, to_values);
    }
  }
}

int32_t Archive::first_seen(int32_t last) const { return settings_.reach ? std::max(0, last + 1 - settings_.reach) : 0; }

int32_t Archive::seen_position(int page, int32_t last) const {
  const int32_t sinks_at = first_seen(last);
  return std::max(page * kDigestTokens, sinks_at ? sinks_at + settings_.sinks : 0);
}

void Archive::digests(int layer, int kv_head, const std::vector<float>& ropes, int half,
                      std::vector<DigestPage>& out) const {
  const Head& h = head(layer, kv_head);
  out.clear();
  for (int page = 0; page < int(h.tiles.size()); ++page)
    out.push_back({h.tiles[page]->data.data(), ropes.data() + size_t(page) * 2 * half,
                   std::min(kDigestBlocks, blocks() - page * kDigestBlocks)});
}

// The sinks and what is recalled may lie beyond `last` when `reach` is too small for them.
int32_t Archive::seen_until(int32_t last) const {
  return std::max(last + 1, first_seen(last) + settings_.sinks + settings_.recall_tokens + kDigestTokens);
}

std::vector<int32_t> Archive::available(int layer, int first_block) const {
  std::vector<int32_t> found;
  found.reserve(size_t(std::max(0, blocks() - first_block)));
  for (const auto& extent : layers_[layer].extents) {
    if (extent->lost()) continue;
    const int begin = extent->first_cell * kCellBlocks, end = begin + extent->cells * kCellBlocks;
    for (int block = std::max(first_block, begin); block < end; ++block) found.push_back(block);
  }
  return found;
}
bool Archive::lost(int cell) const {
  return std::any_of(layers_.begin(), layers_.end(), [&](const Layer& layer) { return extent_of(layer, cell).lost(); });
}

void Archive::expect(int layer_index) const {
  if (!(file_ && file_->slow()) && !(snapshot_ && snapshot_->slow())) return;
  const Layer& layer = layers_[layer_index];
  for (size_t kv = 0; kv < layer.heads.size(); ++kv)
    for (int32_t block : layer.heads[kv].chosen) {
      if (block / kCellBlocks >= cells_) continue;
      const int cell = block / kCellBlocks;
      const Extent& extent = extent_of(layer, cell);
      if (extent.file)
        extent.file->expect(extent.offset + extent.place(kv, cell, cell_bytes_), cell_bytes_);
    }
}

void Archive::sink_blocks(int layer, int kv_head, int32_t last, const std::vector<int32_t>& hot_positions,
                          std::vector<StoredBlock>& out) const {
  const Head& h = head(layer, kv_head);
  for (int at = 0; at < settings_.sinks; at += kBlockTokens) {
    uint16_t hidden = 0;
    for (int t = 0; t < kBlockTokens && !hot_positions.empty(); ++t)
      if (std::binary_search(hot_positions.begin(), hot_positions.end(), at + t)) hidden |= uint16_t(1) << t;
    out.push_back({h.sinks.data() + at / kBlockTokens * half_bytes_, &h.half, first_seen(last) + at, hidden, nullptr});
  }
}

void Archive::recalled_blocks(int layer_index, int kv_head, int32_t last, const std::vector<int32_t>& chosen, size_t from,
                              size_t to, const std::vector<int32_t>& hot_positions, std::vector<uint8_t>& bytes,
                              std::vector<StoredBlock>& out) const {
  const Layer& layer = layers_[layer_index];
  const Head& h = layer.heads[kv_head];
  size_t read_bytes = 0;
  for (size_t i = from; i < to; ++i)
    if (extent_of(layer, chosen[i] / kCellBlocks).file) read_bytes += bytes_of(h, chosen[i]);
  bytes.resize(read_bytes);
  uint8_t* read_to = bytes.data();
  int32_t next = first_seen(last) + settings_.sinks;
  for (size_t i = 0; i < to; ++i) {
    const int block = chosen[i], cell = block / kCellBlocks, page = block / kDigestBlocks, position = block * kBlockTokens;
    const uint8_t* order = order_of(h, page);
    next = std::max(next, position);
    // Tokens of a cluster keep their distances: pages beyond reach lie over one another.
    const int32_t seen = order ? seen_position(page, last) : next;
    next += kBlockTokens;
    const Extent& extent = extent_of(layer, cell);
    if (i < from || extent.lost()) continue;
    if (order) order += block % kDigestBlocks * kBlockTokens;
    uint16_t hidden = 0;
    for (int t = 0; t < kBlockTokens && !hot_positions.empty(); ++t) {
      const int32_t token = order ? page * kDigestTokens + order[t] : position + t;
      if (std::binary_search(hot_positions.begin(), hot_positions.end(), token)) hidden |= uint16_t(1) << t;
    }
    const uint8_t* data = read_to;
    if (extent.memory) {
      data = extent.memory.get() + extent.place(size_t(kv_head), cell, cell_bytes_) + block_at(h, block);
    } else {
      fetch(layer, h, kv_head, block, read_to);
      read_to += bytes_of(h, block);
    }
    out.push_back({data, is_high(h, block) ? &h.high : &h.low, seen, hidden, order});
  }
}

size_t Archive::sink_bytes() const {
  size_t bytes = 0;
  for (const Layer& layer : layers_)
    for (const Head& h : layer.heads) bytes += h.sinks.size();
  return bytes;
}
size_t Archive::digest_bytes() const {
  size_t bytes = 0;
  for (const Layer& layer : layers_)
    for (const Head& h : layer.heads)
      for (const auto& tile : h.tiles) bytes += tile->data.size() + tile->order.size();
  return bytes;
}
// Of the extents that count.
template <class Counts>
uint64_t Archive::bytes_where(Counts counts) const {
  uint64_t bytes = 0;
  for (const Layer& layer : layers_)
    for (const auto& extent : layer.extents)
      if (counts(*extent)) bytes += extent->cells * layer.heads.size() * cell_bytes_;
  return bytes;
}
uint64_t Archive::warm_bytes() const {
  return bytes_where([](const Extent& extent) { return bool(extent.memory); });
}
uint64_t Archive::cold_bytes() const {
  return bytes_where([](const Extent& extent) { return bool(extent.file); });
}
uint64_t Archive::lost_tokens() const {
  uint64_t most = 0;
  for (const Layer& layer : layers_) {
    uint64_t cells = 0;
    for (const auto& extent : layer.extents) cells += extent->lost() ? extent->cells : 0;
    most = std::max(most, cells * kCellTokens);
  }
  return most;
}

}  // namespace satchel
