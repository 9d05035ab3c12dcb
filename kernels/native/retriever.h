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
#include "rope_table.h"

namespace satchel {

constexpr int kDigestBlocks = 16;
constexpr int kDigestTokens = kDigestBlocks * kBlockTokens;  // 256
constexpr int kNibbleZero = 8;  // what is added to a code of four bits to store it

enum class Digest : int {
  kNone = 0,
  kMean = 1,      // a block's mean key, beside what the mean of all keys would be there
  kMinMax = 2,    // the least and the largest number of every channel
  kChannels = 3,  // every token's key, in a few pairs of channels
  kCluster = 4,   // the mean key of a block whose tokens were brought together by likeness, not by order
};

struct Retriever {
  Digest digest = Digest::kNone;
  int channels = 0;  // kChannels: pairs of channels that are looked at

  bool known() const { return digest >= Digest::kNone && digest <= Digest::kCluster && channels >= 0; }
  bool clustered() const { return digest == Digest::kCluster; }
  int pairs_of(int head_size) const { return channels < 1 ? 1 : channels < head_size / 2 ? channels : head_size / 2; }
};

size_t digest_page_bytes(const Retriever&, int head_size);

// What all digests of one KV head share: made with the first keys, then fixed.
struct DigestBasis {
  // What a block of a page would be if every key were the mean of all keys [D][16 blocks]: digests hold the difference
  // (kCluster: the mean over the whole page, for every block).
  std::vector<float> center;
  // kChannels: the chosen pairs, ascending. RoPE turns pair i, channels i and i + half; what it leaves alone is counted
  // on from there, two neighbours a pair.
  std::vector<int32_t> pairs;
};

// The first of a pair's two channels, and the second.
inline int first_channel(int pair, int half) { return pair < half ? pair : 2 * pair; }
inline int second_channel(int pair, int half) { return pair < half ? pair + half : 2 * pair + 1; }

// keys [tokens, D] before RoPE; query_energy [D]: the mean square of each channel of the queries at hand, or empty.
DigestBasis make_basis(const Retriever&, int head_size, const RopeTable& rope, const float* keys, int tokens,
                       const std::vector<float>& query_energy);

// Writes the digest of block `block` into a page's digests. keys [16, D] in the page's frame. Not for kCluster.
void write_digest(const Retriever&, const DigestBasis&, int head_size, int half, int block, const float* keys,
                  uint8_t* page);
// kCluster: all 16 blocks of a page. keys [256, D] in the page's frame, block by block.
void write_clusters(const DigestBasis&, int head_size, const float* keys, uint8_t* page);

// Groups a page's tokens from `first` on by the direction of their keys [256, D] (in the page's frame), exactly 16 each:
// order[slot] = token; slots below `first` (a multiple of 16) keep theirs, inside a group tokens ascend. Deterministic.
// Spherical k-means from blocks in order; tokens of two groups change places as long as that brings both nearer.
void cluster_page(const float* keys, int head_size, int first, uint8_t* order);

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
