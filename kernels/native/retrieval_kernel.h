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

constexpr int kScoreRows = 24;  // query rows that are turned into a page's frame together

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

// The mean keys of a page as floats [D][16].
inline void widen_means(const uint8_t* page, const DigestBasis& basis, int head_size, float* tile) {
  const auto* codes = reinterpret_cast<const int8_t*>(page);
  float scales[kDigestBlocks];
  std::memcpy(scales, page + size_t(head_size) * kDigestBlocks, sizeof scales);
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  for (int d = 0; d < head_size; ++d)
    for (int b = 0; b < kDigestBlocks; b += kLanes) {
      Bytes bytes;
      std::memcpy(&bytes, codes + d * kDigestBlocks + b, sizeof bytes);
      const Float code = to_float(__builtin_convertvector(bytes, Int));
      const size_t at = size_t(d) * kDigestBlocks + b;
      store(tile + at, code * load(scales + b) + load(basis.center.data() + at));
    }
}

// logits [rows][pages * 16] of one group of rows.
inline void score_pages(const ScoreTask& task, int first, int rows, float* turned, float* tile, float* logits) {
  const int D = task.head_size;
  const size_t stride = size_t(task.page_count) * kDigestBlocks;
  float out[kRows * kPageTokens];
  constexpr auto sequence = std::make_integer_sequence<int, kRows>();
  for (int p = 0; p < task.page_count; ++p) {
    const DigestPage& page = task.pages[p];
    widen_means(page.data, *task.basis, D, tile);
    for (int r = 0; r < rows; ++r)
      turn_back(task.queries + size_t(first + r) * D, page.rope, task.half, D, turned + size_t(r) * D);
    for (int r = 0; r < rows; r += kRows) {
      const int n = std::min(kRows, rows - r);
      row_kernels<float>(n, sequence).dot(turned + size_t(r) * D, D, tile, out);
      for (int i = 0; i < n; ++i) {
        float* to = logits + (r + i) * stride + size_t(p) * kDigestBlocks;
        std::memcpy(to, out + i * kPageTokens, kDigestBlocks * sizeof(float));
        std::fill(to + page.blocks, to + kDigestBlocks, kHidden);
      }
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
  std::vector<float> turned(size_t(kScoreRows) * D), tile(size_t(D) * kDigestBlocks), logits(kScoreRows * stride);
  for (int first = 0; first < task.rows; first += kScoreRows) {
    const int rows = std::min(kScoreRows, task.rows - first);
    score_pages(task, first, rows, turned.data(), tile.data(), logits.data());
    for (int r = 0; r < rows; ++r) vote(task, first + r, logits.data() + r * stride);
  }
}

}  // namespace
}  // namespace satchel
