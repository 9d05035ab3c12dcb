// The groups of tokens that the cluster digest stands for (retriever.h).
#include <algorithm>
#include <cmath>
#include <vector>

#include "retriever.h"

namespace satchel {

namespace {
constexpr int kRounds = 4;   // of new means; later ones change little
constexpr int kPasses = 4;   // over all pairs of tokens, for the same means
constexpr float kLeastGain = 1e-6f;  // below it an exchange could be taken back by rounding
}  // namespace

void cluster_page(const float* keys, int head_size, int first, uint8_t* order) {
  const int D = head_size, T = kDigestTokens;
  std::vector<float> unit(size_t(D) * T);  // [D][256]
  std::vector<int> group(T);
  for (int t = 0; t < T; ++t) {
    float energy = 0;
    for (int d = 0; d < D; ++d) energy += keys[size_t(t) * D + d] * keys[size_t(t) * D + d];
    const float scale = energy > 0 ? 1 / std::sqrt(energy) : 0;
    for (int d = 0; d < D; ++d) unit[size_t(d) * T + t] = keys[size_t(t) * D + d] * scale;
    group[t] = t / kBlockTokens;
  }
  std::vector<float> likeness(size_t(kDigestBlocks) * T), mean(D);  // [16 groups][256]
  for (int round = 0; round < kRounds; ++round) {
    std::fill(likeness.begin(), likeness.end(), 0.0f);
    for (int g = first / kBlockTokens; g < kDigestBlocks; ++g) {
      for (int d = 0; d < D; ++d) {
        mean[d] = 0;
        for (int t = 0; t < T; ++t) mean[d] += group[t] == g ? unit[size_t(d) * T + t] : 0.0f;
      }
      float energy = 0;
      for (int d = 0; d < D; ++d) energy += mean[d] * mean[d];
      const float scale = energy > 0 ? 1 / std::sqrt(energy) : 0;
      float* row = likeness.data() + size_t(g) * T;
      for (int d = 0; d < D; ++d) {
        const float m = mean[d] * scale;
        for (int t = 0; t < T; ++t) row[t] += unit[size_t(d) * T + t] * m;
      }
    }
    bool moved = false, again = true;
    for (int pass = 0; pass < kPasses && again; ++pass) {
      again = false;
      for (int a = first; a < T; ++a)
        for (int b = a + 1; b < T; ++b) {
          if (group[a] == group[b]) continue;
          const float *to_a = likeness.data() + size_t(group[a]) * T, *to_b = likeness.data() + size_t(group[b]) * T;
          if ((to_b[a] - to_a[a]) + (to_a[b] - to_b[b]) <= kLeastGain) continue;
          std::swap(group[a], group[b]);
          moved = again = true;
        }
    }
    if (!moved) break;
  }
  int at[kDigestBlocks];
  for (int g = 0; g < kDigestBlocks; ++g) at[g] = g * kBlockTokens;
  for (int t = 0; t < T; ++t) order[at[group[t]]++] = uint8_t(t);
}

}  // namespace satchel
