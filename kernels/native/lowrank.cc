#include "lowrank.h"

#include <algorithm>
#include <cmath>

#include "half.h"
#include "retriever.h"

namespace satchel {

bool Projection::fit(int wanted_rank, int inputs) const {
  const size_t size = size_t(wanted_rank) * inputs;
  const auto sound = [](float x) { return std::fabs(x) <= kLargestHalf; };
  return rank == wanted_rank && encoder.size() == size && decoder.size() == size &&
         std::all_of(encoder.begin(), encoder.end(), sound) && std::all_of(decoder.begin(), decoder.end(), sound);
}

std::shared_ptr<const Projection> keep_channels(const std::vector<int32_t>& channels, int head_size) {
  auto rows = std::make_shared<Projection>();
  rows->rank = int(channels.size());
  rows->channels = channels;
  rows->encoder.assign(channels.size() * head_size, 0);
  rows->decoder = rows->encoder;
  for (size_t i = 0; i < channels.size(); ++i)
    rows->encoder[channels[i] * channels.size() + i] = rows->decoder[i * head_size + channels[i]] = 1;
  return rows;
}

std::vector<int32_t> choose_channels(int rank, int head_size, int half, const float* keys, int tokens,
                                     const std::vector<float>& query_energy) {
  std::vector<double> mean(head_size), worth(head_size);
  std::vector<int32_t> channels(head_size);
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_size; ++d) mean[d] += double(keys[size_t(t) * head_size + d]) / tokens;
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < head_size; ++d) worth[d] += std::pow(keys[size_t(t) * head_size + d] - mean[d], 2);
  for (int i = 0; i < head_size / 2 && !query_energy.empty(); ++i) {
    const int a = first_channel(i, half), b = second_channel(i, half);
    const bool turned = i < half;  // into one another, by distance
    const float both = 0.5f * (query_energy[a] + query_energy[b]);
    worth[a] *= turned ? both : query_energy[a];
    worth[b] *= turned ? both : query_energy[b];
  }
  for (int d = 0; d < head_size; ++d) {
    channels[d] = d;
    if (!(worth[d] == worth[d])) worth[d] = 0;  // of keys that are no numbers: what is not ordered cannot be sorted
  }
  std::stable_sort(channels.begin(), channels.end(), [&](int a, int b) { return worth[a] > worth[b]; });
  channels.resize(rank);
  std::sort(channels.begin(), channels.end());
  return channels;
}

namespace {

// What is projected of x: its distance from the mean.
void add_distance(const std::vector<float>& mean, const float* x, std::vector<double>& distance) {
  for (size_t d = 0; d < mean.size(); ++d)
    if (x[d] == x[d]) distance[d] += double(std::min(std::max(x[d], -kLargestHalf), kLargestHalf)) - mean[d];
}

// In double: rounded to float the sums are the same, bit for bit, on every CPU.
void multiply(const Projection& by, const std::vector<double>& distance, std::vector<double>& sums, float* out) {
  const size_t rank = size_t(by.rank);
  sums.assign(rank, 0.0);
  for (size_t d = 0; d < distance.size(); ++d) {
    const float* factors = by.encoder.data() + d * rank;
    for (size_t i = 0; i < rank; ++i) sums[i] += factors[i] * distance[d];
  }
  for (size_t i = 0; i < rank; ++i) out[i] = float(sums[i]);
}

}  // namespace

void project(const Projection& by, const std::vector<float>& mean, const float* x, int tokens, int width, float* out) {
  std::vector<double> distance, sums;
  for (int t = 0; t < tokens; ++t, x += mean.size(), out += width) {
    distance.assign(mean.size(), 0.0);
    add_distance(mean, x, distance);
    std::fill_n(out, width, 0.0f);
    multiply(by, distance, sums, out);
  }
}

void project_mean(const Projection& by, const std::vector<float>& mean, const float* x, int tokens, float* out) {
  std::vector<double> distance(mean.size()), sums;
  for (int t = 0; t < tokens; ++t, x += mean.size()) add_distance(mean, x, distance);
  for (double& one : distance) one /= tokens;
  multiply(by, distance, sums, out);
}

}  // namespace satchel
