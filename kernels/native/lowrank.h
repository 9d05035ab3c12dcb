// Low rank: a key and its value of one KV head as a few coefficients, from which all of their channels come back.
//
//   c = (x - mean) encoder,   x ~ mean + c decoder
//
// x is the key and the value side by side, 2D numbers: they say much of each other, and one order of coefficients shares
// the rank between them. What the other coefficients, the rest, are in the mean is kept once for a block. Or x is the key
// alone, D numbers without a rest.
//
// Encoder and decoder differ, as what counts is not the distance of the channels but what attention makes of it: the
// projection is the best one in that measure (export/calibration/cskv.py). Where they are rows of the identity, channels
// are kept as they are or left out (ThinK, arXiv 2407.21018).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace satchel {

constexpr int kLeastRank = 4;

// Some coefficients of one KV head.
struct Projection {
  int rank = 0;
  std::vector<float> encoder;           // [D, rank], or of pairs [2D, rank]
  std::vector<float> decoder;           // [rank, D], or of pairs [rank, D] of the key, then [rank, D] of the value
  std::vector<int32_t> channels;        // [rank], ascending, where they are channels of a key as it is; else empty
  bool fit(int wanted_rank, int inputs) const;  // sizes, and finite numbers that no sum can make infinite
};

// Of all layers of an archive and their KV heads; what is not projected has none. With ranks for both sides it is of
// pairs: a block's key side has the first coefficients, its value side the next ones, `rests` are all others.
struct LowRankBasis {
  int layers = 0, kv_heads = 0, head_size = 0, key_rank = 0, value_rank = 0;
  std::vector<std::shared_ptr<const Projection>> keys, values, rests;  // [layers * kv_heads], or empty
};

// The channels themselves, ascending.
std::shared_ptr<const Projection> keep_channels(const std::vector<int32_t>& channels, int head_size);

// Of keys [tokens, D] before RoPE the channels that matter most to q.k: their variance, by how much queries have where
// RoPE may turn them to. `query_energy` [D]: mean squares of queries before RoPE, or empty.
std::vector<int32_t> choose_channels(int rank, int head_size, int half, const float* keys, int tokens,
                                     const std::vector<float>& query_energy);

// Coefficients [tokens, width] of x [tokens, D or 2D]; zero from `rank` on. Numbers beyond half precision are clamped,
// and NaN is the mean.
void project(const Projection&, const std::vector<float>& mean, const float* x, int tokens, int width, float* out);
// The mean [rank] of the tokens' coefficients.
void project_mean(const Projection&, const std::vector<float>& mean, const float* x, int tokens, float* out);

}  // namespace satchel
