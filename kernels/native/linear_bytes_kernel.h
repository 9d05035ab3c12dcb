// Linear layers on 8-bit products (AVX2 and up), for many rows at once: included by linear_kernel.h only.
//
// Activations are unsigned bytes (code + 128) with one scale a block, weights signed bytes, in groups of 4 inputs x 8
// outputs as VPMADDUBSW and VPDPBUSD want them; the 128 is taken out through the sum of each block's weights, which is
// known when the panel is unpacked. With VPMADDUBSW the pair sums are added up in 16 bits as far as they surely fit.
#pragma once

#if defined(__AVX2__)

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "variant.h"

namespace satchel {
namespace {

// Weights of more bits keep activations of 16: rounded to 8, these would be the coarser of the two.
inline bool fits_bytes(const PackedMatrix& w) { return w.bits <= 5 && w.block == 32; }
constexpr int64_t kFewRows = 4;  // up to here unpacking into bytes is not worth it: 16-bit products of the same codes

inline float sum_of(__m256 v) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}
inline float largest_of(__m256 v) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  return *std::max_element(lanes, lanes + 8);
}

constexpr int kPassBlocks = 16;  // 2 panels x 512 inputs: 16 KB of weights stay in the L1 while all rows pass by

// Two panels of weights, ready for use.
struct BytePanels {
  alignas(64) int8_t weights[kPassBlocks][8][4][32];  // [block][4 inputs][8 outputs][output, input]
  alignas(64) float scales[kPassBlocks][32];
  alignas(64) float minima[kPassBlocks][32];
  alignas(64) int32_t corrections[kPassBlocks][32];  // -128 times the sum of the block's weights
};

// sums: of the values as quantized, so that weights with a minimum see the very same activations in both their parts.
inline void quantize_row_to_bytes(const float* x, int64_t blocks, float multiplier, uint8_t* codes, float* scales,
                                  float* sums) {
  for (int64_t b = 0; b < blocks; ++b, x += 32, codes += 32) {
    __m256 v[4], peak = _mm256_setzero_ps(), total = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + i * 8);
      peak = _mm256_max_ps(peak, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v[i]));
      total = _mm256_add_ps(total, v[i]);
    }
    const float amax = largest_of(peak);
    const __m256 inverse = _mm256_set1_ps(amax > 0 ? 127.0f / amax : 0.0f);
    __m256i n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    const __m256i added = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // the packs work in 128-bit halves
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                        _mm256_xor_si256(_mm256_permutevar8x32_epi32(bytes, order), _mm256_set1_epi8(-128)));
    // A sum that is no number must not be lost in a comparison: the scale carries it into every output.
    const float scale = (std::isfinite(sum_of(total)) ? amax : std::nanf("")) / 127.0f * multiplier;
    scales[b] = scale;
    sums[b] = sum_of(_mm256_cvtepi32_ps(added)) * scale;
  }
}

// The same codes for the 16-bit products of a few rows.
inline void quantize_row_to_words(const float* x, int64_t blocks, float multiplier, int16_t* codes, float* scales,
                                  float* sums) {
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t bytes[32];
    quantize_row_to_bytes(x + b * 32, 1, multiplier, bytes, scales + b, sums + b);
    for (int i = 0; i < 32; ++i) codes[b * 32 + i] = int16_t(bytes[i]) - 128;
  }
}

inline void unpack_panel(const PackedMatrix& w, int64_t panel, int64_t first_block, int blocks, int half,
                         BytePanels& out) {
  alignas(64) int8_t buffer[512];
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* at = w.record(panel, first_block + b);
    const int8_t* codes = signed_codes(w, panel, first_block + b, buffer);
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int quad = 0; quad < 8; ++quad) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + quad * 64));
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + quad * 64 + 32));
      const __m256i low = _mm256_unpacklo_epi16(a, c), high = _mm256_unpackhi_epi16(a, c);
      const __m256i quads[2] = {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
      for (int i = 0; i < 2; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.weights[b][quad][half * 2 + i]), quads[i]);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), quads[i]);
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(-128)));
      }
    }
    for (int i = 0; i < 2; ++i) {
      const int column = half * 16 + i * 8;
      const auto* scales = reinterpret_cast<const uint16_t*>(at) + i * 8;
      _mm256_store_si256(reinterpret_cast<__m256i*>(out.corrections[b] + column), sums[i]);
      _mm256_store_ps(out.scales[b] + column,
                      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales))));
      if (w.has_min)
        _mm256_store_ps(out.minima[b] + column,
                        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16))));
    }
  }
}

