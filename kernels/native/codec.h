// The forms of pairs below the hot tier: blocks of 16 tokens of one KV head, keys before RoPE.
//
// Channels are first centred and scaled by statistics of the head (keys before RoPE have channels whose mean is tens of
// times their spread: KVQuant, arXiv 2401.18079), then every token's vector is quantized with a scale of its own:
//
//   restored[t][d] = center[d] + spread[d] * (scale[t] * level(code[t][d]))
//
// or, in the grouped form, every channel of the block with an offset and a scale of its own, of 4 bits each (16 neighbours
// lie closer together than the whole document: KIVI, arXiv 2402.02750, has such groups with a half for each of the two):
//
//   restored[t][d] = center[d] + spread[d] * (offset[d] + scale[d] * level(code[t][d]))
//
// With a rank (lowrank.h) keys, or values, are R coefficients instead of D channels: everything below is then about these,
// R in the place of D, and values lie as keys do, coefficient after coefficient. With ranks for both, a and b, these are
// coefficients of pairs: the keys' side has the first a of 2D, the values' side the next b.
//
// A block, byte by byte (little-endian, nothing aligned but its beginning; D is the head size, a multiple of 16):
//
//   key scales     32 bytes: IEEE half [16 tokens]             if key_bits < 16; grouped: D bytes, one for each channel
//   value scales   32 bytes: IEEE half [16 tokens]             if value_bits < 16; grouped: D bytes, one for each channel
//   key outliers   4 bytes each: u16 index, IEEE half          if key_bits < 16
//   value outliers 4 bytes each: u16 index, IEEE half          if value_bits < 16
//   keys           D runs of 16 codes: channel after channel, each with its 16 tokens
//   values         D runs of 16 codes: token after token, each with D / 16 runs
//   rest           of pairs, if a + b < 2D: IEEE half, the scale, then 4 bits for each of the other 2D - a - b coefficients,
//                  low half of a byte first: its mean over the 16 tokens, scale * (code - 7.5)
//   zeros          up to the next multiple of 16 bytes
//
// A run of 16 codes:
//
//   16 bits   32 bytes: IEEE halves, the numbers themselves (no center, spread, scale or outliers)
//    8 bits   16 bytes: signed, -127..127, level = code
//    4 bits    8 bytes: byte j = code[j] | code[j + 8] << 4
//    3 bits    6 bytes: the two low bits of the codes as under 2 bits, then u16: bit j = the high bit of code[j]
//    2 bits    4 bytes: byte j = code[j] | code[j + 4] << 2 | code[j + 8] << 4 | code[j + 12] << 6
//
// Of 2 to 4 bits, level = code - (2^bits - 1) / 2 (halves between integers: no code is wasted on a second zero), or
// levels[code] where the codec is nonuniform. A channel's byte of the grouped form is o | s << 4 with
// offset = (o - 7.5) / 4 and scale = kGroupReach[s] / (largest level: 127, or (2^bits - 1) / 2). An outlier's index counts within its side as the runs do (keys: d * 16 + t,
// values: t * D + d); its half is the number itself and replaces what the code gives. Indices ascend; every block has as
// many outliers as the codec says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "lowrank.h"

namespace satchel {

constexpr int kBlockTokens = 16;  // one key tile of the attention kernel
constexpr int kLeastSample = 16;  // tokens that calibrate() needs

struct Codec {
  int key_bits = 16, value_bits = 16;  // 16 (half floats, not normalised), 8, 4, 3 or 2
  bool nonuniform = false;             // levels from the head's tables instead of evenly spaced ones (sides of <= 4 bits)
  int outliers = 0;                    // the largest values of a block's keys, and of its values, kept apart as halves
  bool grouped = false;                // offset and scale for each channel of a block; even levels, no outliers
  int key_rank = 0, value_rank = 0;    // coefficients of a key and a value; 0: its channels as they are

