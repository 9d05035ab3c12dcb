// Linear layers whose weights have at most 5 bits, on CPUs with 8-bit products (AVX2 and up): included by variant.cc only.
//
// Weights stay unsigned (0 .. 31), activations are signed bytes with one scale a block. A product pair is then at most
// 2 * 31 * 127, so several fit into 16 bits before they must be widened: 1.4 times the products per instruction of the
// 16-bit path. The weights' zero point is taken out through the sum of the activations' codes.
#pragma once

#if defined(__AVX2__)

#include <algorithm>
#include <utility>

#include "simd.h"
#include "variant.h"

namespace satchel {
namespace {

constexpr int kByteRows = 4;  // 8 accumulators, 4 weight registers, 2 masks: 14 of 16 registers

inline bool fits_bytes(const PackedMatrix& w) { return w.bits <= 5 && w.block == 32; }

typedef float Float8 __attribute__((vector_size(32)));

// Codes of a row: each pair of bytes twice, so that a plain 32-bit broadcast puts it beside 16 outputs.
// sums: with minima, of the values; without, zero point times the sum of the codes.
inline void quantize_row_bytes(const PackedMatrix& w, const float* x, int16_t* codes, float* scales, float* sums) {
  const float zero = float(1 << (w.bits - 1));
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const float* in = x + b * 32;
    Float8 v[4], peak{}, total{};
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&v[i], in + i * 8, 32);
      const Float8 size = v[i] > -v[i] ? v[i] : -v[i];
      peak = size > peak ? size : peak;
      total += v[i];
    }
    float amax = 0, value_sum = 0;
    for (int i = 0; i < 8; ++i) {
      amax = std::max(amax, peak[i]);
      value_sum += total[i];
    }
    const float inverse = amax > 0 ? 127.0f / amax : 0.0f;
    int8_t bytes[32];
    int code_sum = 0;
    for (int i = 0; i < 4; ++i) {
      const Float8 rounded = (v[i] * inverse + 12582912.0f) - 12582912.0f;
      for (int j = 0; j < 8; ++j) {
        bytes[i * 8 + j] = int8_t(rounded[j]);
        code_sum += int(rounded[j]);
      }
    }
    for (int pair = 0; pair < 16; ++pair) {
      std::memcpy(codes + b * 32 + pair * 2, bytes + pair * 2, 2);
      std::memcpy(codes + b * 32 + pair * 2 + 1, bytes + pair * 2, 2);
    }
    scales[b] = amax / 127.0f * w.multiplier;
    sums[b] = w.has_min ? value_sum * w.multiplier : zero * float(code_sum);
  }
}

// The halves of a record's header, those of even outputs first.
inline void load_split_halves(const uint8_t* halves, Float8& even, Float8& odd) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  __m256i all = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)), order);
  all = _mm256_permute4x64_epi64(all, 0xd8);
  even = (Float8)_mm256_cvtph_ps(_mm256_castsi256_si128(all));
  odd = (Float8)_mm256_cvtph_ps(_mm256_extracti128_si256(all, 1));
}

// R rows x 16 outputs; out[r] holds the even outputs, then the odd ones.
template <int R, int kBits, bool kHasMin>
void byte_tile(const uint8_t* codes, const uint8_t* headers, size_t header_stride, int blocks, const int16_t* x,
               int64_t x_stride, const float* scales, const float* sums, int64_t scale_stride, Float8 (*out)[2]) {
  constexpr int kGroup = kBits == 4 ? 8 : 4;  // pairs whose sum surely fits 16 bits
  const __m256i evens = _mm256_set1_epi32(1), odds = _mm256_set1_epi32(1 << 16);
  for (int b = 0; b < blocks; ++b) {
    __m256i even[R], odd[R];
    for (int r = 0; r < R; ++r)
      even[r] = odd[r] = kHasMin ? _mm256_setzero_si256() : _mm256_set1_epi32(-int(sums[r * scale_stride + b]));
#pragma GCC unroll 4
    for (int g = 0; g < 16; g += kGroup) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m256i products = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int p = g; p < g + kGroup; ++p) {
          int32_t pair;
          std::memcpy(&pair, x + r * x_stride + b * 32 + p * 2, sizeof pair);
          const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b * 512 + p * 32));
          const __m256i product = _mm256_maddubs_epi16(weights, _mm256_set1_epi32(pair));
          products = p == g ? product : _mm256_add_epi16(products, product);
        }
        even[r] = _mm256_add_epi32(even[r], _mm256_madd_epi16(products, evens));
        odd[r] = _mm256_add_epi32(odd[r], _mm256_madd_epi16(products, odds));
      }
    }
    Float8 scale_even, scale_odd, min_even{}, min_odd{};
    load_split_halves(headers + b * header_stride, scale_even, scale_odd);
    if (kHasMin) load_split_halves(headers + b * header_stride + 32, min_even, min_odd);
    for (int r = 0; r < R; ++r) {
      const float scale = scales[r * scale_stride + b];
      out[r][0] += (Float8)_mm256_cvtepi32_ps(even[r]) * (scale_even * scale);
      out[r][1] += (Float8)_mm256_cvtepi32_ps(odd[r]) * (scale_odd * scale);
      if (kHasMin) {
        out[r][0] += min_even * sums[r * scale_stride + b];
        out[r][1] += min_odd * sums[r * scale_stride + b];
      }
    }
  }
}

