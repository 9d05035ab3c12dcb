// Reading blocks (codec.h) into floats: included by variant.cc only.
#pragma once

#include "codec.h"
#include "simd.h"

namespace satchel {
namespace {

// kLanes bytes, each widened to 32 bits; of 16 lanes the upper 8 repeat the lower ones when `twice`.
inline Int widen_bytes(const uint8_t* p, bool twice = false) {
#if defined(__AVX512F__)
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if (twice) return (Int)_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(half, half));
  return (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  (void)twice;
  return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__SSE2__)
  (void)twice;
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  const __m128i zero = _mm_setzero_si128();
  return (Int)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(word), zero), zero);
#else
  (void)twice;
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Int);
#endif
}
inline Int load_lanes(const int32_t* p) {
  Int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Which bits of the run's words a lane takes; of 4 bits only 16 lanes need it.
constexpr int32_t kShift4[16] = {0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4};
constexpr int32_t kShift2[16] = {0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30};
constexpr int32_t kBit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

// A run of 16 codes, unsigned (8 bits: signed), in 32-bit lanes.
template <int kBits>
inline void unpack_run(const uint8_t* run, Int* codes) {
  if (kBits == 8) {
    for (int v = 0; v < kVectors; ++v) codes[v] = (widen_bytes(run + v * kLanes) << 24) >> 24;
  } else if (kBits == 4) {
    if (kLanes == 16) {
      codes[0] = (widen_bytes(run, true) >> load_lanes(kShift4)) & 15;
    } else {
      for (int v = 0; v < kVectors / 2; ++v) {
        const Int bytes = widen_bytes(run + v * kLanes);
        codes[v] = bytes & 15;
        codes[v + kVectors / 2] = bytes >> 4;
      }
    }
  } else {
    if (kLanes == 4) {  // no shift by lanes in SSE2
      const Int bytes = widen_bytes(run);
      for (int v = 0; v < kVectors; ++v) codes[v] = (bytes >> (2 * v)) & 3;
    } else {
      int32_t word;
      std::memcpy(&word, run, sizeof word);
      for (int v = 0; v < kVectors; ++v) codes[v] = ((word - Int{}) >> load_lanes(kShift2 + v * kLanes)) & 3;
    }
    if (kBits == 3) {
      uint16_t plane;
      std::memcpy(&plane, run + 4, sizeof plane);
      for (int v = 0; v < kVectors; ++v) {
        const Int bit = load_lanes(kBit + v * kLanes);
        codes[v] |= Int(((int32_t(plane) - Int{}) & bit) == bit) & 4;
      }
    }
  }
}

// table[codes], the table padded to 16 entries.
struct Table {
  float at[16];
};
template <int kBits>
inline Float look_up(const Table& table, Int codes) {
#if defined(__AVX512F__)
  return (Float)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table.at));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.at), (__m256i)codes);
  if (kBits < 4) return (Float)low;
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.at + 8), (__m256i)codes);
  return (Float)_mm256_blendv_ps(low, high, (__m256)(codes << 28));  // the sign chooses: the code's fourth bit
#else
  Float found;
  for (int i = 0; i < kLanes; ++i) found[i] = table.at[codes[i]];
  return found;
#endif
}

template <int kBits, bool kUneven>
struct Reader {
  Table table{};
  explicit Reader(const std::vector<float>& levels) {
    for (size_t i = 0; kUneven && i < levels.size() && i < 16; ++i) table.at[i] = levels[i];
  }
  inline void levels(const uint8_t* run, Float* out) const {
    Int codes[kVectors];
    unpack_run<kBits>(run, codes);
    for (int v = 0; v < kVectors; ++v) {
      if (kUneven) out[v] = look_up<kBits>(table, codes[v]);
      else out[v] = kBits == 8 ? to_float(codes[v]) : to_float(codes[v]) - 0.5f * ((1 << (kBits & 7)) - 1);
    }
  }
};

inline void read_scales(const uint8_t* halves, float* scales) {
  uint16_t copy[kBlockTokens];
  std::memcpy(copy, halves, sizeof copy);
  for (int i = 0; i < kBlockTokens; i += kLanes) store(scales + i, load_half(copy + i));
}

// One side of a block: keys [D][16] when kKeys, else values [16][D].
template <int kBits, bool kUneven, bool kKeys>
void decode_side(const uint8_t* runs, const uint8_t* halves, int head_size, const float* center, const float* spread,
                 const std::vector<float>& levels, float* out) {
  const Reader<kBits, kUneven> reader(levels);
  float scales[kBlockTokens];
  read_scales(halves, scales);
  Float level[kVectors];
  if (kKeys) {
    Float scale[kVectors];
    for (int v = 0; v < kVectors; ++v) scale[v] = load(scales + v * kLanes);
    for (int d = 0; d < head_size; ++d, runs += 2 * kBits, out += kTile) {
      reader.levels(runs, level);
      for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, center[d] + spread[d] * (scale[v] * level[v]));
    }
    return;
  }
  for (int t = 0; t < kBlockTokens; ++t)
    for (int d = 0; d < head_size; d += kTile, runs += 2 * kBits, out += kTile) {
      reader.levels(runs, level);
      for (int v = 0; v < kVectors; ++v) {
        const int at = d + v * kLanes;
        store(out + v * kLanes, load(center + at) + load(spread + at) * (scales[t] * level[v]));
      }
    }
}

