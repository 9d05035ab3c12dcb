// IEEE half precision, one number at a time; simd.h has the vectors.
#pragma once

#include <cstdint>
#include <cstring>

namespace satchel {

constexpr float kLargestHalf = 65504.0f;

// Rounds to nearest, ties to even; what is larger than kLargestHalf becomes that, NaN becomes 0.
inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return 0;
  uint32_t half;
  if (bits < 0x38800000) {  // below 2^-14: the sum's last place is the half's 2^-24
    float shifted;
    std::memcpy(&shifted, &bits, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    if (half > 0x7bff) half = 0x7bff;
  }
  return uint16_t(sign | half);
}

inline float from_half(uint16_t half) {  // finite ones; no others are written
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &magnitude, sizeof x);
  x *= 5.192296858534828e33f;  // 2^112
  return half & 0x8000 ? -x : x;
}

}  // namespace satchel
