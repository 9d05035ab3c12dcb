// The forms of pairs below the hot tier: blocks of 16 tokens of one KV head, keys before RoPE.
//
// Channels are first centred and scaled by statistics of the head (keys before RoPE have channels whose mean is tens of
// times their spread: KVQuant, arXiv 2401.18079), then every token's vector is quantized with a scale of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace satchel {

constexpr int kBlockTokens = 16;  // one key tile of the attention kernel

struct Codec {
  int key_bits = 16, value_bits = 16;  // 16 (half floats, not normalised), 8, 4, 3 or 2
  bool nonuniform = false;             // levels from the head's tables instead of evenly spaced ones
  int outliers = 0;                    // the largest values of a block's keys, and of its values, kept apart as halves

  bool known() const;
};

// Of one KV head: what its channels look like. Empty until calibrated.
struct HeadStatistics {
  std::vector<float> key_center, key_spread, value_center, value_spread;  // [D] each
  std::vector<float> key_levels, value_levels;                            // [2^bits], ascending; empty: even levels
  bool empty() const { return key_center.empty(); }
};

// keys (before RoPE) and values [tokens, D] of a sample; levels only when the codec is nonuniform. Deterministic.
HeadStatistics calibrate(const Codec&, int head_size, const float* keys, const float* values, int tokens);

size_t block_bytes(const Codec&, int head_size);  // a multiple of 16

// keys and values [16, D]; slots that hold no token are to be zero or a copy of a neighbour.
void encode_block(const Codec&, const HeadStatistics&, int head_size, const float* keys, const float* values,
                  uint8_t* block);

// What a kernel needs to read blocks of one KV head; `decode_block` is in the table of variants (variant.h).
struct BlockFormat {
  Codec codec;
  const HeadStatistics* statistics;
  int head_size;
};

}  // namespace satchel
