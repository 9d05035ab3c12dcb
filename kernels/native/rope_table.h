// Rotations (RoPE) to any position from two small tables: one in steps of 256 positions, one inside a step.
#pragma once

#include <cstdint>
#include <vector>

namespace satchel {

// What kernels see. A rotation to position p is steps[p / 256] times inside[p % 256], as complex numbers.
struct RopeView {
  int half;             // pairs of channels (i, i + half) that rotate; the others stay
  const float* steps;   // [positions / 256][2 * half]: cosines, then sines
  const float* inside;  // [2 * half][256]: cosines by pair, then sines by pair; times the attention factor
};

class RopeTable {
 public:
  static constexpr int kStep = 256;
  // Makes the table right for these frequencies and for positions below `positions`; cheap when it is already.
  void prepare(const float* frequencies, int half, float factor, int positions);
  RopeView view() const { return {half_, steps_.data(), inside_.data()}; }
  // cosines [half], then sines [half], times the attention factor
  void at(int32_t position, float* out) const;
  float factor() const { return factor_; }
  int half() const { return half_; }

 private:
  int half_ = -1;
  float factor_ = 1;
  std::vector<float> frequencies_, steps_, inside_;
};

}  // namespace satchel
