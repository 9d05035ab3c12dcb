#include "retriever.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace satchel {

// kMean: codes int8 [D][16 blocks], then scales float [16].
size_t digest_page_bytes(const Retriever& retriever, int head_size) {
  switch (retriever.digest) {
    case Digest::kMean: return size_t(head_size) * kDigestBlocks + kDigestBlocks * sizeof(float);
    default: return 0;
  }
}

namespace {
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
}  // namespace

void write_digest(const Retriever& retriever, const DigestBasis& basis, int head_size, int block, const float* keys,
                  uint8_t* page) {
  if (retriever.digest == Digest::kMean) write_mean(basis, head_size, block, keys, page);
}

}  // namespace satchel
