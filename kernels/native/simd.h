// Vectors of the instruction set that this file is compiled for.
//
// Written with the compiler's vector extensions, so that the same source serves SSE2, AVX2, AVX-512 and NEON; only what
// they cannot say (the 16-bit pair product, half-precision conversion) has a line per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace satchel {
namespace {  // every variant has its own copy: nothing here may be merged across instruction sets by the linker

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 12;  // rows of a register tile; the accumulators fill the register file (32 x 512 bit)
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 6 rows x 16 columns = 12 of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRows = 6;  // 24 of 32 registers
#else
constexpr int kLanes = 4;
constexpr int kRows = 3;  // 12 of 16 registers
#endif
constexpr int kTile = 16;                // columns of every register tile
constexpr int kVectors = kTile / kLanes;  // registers for one row of it

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef int16_t Short __attribute__((vector_size(kLanes * 4)));
typedef int8_t HalfBytes __attribute__((vector_size(kLanes * 2)));
typedef uint16_t HalfShorts __attribute__((vector_size(kLanes * 2)));

inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
inline Float splat(float x) { return x - Float{}; }
inline Float to_float(Int v) { return __builtin_convertvector(v, Float); }

// bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};
inline Float load(const bf16* p) {
  HalfShorts h;
  std::memcpy(&h, p, sizeof h);
  typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
  Unsigned wide = __builtin_convertvector(h, Unsigned) << 16;
  Float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

inline Float max(Float a, Float b) { return a > b ? a : b; }
inline Float min(Float a, Float b) { return a < b ? a : b; }
inline float sum(Float v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline float largest(Float v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x for x <= 88; relative error below 3e-7; 0 below -87.
inline Float exp(Float x) {
  const Float clamped = max(x, splat(-87.0f));
  const Float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Float n = shifted - 12582912.0f;
  const Float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Float p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Int bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += __builtin_convertvector(n, Int) << 23;
  Float result;
  std::memcpy(&result, &bits, sizeof result);
  return x < splat(-87.0f) ? Float{} : result;
}

// The natural logarithm of positive, normal numbers; relative error below 3e-7.
inline Float log(Float x) {
  Int bits;
  std::memcpy(&bits, &x, sizeof bits);
  Int exponent = (bits >> 23) - 126;
  bits = (bits & 0x007fffff) | 0x3f000000;  // the mantissa in [0.5, 1)
  Float m;
  std::memcpy(&m, &bits, sizeof m);
  const Int below = m < splat(0.707106781f);  // -1 where it is: there twice the mantissa, one exponent less
  exponent += below;
  const Float r = (below ? m + m : m) - 1.0f;
  Float p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const Float n = to_float(exponent), square = r * r;
  return (p * r - 0.5f) * square + r + n * 0.693359375f - n * 2.12194440e-4f;
}

// IEEE half precision, kLanes of them, to float.
inline Float load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and mantissa moved into place, then scaled by 2^112; exact for subnormals too (no infinities are stored).
  HalfShorts h;
  std::memcpy(&h, p, sizeof h);
  Int wide = __builtin_convertvector(h, Int) & 0xffff;
  Int magnitude = (wide & 0x7fff) << 13;
  Float v;
  std::memcpy(&v, &magnitude, sizeof v);
  v *= 5.192296858534828e33f;
  Int bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits |= (wide & 0x8000) << 16;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

// 2 * kLanes signed bytes, widened to 16 bits.
inline Short load_codes(const int8_t* p) {
#if defined(__AVX512BW__)
  return (Short)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Short)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__SSE2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Short)_mm_srai_epi16(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes), 8);
#else
  HalfBytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Short);
#endif
}
// The pair p[0], p[1] in every 32-bit lane.
inline Short splat_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return (Short)(pair - Int{});
}
// a[2i]*b[2i] + a[2i+1]*b[2i+1] in 32 bits.
inline Int pair_products(Short a, Short b) {
#if defined(__AVX512BW__)
  return (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const Int x = (Int)a, y = (Int)b;
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

}  // namespace
}  // namespace satchel