using ByteTile = decltype(&byte_tile<1, 4, false>);
template <int kBits, bool kHasMin, int... I>
ByteTile pick_byte_tile(int rows, std::integer_sequence<int, I...>) {
  static constexpr ByteTile table[] = {byte_tile<I + 1, kBits, kHasMin>...};
  return table[rows - 1];
}
inline ByteTile pick_byte_tile(const PackedMatrix& w, int rows) {
  constexpr auto sequence = std::make_integer_sequence<int, kByteRows>();
  if (w.bits == 4) return w.has_min ? pick_byte_tile<4, true>(rows, sequence) : pick_byte_tile<4, false>(rows, sequence);
  return w.has_min ? pick_byte_tile<5, true>(rows, sequence) : pick_byte_tile<5, false>(rows, sequence);
}

void linear_bytes(const PackedMatrix& w, const QuantizedRows& q, const float* bias, float* y, int64_t first,
                  int64_t last) {
  constexpr int64_t kStep = 16;  // blocks a pass: 8 KB of codes stay in the L1 beside the rows
  const size_t record = w.record_bytes(), header = w.header_bytes();
  const int64_t blocks = w.blocks();
  alignas(64) uint8_t unpacked[kStep * 512];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * 16;
    const int width = int(std::min<int64_t>(16, w.outputs - column));
    for (int64_t b0 = 0; b0 < blocks; b0 += kStep) {
      const int count = int(std::min(kStep, blocks - b0));
      const uint8_t* records = w.data + size_t(panel * blocks + b0) * record;
      for (int b = 0; b < count; ++b)
        unpack_unsigned(w, records + b * record + header, reinterpret_cast<int8_t*>(unpacked) + b * 512);
      for (int64_t r0 = 0; r0 < q.rows; r0 += kByteRows) {
        const int rows = int(std::min<int64_t>(kByteRows, q.rows - r0));
        Float8 out[kByteRows][2] = {};
        pick_byte_tile(w, rows)(unpacked, records, record, count, q.codes + r0 * w.inputs + b0 * 32, w.inputs,
                                q.scales + r0 * blocks + b0, q.sums + r0 * blocks + b0, blocks, out);
        for (int r = 0; r < rows; ++r) {
          float* to = y + (r0 + r) * w.outputs + column;
          alignas(32) float line[16];
          const Float8 low = __builtin_shufflevector(out[r][0], out[r][1], 0, 8, 1, 9, 2, 10, 3, 11);
          const Float8 high = __builtin_shufflevector(out[r][0], out[r][1], 4, 12, 5, 13, 6, 14, 7, 15);
          std::memcpy(line, &low, 32);
          std::memcpy(line + 8, &high, 32);
          const float* base = b0 ? to : bias ? bias + column : nullptr;
          if (width == 16) {
            for (int i = 0; i < 16; ++i) line[i] += base ? base[i] : 0.0f;
            std::memcpy(to, line, 64);
          } else {
            for (int i = 0; i < width; ++i) to[i] = line[i] + (base ? base[i] : 0.0f);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace satchel

#endif
