// What finds the blocks that a query needs: a small digest of every archived block, kept in memory.
//
// A digest page stands for 256 tokens (16 blocks) of one KV head. Its vectors are in the frame of the page: keys rotated
// (RoPE) by their distance from the page's first token. Queries are turned into that frame, so that a page can be scored
// as if it lay at any position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec.h"

namespace satchel {

constexpr int kDigestBlocks = 16;
constexpr int kDigestTokens = kDigestBlocks * kBlockTokens;  // 256

enum class Digest : int { kNone = 0, kMean = 1, kMinMax = 2, kChannels = 3 };

struct Retriever {
  Digest digest = Digest::kNone;
  int channels = 0;  // kChannels: pairs of channels that are looked at
};

size_t digest_page_bytes(const Retriever&, int head_size);

// What all digests of one KV head share: made with the first keys, then fixed.
struct DigestBasis {
  std::vector<float> center;   // kMean: the mean of all keys as each block of a page would have it [D][16 blocks]
  std::vector<int32_t> pairs;  // kChannels: the chosen pairs of channels
};

// Writes the digest of block `block` into a page's digests. keys [16, D] in the page's frame.
void write_digest(const Retriever&, const DigestBasis&, int head_size, int block, const float* keys, uint8_t* page);

struct DigestPage {
  const uint8_t* data;
  const float* rope;  // of the position that the page is scored at: cosines [half], sines [half]
  int blocks;         // that are filled
};

// Scores some query rows of one KV head against all its digests and adds up what each block would get.
struct ScoreTask {
  Retriever retriever;
  const DigestBasis* basis;
  int head_size, half;
  const float* queries;  // [rows, D] after RoPE and scale
  int rows;
  const DigestPage* pages;
  int page_count;
  const float* maxima;   // [rows] and
  const float* weights;  // [rows]: what the hot tier's softmax has seen (largest logit, sum of exp(logit - it))
  float* votes;          // [pages, 16]: every row's share of the block is added
};

}  // namespace satchel
