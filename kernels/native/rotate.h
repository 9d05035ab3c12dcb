// Rotary embedding of one head, in plain C++.
#pragma once

namespace satchel {

// Half-split: channels (i, i + half) turn by rope = [cosines (half), sines (half)]; those past 2 * half are copied.
inline void rotate(const float* x, const float* rope, int half, int head_size, float scale, float* out) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = (a * rope[i] - b * rope[half + i]) * scale;
    out[i + half] = (b * rope[i] + a * rope[half + i]) * scale;
  }
  for (int i = 2 * half; i < head_size; ++i) out[i] = x[i] * scale;
}

}  // namespace satchel
