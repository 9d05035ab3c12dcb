// Scores queries against digests and counts the votes of their softmax: included by variant.cc only.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention_kernel.h"
#include "retriever.h"
#include "simd.h"
#include "variant.h"

namespace satchel {
namespace {

constexpr int kScoreRows = 32;  // query rows that are turned into a page's frame together: a choice has 28 in qwen
constexpr int kPageTiles = kPageTokens / kTile;

// Queries turned back by the rotation of the page: what they see in the page's frame.
inline void turn_back(const float* x, const float* rope, int half, int head_size, float* out) {
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Float a = load(x + i), b = load(x + half + i), c = load(rope + i), s = load(rope + half + i);
    store(out + i, a * c + b * s);
    store(out + half + i, b * c - a * s);
  }
  for (; i < half; ++i) {
    out[i] = x[i] * rope[i] + x[half + i] * rope[half + i];
    out[half + i] = x[half + i] * rope[i] - x[i] * rope[half + i];
  }
  for (i = 2 * half; i < head_size; ++i) out[i] = x[i];
}

typedef int8_t Codes __attribute__((vector_size(kLanes)));
typedef uint8_t UnsignedCodes __attribute__((vector_size(kLanes)));

inline Float load_digest(const int8_t* p) {
  Codes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return to_float(__builtin_convertvector(bytes, Int));
}
inline Float load_digest(const uint8_t* p) {
  UnsignedCodes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return to_float(__builtin_convertvector(bytes, Int));
}

// One page and the query rows that are scored against it; buffers for at most kScoreRows of them.
struct PageScore {
  const ScoreTask& task;
  const uint8_t* data;
  const float* queries;  // [rows, D] in the page's frame
  int rows;
  float* tile;   // [2 * D][16]
  float* other;  // [rows, 2 * D]
  float* tokens;  // [16 / kPageTiles][kScoreRows, kPageTokens]: kChannels only
  float* out;    // [rows, kPageTokens], of which the first 16 are the blocks' logits
};

// out[rows][16] = queries[rows, size] . tile[size][16]
inline void dot_tile(const float* queries, int rows, int size, const float* tile, float* out) {
  constexpr auto sequence = std::make_integer_sequence<int, kRows>();
  for (int r = 0; r < rows; r += kRows)
    row_kernels<float>(std::min(kRows, rows - r), sequence).dot(queries + size_t(r) * size, size, tile, out + r * kPageTokens);
}

inline void score_means(const PageScore& s) {
  const int D = s.task.head_size;
  const auto* codes = reinterpret_cast<const int8_t*>(s.data);
  float scales[kDigestBlocks];
  std::memcpy(scales, s.data + size_t(D) * kDigestBlocks, sizeof scales);
  for (int i = 0; i < D * kDigestBlocks; i += kLanes)
    store(s.tile + i, load_digest(codes + i) * load(scales + i % kDigestBlocks) + load(s.task.basis->center.data() + i));
  dot_tile(s.queries, s.rows, D, s.tile, s.out);
}

inline void score_clusters(const PageScore& s) {
  const int D = s.task.head_size;
  const auto* codes = reinterpret_cast<const int8_t*>(s.data);
  float offsets[kMaxHeadSize], scales[kMaxHeadSize];
  for (int d = 0; d < D; d += kLanes) {
    uint16_t halves[2 * kLanes];
    std::memcpy(halves, s.data + size_t(D) * kDigestBlocks + d * sizeof(uint16_t), kLanes * sizeof(uint16_t));
    std::memcpy(halves + kLanes, s.data + size_t(D) * kDigestBlocks + (D + d) * sizeof(uint16_t),
                kLanes * sizeof(uint16_t));
    store(offsets + d, load_half(halves));
    store(scales + d, load_half(halves + kLanes));
  }
  for (int d = 0; d < D; ++d) {
    const float offset = offsets[d] + s.task.basis->center[size_t(d) * kDigestBlocks];
    for (int b = 0; b < kDigestBlocks; b += kLanes)
      store(s.tile + d * kDigestBlocks + b, load_digest(codes + d * kDigestBlocks + b) * scales[d] + offset);
  }
  dot_tile(s.queries, s.rows, D, s.tile, s.out);
}

// The sum over channels of max(q * least, q * most) is q . middle + |q| . half the distance.
inline void score_bounds(const PageScore& s) {
  const int D = s.task.head_size, size = D * kDigestBlocks;
  float offsets[kDigestBlocks], scales[kDigestBlocks];
  std::memcpy(offsets, s.data + 2 * size, sizeof offsets);
  std::memcpy(scales, s.data + 2 * size + sizeof offsets, sizeof scales);
  for (int i = 0; i < size; i += kLanes) {
    const Float least = load_digest(s.data + i), most = load_digest(s.data + size + i);
    const Float half_scale = load(scales + i % kDigestBlocks) * 0.5f;
    store(s.tile + i, (least + most) * half_scale + load(offsets + i % kDigestBlocks) +
                          load(s.task.basis->center.data() + i));
    store(s.tile + size + i, (most - least) * half_scale);
  }
  for (int r = 0; r < s.rows; ++r)
    for (int d = 0; d < D; d += kLanes) {
      const Float q = load(s.queries + size_t(r) * D + d);
      store(s.other + size_t(r) * 2 * D + d, q);
      store(s.other + size_t(r) * 2 * D + D + d, max(q, -q));
    }
  dot_tile(s.other, s.rows, 2 * D, s.tile, s.out);
}

// What the mean of all keys gives, and the log of the mean of exp over the tokens of what their chosen channels add.
// Lanes are blocks: the n-th tokens of all 16 blocks together, so that nothing is added across lanes.
inline void score_channels(const PageScore& s) {
  const int D = s.task.head_size, half = s.task.half, count = int(s.task.basis->pairs.size());
  dot_tile(s.queries, s.rows, D, s.task.basis->center.data(), s.out);
  for (int r = 0; r < s.rows; ++r)
    for (int i = 0; i < count; ++i) {
      const int pair = s.task.basis->pairs[i];
      s.other[size_t(r) * 2 * count + i] = s.queries[size_t(r) * D + first_channel(pair, half)];
      s.other[size_t(r) * 2 * count + count + i] = s.queries[size_t(r) * D + second_channel(pair, half)];
    }
  const auto of_token = [&](int t) { return s.tokens + size_t(t / kPageTiles) * kScoreRows * kPageTokens + t % kPageTiles * kTile; };
  for (int t = 0; t < kBlockTokens; ++t) {
    const uint8_t* codes = s.data + size_t(t) * count * kDigestBlocks;
    uint16_t halves[kDigestBlocks];
    float scales[kDigestBlocks];
    std::memcpy(halves, s.data + size_t(kDigestTokens) * count + t * sizeof halves, sizeof halves);
    for (int b = 0; b < kDigestBlocks; b += kLanes) store(scales + b, load_half(halves + b));
    for (int i = 0; i < count * kDigestBlocks; i += kLanes) {
      UnsignedCodes bytes;
      std::memcpy(&bytes, codes + i, sizeof bytes);
      const Int both = __builtin_convertvector(bytes, Int);
      const Float scale = load(scales + i % kDigestBlocks);
      store(s.tile + i, to_float((both & 15) - kNibbleZero) * scale);
      store(s.tile + count * kDigestBlocks + i, to_float((both >> 4) - kNibbleZero) * scale);
    }
    dot_tile(s.other, s.rows, 2 * count, s.tile, of_token(t));
  }
  for (int r = 0; r < s.rows; ++r)
    for (int b = 0; b < kDigestBlocks; b += kLanes) {
      const size_t at = size_t(r) * kPageTokens + b;
      Float peaks = load(of_token(0) + at), sums{};
      for (int t = 1; t < kBlockTokens; ++t) peaks = max(peaks, load(of_token(t) + at));
      for (int t = 0; t < kBlockTokens; ++t) sums += exp(load(of_token(t) + at) - peaks);
      store(s.out + at, load(s.out + at) + peaks + log(sums * (1.0f / kBlockTokens)));
    }
}

// logits [rows][pages * 16] of one group of rows.
inline void score_pages(const ScoreTask& task, int first, int rows, float* scratch, float* logits) {
  const int D = task.head_size;
  const size_t stride = size_t(task.page_count) * kDigestBlocks;
  float* turned = scratch;
  float* tile = turned + size_t(kScoreRows) * D;
  float* other = tile + size_t(2 * D) * kDigestBlocks;
  float* tokens = other + size_t(kScoreRows) * 2 * D;
  float out[kScoreRows * kPageTokens];
  for (int p = 0; p < task.page_count; ++p) {
    const DigestPage& page = task.pages[p];
    for (int r = 0; r < rows; ++r)
      turn_back(task.queries + size_t(first + r) * D, page.rope, task.half, D, turned + size_t(r) * D);
    const PageScore score{task, page.data, turned, rows, tile, other, tokens, out};
    switch (task.retriever.digest) {
      case Digest::kMean: score_means(score); break;
      case Digest::kMinMax: score_bounds(score); break;
      case Digest::kChannels: score_channels(score); break;
      case Digest::kCluster: score_clusters(score); break;
      case Digest::kNone: std::fill_n(out, kScoreRows * kPageTokens, 0.0f); break;
    }
    for (int r = 0; r < rows; ++r) {
      float* to = logits + r * stride + size_t(p) * kDigestBlocks;
      std::memcpy(to, out + r * kPageTokens, kDigestBlocks * sizeof(float));
      std::fill(to + page.blocks, to + kDigestBlocks, kHidden);
    }
  }
}

// A block's share of a row's softmax, as if all its 16 tokens had its logit, beside what the row's hot tokens weigh.
inline void vote(const ScoreTask& task, int row, float* logits) {
  const size_t count = size_t(task.page_count) * kDigestBlocks;
  Float peaks = splat(task.maxima[row]);
  for (size_t i = 0; i < count; i += kLanes) peaks = max(peaks, load(logits + i));
  const float peak = largest(peaks);
  Float sums{};
  for (size_t i = 0; i < count; i += kLanes) {
    const Float e = exp(load(logits + i) - peak);
    store(logits + i, e);
    sums += e;
  }
  const float total = sum(sums) * kBlockTokens + task.weights[row] * std::exp(task.maxima[row] - peak);
  const float share = total > 0 ? kBlockTokens / total : 0.0f;
  for (size_t i = 0; i < count; i += kLanes) {
    store(task.votes + i, load(task.votes + i) + load(logits + i) * share);
  }
}

void score(const ScoreTask& task) {
  const int D = task.head_size;
  const size_t stride = size_t(task.page_count) * kDigestBlocks;
  const bool by_token = task.retriever.digest == Digest::kChannels;
  const size_t tokens = by_token ? size_t(kBlockTokens / kPageTiles) * kScoreRows * kPageTokens : 0;
  std::vector<float> scratch(size_t(kScoreRows) * 3 * D + size_t(2 * D) * kDigestBlocks + tokens);
  std::vector<float> logits(kScoreRows * stride);
  for (int first = 0; first < task.rows; first += kScoreRows) {
    const int rows = std::min(kScoreRows, task.rows - first);
    score_pages(task, first, rows, scratch.data(), logits.data());
    for (int r = 0; r < rows; ++r) vote(task, first + r, logits.data() + r * stride);
  }
}

}  // namespace
}  // namespace satchel