  bool known() const;
  bool low_rank() const { return key_rank || value_rank; }
  bool paired() const { return key_rank && value_rank; }
  // Coefficients of a pair that a block has the mean of.
  int rest_numbers(int head_size) const { return paired() ? 2 * head_size - key_rank - value_rank : 0; }
  // Numbers that a block has of each key and value.
  int key_numbers(int head_size) const { return key_rank ? key_rank : head_size; }
  int value_numbers(int head_size) const { return value_rank ? value_rank : head_size; }
};
// Tokens lie in memory in vectors of so many numbers while they are encoded; those beyond are zero.
inline int padded_numbers(int numbers) { return (numbers + 15) / 16 * 16; }

// How many spreads the outermost level is away from the offset: 8 * 2^(-0.4 i), and one far out for what never happens.
constexpr float kGroupReach[16] = {32.0f,      8.0f,        6.062866f,  4.594793f, 3.482202f,  2.639016f,
                                   2.0f,       1.5157166f,  1.1486984f, 0.8705506f, 0.6597540f, 0.5f,
                                   0.37892914f, 0.28717459f, 0.21763764f, 0.16493849f};

// Of one KV head: what its channels, or its coefficients, look like. Empty until calibrated.
struct HeadStatistics {
  std::vector<float> key_center, key_spread, value_center, value_spread;  // [D], or [padded_numbers(R)], each
  std::vector<float> key_levels, value_levels;                            // [2^bits], ascending; empty: even levels
  std::vector<float> key_mean, value_mean;                                // [D] with a rank: what projections begin at
  std::shared_ptr<const Projection> key_projection, value_projection;     // with a rank
  std::shared_ptr<const Projection> rest_projection;                      // of pairs, if they have a rest
  bool empty() const { return key_center.empty(); }
  // Whether blocks of this codec and head size can be read and written with them: sizes, finite numbers, spreads > 0,
  // ascending levels. For statistics that come from a file.
  bool fit(const Codec&, int head_size) const;
};

// A head size that blocks can have.
inline bool block_head_size(int head_size) { return head_size > 0 && head_size <= 256 && head_size % 16 == 0; }

// keys (before RoPE) and values [tokens, D] of a sample; levels only when the codec is nonuniform. Deterministic.
// Throws std::invalid_argument for less than kLeastSample tokens, or projections that are not of the codec's ranks.
HeadStatistics calibrate(const Codec&, int head_size, const float* keys, const float* values, int tokens,
                         std::shared_ptr<const Projection> key_projection = nullptr,
                         std::shared_ptr<const Projection> value_projection = nullptr,
                         std::shared_ptr<const Projection> rest_projection = nullptr);

size_t block_bytes(const Codec&, int head_size);  // a multiple of 16

// keys and values [16, D]; slots that hold no token are to be zero or, better, a copy of a neighbour (zeros far from the
// center take the outliers' places). Numbers beyond half precision are clamped, NaN is stored as the center.
void encode_block(const Codec&, const HeadStatistics&, int head_size, const float* keys, const float* values,
                  uint8_t* block);

// What a kernel needs to read blocks of one KV head; `decode_block` is in the table of variants (variant.h).
struct BlockFormat {
  Codec codec;
  const HeadStatistics* statistics;
  int head_size;
};

// Where the parts of a block begin.
struct BlockLayout {
  size_t key_scales, value_scales, key_outliers, value_outliers, keys, values, rest, end;
};
inline size_t run_bytes(int bits) { return size_t(bits) * 2; }
inline BlockLayout block_layout(const Codec& codec, int head_size) {
  const size_t key_small = codec.key_bits < 16, value_small = codec.value_bits < 16, outliers = 4 * size_t(codec.outliers);
  BlockLayout at{};
  const size_t keys = size_t(codec.key_numbers(head_size)), values = size_t(codec.value_numbers(head_size));
  at.value_scales = key_small * (codec.grouped ? keys : 2 * kBlockTokens);
  at.key_outliers = at.value_scales + value_small * (codec.grouped ? values : 2 * kBlockTokens);
  at.value_outliers = at.key_outliers + key_small * outliers;
  at.keys = at.value_outliers + value_small * outliers;
  at.values = at.keys + keys * run_bytes(codec.key_bits);
  at.rest = at.values + values * run_bytes(codec.value_bits);
  const size_t rest = size_t(codec.rest_numbers(head_size));
  at.end = at.rest + (rest ? 2 + (rest + 1) / 2 : 0);
  return at;
}

}  // namespace satchel
