#include "retriever.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "rotate.h"

namespace satchel {

// kMean      codes int8 [D][16 blocks], then scales float [16]
// kMinMax    codes uint8 [D][16] of the least, then of the largest, then offsets float [16], scales float [16]
// kChannels  codes [16 tokens][pairs][16 blocks], a byte each: code + 8 of the pair's first channel in the low four bits,
//            of its second channel in the high ones; then scales half [16 tokens][16 blocks]
// kCluster   codes int8 [D][16], then offsets half [D], scales half [D]
size_t digest_page_bytes(const Retriever& retriever, int head_size) {
  const size_t codes = size_t(head_size) * kDigestBlocks;
  switch (retriever.digest) {
    case Digest::kMean: return codes + kDigestBlocks * sizeof(float);
    case Digest::kMinMax: return 2 * codes + 2 * kDigestBlocks * sizeof(float);
    case Digest::kChannels: return size_t(kDigestTokens) * (retriever.pairs_of(head_size) + sizeof(uint16_t));
    case Digest::kCluster: return codes + 2 * head_size * sizeof(uint16_t);
    default: return 0;
  }
}

namespace {

constexpr float kLargestNibble = 7;

// The pairs of channels in which keys differ most, weighed by how much queries have there.
std::vector<int32_t> choose_pairs(const Retriever& retriever, int head_size, int half, const float* keys, int tokens,
                                  const std::vector<float>& mean, const std::vector<float>& query_energy) {
  const int D = head_size;
  std::vector<float> variance(D), energy(D / 2);
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < D; ++d) {
      const float x = keys[size_t(t) * D + d] - mean[d];
      variance[d] += x * x / float(tokens);
    }
  std::vector<int32_t> pairs(D / 2);
  for (int i = 0; i < D / 2; ++i) {
    const int a = first_channel(i, half), b = second_channel(i, half);
    pairs[i] = i;
    energy[i] = (variance[a] + variance[b]) * (query_energy.empty() ? 1.0f : query_energy[a] + query_energy[b]);
  }
  std::stable_sort(pairs.begin(), pairs.end(), [&](int a, int b) { return energy[a] > energy[b]; });
  pairs.resize(retriever.pairs_of(D));
  std::sort(pairs.begin(), pairs.end());
  return pairs;
}

void write_mean(const DigestBasis& basis, int head_size, int block, const float* keys, uint8_t* page) {
  std::vector<float> mean(head_size);
  float largest = 0;
  for (int d = 0; d < head_size; ++d) {
    float total = 0;
    for (int t = 0; t < kBlockTokens; ++t) total += keys[size_t(t) * head_size + d];
    mean[d] = total / kBlockTokens - basis.center[size_t(d) * kDigestBlocks + block];
    largest = std::max(largest, std::fabs(mean[d]));
  }
  const float scale = largest / 127;
  auto* codes = reinterpret_cast<int8_t*>(page);
  for (int d = 0; d < head_size; ++d)
    codes[d * kDigestBlocks + block] = scale > 0 ? int8_t(std::lrint(mean[d] / scale)) : int8_t(0);
  std::memcpy(page + size_t(head_size) * kDigestBlocks + block * sizeof(float), &scale, sizeof scale);
}

void write_min_max(const DigestBasis& basis, int head_size, int block, const float* keys, uint8_t* page) {
  const int D = head_size;
  std::vector<float> least(D), most(D);
  for (int d = 0; d < D; ++d) {
    least[d] = most[d] = keys[d];
    for (int t = 1; t < kBlockTokens; ++t) {
      least[d] = std::min(least[d], keys[size_t(t) * D + d]);
      most[d] = std::max(most[d], keys[size_t(t) * D + d]);
    }
    least[d] -= basis.center[size_t(d) * kDigestBlocks + block];
    most[d] -= basis.center[size_t(d) * kDigestBlocks + block];
  }
  const float offset = *std::min_element(least.begin(), least.end());
  const float scale = (*std::max_element(most.begin(), most.end()) - offset) / 255;
  const auto bounded = [](float code) { return uint8_t(std::min(std::max(code, 0.0f), 255.0f)); };
  for (int d = 0; d < D; ++d) {  // rounded outward: what a block could hold is never more than its bound
    page[d * kDigestBlocks + block] = scale > 0 ? bounded(std::floor((least[d] - offset) / scale)) : uint8_t(0);
    page[(D + d) * kDigestBlocks + block] = scale > 0 ? bounded(std::ceil((most[d] - offset) / scale)) : uint8_t(0);
  }
  uint8_t* after = page + 2 * size_t(D) * kDigestBlocks;
  std::memcpy(after + block * sizeof(float), &offset, sizeof offset);
  std::memcpy(after + (kDigestBlocks + block) * sizeof(float), &scale, sizeof scale);
}

void write_channels(const DigestBasis& basis, int head_size, int half, int block, const float* keys, uint8_t* page) {
  const int count = int(basis.pairs.size());
  const auto rest = [&](int t, int d) {
    return keys[size_t(t) * head_size + d] - basis.center[size_t(d) * kDigestBlocks + block];
  };
  for (int t = 0; t < kBlockTokens; ++t) {
    float largest = 0;
    for (int pair : basis.pairs)
      largest = std::max({largest, std::fabs(rest(t, first_channel(pair, half))), std::fabs(rest(t, second_channel(pair, half)))});
    const uint16_t stored = to_half(largest / kLargestNibble);
    const float scale = from_half(stored);
    const auto code = [&](float x) {
      const float rounded = scale > 0 ? std::rint(x / scale) : 0.0f;
      return int(std::min(std::max(rounded, -kLargestNibble), kLargestNibble)) + kNibbleZero;
    };
    for (int i = 0; i < count; ++i)
      page[(size_t(t) * count + i) * kDigestBlocks + block] =
          uint8_t(code(rest(t, first_channel(basis.pairs[i], half))) |
                  code(rest(t, second_channel(basis.pairs[i], half))) << 4);
    std::memcpy(page + size_t(kDigestTokens) * count + (t * kDigestBlocks + block) * sizeof stored, &stored, sizeof stored);
  }
}

}  // namespace