// The same in the grouped form.
template <int kBits, bool kKeys>
void decode_groups(const uint8_t* runs, const uint8_t* groups, int head_size, const float* center, const float* spread,
                   float* out) {
  const Reader<kBits, false> reader({});
  constexpr float kReach = kBits == 8 ? 127.0f : 0.5f * ((1 << (kBits & 7)) - 1);
  Table scales;
  for (int i = 0; i < 16; ++i) scales.at[i] = kGroupReach[i] / kReach;
  float centers[256], spreads[256];
  for (int d = 0; d < head_size; d += kLanes) {
    const Int group = widen_bytes(groups + d);
    const Float wide = load(spread + d);
    store(centers + d, load(center + d) + wide * ((to_float(group & 15) - 7.5f) * 0.25f));
    store(spreads + d, wide * look_up<4>(scales, group >> 4));
  }
  Float level[kVectors];
  if (kKeys) {
    for (int d = 0; d < head_size; ++d, runs += 2 * kBits, out += kTile) {
      reader.levels(runs, level);
      for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, centers[d] + spreads[d] * level[v]);
    }
    return;
  }
  for (int t = 0; t < kBlockTokens; ++t)
    for (int d = 0; d < head_size; d += kTile, runs += 2 * kBits, out += kTile) {
      reader.levels(runs, level);
      for (int v = 0; v < kVectors; ++v) {
        const int at = d + v * kLanes;
        store(out + v * kLanes, load(centers + at) + load(spreads + at) * level[v]);
      }
    }
}

template <bool kKeys>
void decode_grouped(int bits, const uint8_t* runs, const uint8_t* groups, int D, const float* center,
                    const float* spread, float* out) {
  if (bits == 8) return decode_groups<8, kKeys>(runs, groups, D, center, spread, out);
  if (bits == 4) return decode_groups<4, kKeys>(runs, groups, D, center, spread, out);
  if (bits == 3) return decode_groups<3, kKeys>(runs, groups, D, center, spread, out);
  return decode_groups<2, kKeys>(runs, groups, D, center, spread, out);
}

template <bool kKeys>
void decode_small(int bits, const uint8_t* runs, const uint8_t* halves, int D, const float* center, const float* spread,
                  const std::vector<float>& levels, float* out) {
  if (bits == 8) return decode_side<8, false, kKeys>(runs, halves, D, center, spread, levels, out);
  if (levels.empty()) {
    if (bits == 4) return decode_side<4, false, kKeys>(runs, halves, D, center, spread, levels, out);
    if (bits == 3) return decode_side<3, false, kKeys>(runs, halves, D, center, spread, levels, out);
    return decode_side<2, false, kKeys>(runs, halves, D, center, spread, levels, out);
  }
  if (bits == 4) return decode_side<4, true, kKeys>(runs, halves, D, center, spread, levels, out);
  if (bits == 3) return decode_side<3, true, kKeys>(runs, halves, D, center, spread, levels, out);
  return decode_side<2, true, kKeys>(runs, halves, D, center, spread, levels, out);
}

inline void decode_halves(const uint8_t* runs, int head_size, float* out) {
  for (int i = 0; i < head_size * kBlockTokens; i += kTile) read_scales(runs + 2 * i, out + i);
}

// Indices come from a file: one that leads outside is passed over.
inline void put_outliers(const uint8_t* from, int count, int head_size, float* out) {
  constexpr int kAtOnce = 16;
  uint16_t halves[kAtOnce];
  float numbers[kAtOnce];
  for (int first = 0; first < count; first += kAtOnce) {
    const int now = count - first < kAtOnce ? count - first : kAtOnce;
    std::memset(halves, 0, sizeof halves);
    for (int i = 0; i < now; ++i) std::memcpy(halves + i, from + 4 * (first + i) + 2, 2);
    for (int i = 0; i < kAtOnce; i += kLanes) store(numbers + i, load_half(halves + i));
    for (int i = 0; i < now; ++i) {
      uint16_t index;
      std::memcpy(&index, from + 4 * (first + i), 2);
      if (index < head_size * kBlockTokens) out[index] = numbers[i];
    }
  }
}

// One side as it is stored, `numbers` for each token: channel after channel [numbers][16], else [16][numbers].
template <bool kChannels>
void decode_stored(const Codec& codec, int bits, int numbers, const uint8_t* runs, const uint8_t* scales,
                   const uint8_t* outliers, const std::vector<float>& center, const std::vector<float>& spread,
                   const std::vector<float>& levels, float* out) {
  if (bits == 16) return decode_halves(runs, numbers, out);
  if (codec.grouped)
    decode_grouped<kChannels>(bits, runs, scales, numbers, center.data(), spread.data(), out);
  else
    decode_small<kChannels>(bits, runs, scales, numbers, center.data(), spread.data(), levels, out);
  put_outliers(outliers, codec.outliers, numbers, out);
}