// One row x 32 outputs over `blocks` blocks. kGroup: how many pair sums of the weights' range fit 16 bits.
template <int kGroup, bool kHasMin>
inline void byte_row(const BytePanels& panels, int blocks, const uint8_t* x, const float* scales, const float* sums,
                     __m256 (&out)[4]) {
  for (int b = 0; b < blocks; ++b) {
    __m256i acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panels.corrections[b] + i * 8));
#pragma GCC unroll 8
    for (int g = 0; g < 8; g += kGroup) {
      __m256i products[4];
#pragma GCC unroll 8
      for (int quad = g; quad < g + kGroup; ++quad) {
        int32_t four;
        std::memcpy(&four, x + b * 32 + quad * 4, sizeof four);
        const __m256i inputs = _mm256_set1_epi32(four);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i weights = _mm256_load_si256(reinterpret_cast<const __m256i*>(panels.weights[b][quad][i]));
#if defined(__AVX512VNNI__)
          acc[i] = _mm256_dpbusd_epi32(acc[i], inputs, weights);
#else
          const __m256i product = _mm256_maddubs_epi16(inputs, weights);
          products[i] = quad == g ? product : _mm256_add_epi16(products[i], product);
#endif
        }
      }
#if !defined(__AVX512VNNI__)
      for (int i = 0; i < 4; ++i) acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(products[i], _mm256_set1_epi16(1)));
#else
      (void)products;
#endif
    }
    const __m256 scale = _mm256_set1_ps(scales[b]);
    for (int i = 0; i < 4; ++i)
      out[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), _mm256_mul_ps(_mm256_load_ps(panels.scales[b] + i * 8), scale),
                               out[i]);
    if (kHasMin) {
      const __m256 sum = _mm256_set1_ps(sums[b]);
      for (int i = 0; i < 4; ++i) out[i] = _mm256_fmadd_ps(_mm256_load_ps(panels.minima[b] + i * 8), sum, out[i]);
    }
  }
}

template <int kGroup, bool kHasMin>
void byte_rows(const PackedMatrix& w, const QuantizedRows& q, const BytePanels& panels, int64_t first_block, int blocks,
               const float* bias, int64_t column, int width, float* y) {
  const int64_t all_blocks = w.blocks();
  const auto* codes = reinterpret_cast<const uint8_t*>(q.codes);
  for (int64_t r = 0; r < q.rows; ++r) {
    float* to = y + r * w.outputs + column;
    const float* base = first_block ? to : bias ? bias + column : nullptr;
    alignas(32) float line[32];
    __m256 out[4];
    if (base && width < 32) std::memcpy(line, base, width * sizeof(float));
    for (int i = 0; i < 4; ++i)
      out[i] = !base ? _mm256_setzero_ps() : _mm256_loadu_ps((width < 32 ? line : base) + i * 8);
    byte_row<kGroup, kHasMin>(panels, blocks, codes + r * w.inputs + first_block * 32,
                              q.scales + r * all_blocks + first_block, q.sums + r * all_blocks + first_block, out);
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps((width < 32 ? line : to) + i * 8, out[i]);
    if (width < 32) std::memcpy(to, line, width * sizeof(float));
  }
}

void linear_bytes(const PackedMatrix& w, const QuantizedRows& q, const float* bias, float* y, int64_t first,
                  int64_t last) {
  // 255 x 16 x 2 = 8160 a pair sum for signed 5 bits: four fit; the other formats likewise.
  const auto rows = w.bits == 4 ? (w.has_min ? byte_rows<4, true> : byte_rows<4, false>)
                                : (w.has_min ? byte_rows<2, true> : byte_rows<4, false>);
  static thread_local BytePanels panels;
  const int64_t blocks = w.blocks();
  for (int64_t panel = first; panel < last; panel += 2) {
    // An odd panel at the end is unpacked twice, but only its own columns are written: another task has the next.
    const int64_t column = panel * 16, width = std::min<int64_t>(last - panel >= 2 ? 32 : 16, w.outputs - column);
    for (int64_t b0 = 0; b0 < blocks; b0 += kPassBlocks) {
      const int count = int(std::min<int64_t>(kPassBlocks, blocks - b0));
      for (int half = 0; half < 2; ++half) {
        const int64_t from = std::min(panel + half, last - 1);
        unpack_panel(w, from, b0, count, half, panels);
      }
      rows(w, q, panels, b0, count, bias, column, int(width), y);
    }
  }
}

}  // namespace
}  // namespace satchel

#endif