DigestBasis make_basis(const Retriever& retriever, int head_size, const RopeTable& rope, const float* keys, int tokens,
                       const std::vector<float>& query_energy) {
  const int D = head_size, half = rope.half();
  DigestBasis basis;
  if (retriever.digest == Digest::kNone) return basis;
  std::vector<float> mean(D), row(2 * half), turned(D);
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < D; ++d) mean[d] += keys[size_t(t) * D + d] / float(tokens);
  basis.center.assign(size_t(kDigestBlocks) * D, 0);
  for (int t = 0; t < kDigestTokens; ++t) {
    rope.at(t, row.data());
    rotate(mean.data(), row.data(), half, D, 1.0f, turned.data());
    for (int d = 0; d < D; ++d) basis.center[size_t(d) * kDigestBlocks + t / kBlockTokens] += turned[d] / kBlockTokens;
  }
  if (retriever.clustered())
    for (int d = 0; d < D; ++d) {
      float* center = basis.center.data() + size_t(d) * kDigestBlocks;
      float total = 0;
      for (int b = 0; b < kDigestBlocks; ++b) total += center[b];
      std::fill_n(center, kDigestBlocks, total / kDigestBlocks);
    }
  if (retriever.digest == Digest::kChannels)
    basis.pairs = choose_pairs(retriever, D, half, keys, tokens, mean, query_energy);
  return basis;
}

void write_digest(const Retriever& retriever, const DigestBasis& basis, int head_size, int half, int block,
                  const float* keys, uint8_t* page) {
  switch (retriever.digest) {
    case Digest::kMean: return write_mean(basis, head_size, block, keys, page);
    case Digest::kMinMax: return write_min_max(basis, head_size, block, keys, page);
    case Digest::kChannels: return write_channels(basis, head_size, half, block, keys, page);
    default: return;
  }
}

void write_clusters(const DigestBasis& basis, int head_size, const float* keys, uint8_t* page) {
  const int D = head_size;
  auto* codes = reinterpret_cast<int8_t*>(page);
  uint8_t* after = page + size_t(D) * kDigestBlocks;
  for (int d = 0; d < D; ++d) {  // a channel's scale is its own: where keys lie far from zero, clusters lie far apart
    float means[kDigestBlocks] = {}, least, most;
    for (int i = 0; i < kDigestTokens; ++i) means[i / kBlockTokens] += keys[size_t(i) * D + d] / kBlockTokens;
    for (float& mean : means) mean -= basis.center[size_t(d) * kDigestBlocks];
    least = *std::min_element(means, means + kDigestBlocks);
    most = *std::max_element(means, means + kDigestBlocks);
    const uint16_t offset = to_half((least + most) / 2), scale = to_half((most - least) / 254);
    const float from = from_half(offset), step = from_half(scale);
    for (int b = 0; b < kDigestBlocks; ++b) {
      const float code = step > 0 ? std::rint((means[b] - from) / step) : 0.0f;
      codes[d * kDigestBlocks + b] = int8_t(std::min(std::max(code, -127.0f), 127.0f));
    }
    std::memcpy(after + d * sizeof offset, &offset, sizeof offset);
    std::memcpy(after + (D + d) * sizeof scale, &scale, sizeof scale);
  }
}

}  // namespace satchel