#if defined(__AVX512F__)
constexpr int kExpandRows = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kExpandRows = 4;  // 4 rows x 16 columns; with 6 no faster, and head sizes are not multiples of it
#else
constexpr int kExpandRows = 2;
#endif

// out[rows][columns] += the sum over `rank` of left[i][rows] right[i][columns]; rows and columns are multiples of 16.
inline void add_products(const float* left, int rows, const float* right, int columns, int rank, float* out) {
  for (int column = 0; column < columns; column += kTile)
    for (int row = 0; row < rows; row += kExpandRows) {
      Float acc[kExpandRows][kVectors];
      for (int r = 0; r < kExpandRows; ++r)
        for (int v = 0; v < kVectors; ++v) acc[r][v] = load(out + (row + r) * columns + column + v * kLanes);
      for (int i = 0; i < rank; ++i) {
        Float x[kVectors];
        for (int v = 0; v < kVectors; ++v) x[v] = load(right + i * columns + column + v * kLanes);
        for (int r = 0; r < kExpandRows; ++r)
          for (int v = 0; v < kVectors; ++v) acc[r][v] += x[v] * left[i * rows + row + r];
      }
      for (int r = 0; r < kExpandRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + (row + r) * columns + column + v * kLanes, acc[r][v]);
    }
}

// Adds a pair's coefficients [rank][16] to its keys [D][16] and values [16][D].
inline void add_pairs(const Projection& by, int head_size, const float* coefficients, float* keys, float* values) {
  add_products(by.decoder.data(), head_size, coefficients, kTile, by.rank, keys);
  add_products(coefficients, kTile, by.decoder.data() + size_t(by.rank) * head_size, head_size, by.rank, values);
}

// What coefficients are added to [D], for keys or for values: the mean, and a block's rest.
inline void decode_base(const std::vector<float>& mean, const Projection* by, bool keys, const uint8_t* rest, float* base) {
  const int D = int(mean.size()), count = by ? by->rank : 0;
  std::memcpy(base, mean.data(), D * sizeof(float));
  if (!count) return;
  float scales[kTile] = {};
  uint8_t halves[2 * kTile] = {};
  std::memcpy(halves, rest, 2);
  read_scales(halves, scales);
  for (int i = 0; i < count; ++i) {
    const float x = scales[0] * (float(rest[2 + i / 2] >> i % 2 * 4 & 15) - 7.5f);
    const float* row = by->decoder.data() + (size_t(keys ? 0 : count) + i) * D;
    for (int d = 0; d < D; d += kLanes) store(base + d, load(base + d) + load(row + d) * x);
  }
}

void decode_block(const BlockFormat& format, const uint8_t* block, float* keys, float* values) {
  const Codec& codec = format.codec;
  const int D = format.head_size;
  const BlockLayout at = block_layout(codec, D);
  const HeadStatistics& s = *format.statistics;
  float coefficients[256 * kBlockTokens], base[256];
  const auto stored_keys = [&](float* out) {
    decode_stored<true>(codec, codec.key_bits, codec.key_numbers(D), block + at.keys, block + at.key_scales,
                        block + at.key_outliers, s.key_center, s.key_spread, s.key_levels, out);
  };
  const auto stored_values = [&](float* out) {
    decode_stored<true>(codec, codec.value_bits, codec.value_rank, block + at.values, block + at.value_scales,
                        block + at.value_outliers, s.value_center, s.value_spread, s.value_levels, out);
  };
  const Projection* rest = codec.rest_numbers(D) ? s.rest_projection.get() : nullptr;
  if (codec.key_rank) {
    decode_base(s.key_mean, rest, true, block + at.rest, base);
    for (int d = 0; d < D; ++d)
      for (int t = 0; t < kTile; t += kLanes) store(keys + d * kTile + t, splat(base[d]));
  } else {
    stored_keys(keys);
  }
  if (codec.value_rank) {
    decode_base(s.value_mean, rest, false, block + at.rest, base);
    for (int t = 0; t < kBlockTokens; ++t) std::memcpy(values + t * D, base, D * sizeof(float));
  } else {
    decode_stored<false>(codec, codec.value_bits, D, block + at.values, block + at.value_scales,
                         block + at.value_outliers, s.value_center, s.value_spread, s.value_levels, values);
  }
  if (codec.key_rank) {
    stored_keys(coefficients);
    if (codec.paired())
      add_pairs(*s.key_projection, D, coefficients, keys, values);
    else
      add_products(s.key_projection->decoder.data(), D, coefficients, kTile, codec.key_rank, keys);
  }
  if (codec.value_rank) {
    stored_values(coefficients);
    if (codec.paired())
      add_pairs(*s.value_projection, D, coefficients, keys, values);
    else
      add_products(coefficients, kBlockTokens, s.value_projection->decoder.data(), D, codec.value_rank, values);
  }
}

}  // namespace
}  // namespace satchel
