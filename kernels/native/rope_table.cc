#include "rope_table.h"

#include <algorithm>
#include <cmath>

namespace satchel {

void RopeTable::prepare(const float* frequencies, int half, float factor, int positions) {
  if (half != half_ || factor != factor_ || !std::equal(frequencies_.begin(), frequencies_.end(), frequencies)) {
    half_ = half;
    factor_ = factor;
    frequencies_.assign(frequencies, frequencies + half);
    steps_.clear();
    inside_.resize(size_t(2) * half * kStep);
    for (int i = 0; i < half; ++i)
      for (int p = 0; p < kStep; ++p) {
        const double angle = double(p) * double(frequencies[i]);
        inside_[size_t(i) * kStep + p] = float(std::cos(angle)) * factor;
        inside_[size_t(half + i) * kStep + p] = float(std::sin(angle)) * factor;
      }
  }
  const size_t row = size_t(2) * half, wanted = size_t(std::max(positions, 1) + kStep - 1) / kStep;
  for (size_t step = row ? steps_.size() / row : wanted; step < wanted; ++step)
    for (int part = 0; part < 2; ++part)
      for (int i = 0; i < half; ++i) {
        const double angle = double(step) * kStep * double(frequencies[i]);
        steps_.push_back(float(part ? std::sin(angle) : std::cos(angle)));
      }
}

void RopeTable::at(int32_t position, float* out) const {
  const float* step = steps_.data() + size_t(position / kStep) * 2 * half_;
  const int inside = position % kStep;
  for (int i = 0; i < half_; ++i) {
    const float c = inside_[size_t(i) * kStep + inside], s = inside_[size_t(half_ + i) * kStep + inside];
    out[i] = step[i] * c - step[half_ + i] * s;
    out[half_ + i] = step[half_ + i] * c + step[i] * s;
  }
}

}  // namespace satchel
