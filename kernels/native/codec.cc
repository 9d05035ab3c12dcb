// Writing blocks: plain loops, once per pair of a conversation. Reading them is in codec_kernel.h.
//
// Products and sums must not be fused: the same pairs then give the same bytes on every CPU.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "half.h"

namespace satchel {
namespace {

constexpr int kMaxHeadSize = 256;
constexpr int kMaxOutliers = 128;
constexpr int kMaxLevels = 16;
constexpr int kPartialSums = 16;  // added up apart, in this order everywhere: a loop over them is a vector
// What a token's largest value is multiplied by before it meets the outermost level: clipping it a little makes the steps
// for all others smaller. 4 bits have steps enough that less than 0.7 never pays.
constexpr float kClips[] = {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f};
constexpr int kGroupTries = 3;       // scales of a group: the one that clips nothing and the next smaller ones
constexpr int kMeans = 40;           // steps of k-means; it stands still after about 25
constexpr int kRounds = 3;           // of levels for scales, scales for levels
constexpr size_t kSampled = 1 << 14;  // numbers that the levels are found from

// The quantizer of one side of a block.
struct Side {
  int bits;
  int head_size;  // numbers of a token in memory, a multiple of 16
  int stored;     // numbers of a token in the block: all of them, or its coefficients
  int outliers;
  const float *center, *spread;
  const float* levels;  // nullptr: even ones
  bool channel_major;   // keys, and coefficients
  bool grouped;
  int top() const { return (1 << bits) - 1; }
  float reach() const {  // the size of the outermost level
    if (bits == 8) return 127.0f;
    if (!levels) return 0.5f * float(top());
    const float far = std::max(std::fabs(levels[0]), std::fabs(levels[top()]));
    return far > 0 ? far : 1.0f;
  }
  int clips() const { return bits == 8 ? 1 : bits == 4 ? 4 : 6; }
};

// Where one level gives way to the next.
struct Borders {
  float at[kMaxLevels];
  explicit Borders(const Side& side) {
    for (int i = 0; side.levels && i < side.top(); ++i) at[i] = 0.5f * (side.levels[i] + side.levels[i + 1]);
  }
};

inline float half_sized(float x) { return std::min(std::max(x, -kLargestHalf), kLargestHalf); }

// Four floats: the vector that every CPU has. Which four go together is seen in no byte.
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
inline Four load(const float* p) {
  Four v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Four bounded(Four x, float low, float high) {
  const Four least = low - Four{}, most = high - Four{};
  x = x > least ? x : least;
  return x < most ? x : most;
}
inline Four whole(Four x) { return __builtin_convertvector(__builtin_convertvector(x, FourInts), Four); }

// The level nearest to numbers that are already divided by the scale; the upper one of two that are as near.
template <bool kUneven>
inline Four nearest(const Side& side, const Borders& borders, Four x) {
  if (kUneven) {
    Four level = side.levels[0] - Four{};
    for (int i = 0; i < side.top(); ++i) level = x >= borders.at[i] - Four{} ? side.levels[i + 1] - Four{} : level;
    return level;
  }
  if (side.bits == 8) return whole(bounded(x, -127.0f, 127.0f) + 127.5f) - 127.0f;
  const float half = float(1 << (side.bits - 1)), top = float(side.top());
  return whole(bounded(x + half, 0.0f, top + 0.5f)) - 0.5f * top;
}

template <bool kUneven>
float squared_error(const Side& side, const Borders& borders, const float* row, float scale, float inverse) {
  Four sums[kPartialSums / 4] = {};
  for (int d = 0; d < side.head_size; d += kPartialSums)
    for (int i = 0; i < kPartialSums / 4; ++i) {
      const Four x = load(row + d + 4 * i), error = x - scale * nearest<kUneven>(side, borders, x * inverse);
      sums[i] += error * error;
    }
  const Four total = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  return (total[0] + total[2]) + (total[1] + total[3]);
}

inline float inverse_of(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }

// The scale of one token's row, as a half.
uint16_t choose_scale(const Side& side, const Borders& borders, const float* row) {
  float largest = 0;
  for (int d = 0; d < side.head_size; ++d) largest = std::max(largest, std::fabs(row[d]));
  const float widest = largest / side.reach();
  uint16_t best = to_half(widest);
  if (side.clips() == 1 || largest == 0) return best;
  float least = INFINITY;
  for (int i = 0; i < side.clips(); ++i) {
    const uint16_t half = to_half(widest * kClips[i]);
    const float scale = from_half(half), inverse = inverse_of(scale);
    const float error = side.levels ? squared_error<true>(side, borders, row, scale, inverse)
                                    : squared_error<false>(side, borders, row, scale, inverse);
    if (error < least) {
      least = error;
      best = half;
    }
  }
  return best;
}

// Codes 0 .. 2^bits - 1 of a row (8 bits: code + 127, so that all are unsigned).
void quantize_row(const Side& side, const Borders& borders, const float* row, float scale, uint8_t* codes) {
  const float inverse = inverse_of(scale), lowest = side.bits == 8 ? 127.0f : 0.5f * float(side.top());
  for (int d = 0; d < side.head_size; d += 4) {
    const Four x = load(row + d) * inverse;
    FourInts code{};
    if (side.levels)
      for (int i = 0; i < side.top(); ++i) code -= x >= borders.at[i] - Four{};
    else
      code = __builtin_convertvector(nearest<false>(side, borders, x) + lowest, FourInts);
    for (int j = 0; j < 4; ++j) codes[d + j] = uint8_t(code[j]);
  }
}

void pack_run(int bits, const uint8_t* code, uint8_t* run) {
  if (bits == 8) {
    for (int j = 0; j < 16; ++j) run[j] = uint8_t(code[j] - 127);
  } else if (bits == 4) {
    for (int j = 0; j < 8; ++j) run[j] = uint8_t(code[j] | code[j + 8] << 4);
  } else {
    for (int j = 0; j < 4; ++j)
      run[j] = uint8_t((code[j] & 3) | (code[j + 4] & 3) << 2 | (code[j + 8] & 3) << 4 | (code[j + 12] & 3) << 6);
    if (bits == 2) return;
    int high = 0;
    for (int j = 0; j < 16; ++j) high |= (code[j] >> 2) << j;
    run[4] = uint8_t(high);
    run[5] = uint8_t(high >> 8);
  }
}

// The grouped form: offset and scale of one channel's 16 numbers, and their codes.
uint8_t quantize_group(const Side& side, const Borders& borders, const float* x, uint8_t* codes) {
  const auto [low, high] = std::minmax_element(x, x + kBlockTokens);
  const float middle = 0.5f * (*low + *high);
  const int offset = int(std::min(std::max(middle * 4.0f + 8.0f, 0.0f), 15.5f));
  float rest[kBlockTokens], largest = 0;
  for (int t = 0; t < kBlockTokens; ++t) {
    rest[t] = x[t] - (float(offset) - 7.5f) * 0.25f;
    largest = std::max(largest, std::fabs(rest[t]));
  }
  int widest = 0;
  while (widest < 15 && kGroupReach[widest + 1] >= largest) ++widest;
  int best = widest;
  float least = INFINITY;
  for (int i = widest; i < std::min(widest + kGroupTries, 16); ++i) {
    const float scale = kGroupReach[i] / side.reach();
    const float error = squared_error<false>(side, borders, rest, scale, inverse_of(scale));
    if (error < least) {
      least = error;
      best = i;
    }
  }
  quantize_row(side, borders, rest, kGroupReach[best] / side.reach(), codes);
  return uint8_t(offset | best << 4);
}

// x [16, D] centred and divided by the spread.
void normalise(const Side& side, const float* x, float* normal) {
  float inverse[kMaxHeadSize];
  for (int d = 0; d < side.head_size; ++d) inverse[d] = 1.0f / side.spread[d];
  for (int t = 0; t < kBlockTokens; ++t)
    for (int d = 0; d < side.head_size; ++d) {
      const float given = x[t * side.head_size + d];
      normal[t * side.head_size + d] = given == given ? (half_sized(given) - side.center[d]) * inverse[d] : 0.0f;
    }
}

// The layout's indices of the largest of `normal` (of equal ones the first), ascending; they are set to 0 there.
void take_outliers(const Side& side, float* normal, uint16_t* indices) {
  struct Found {
    float size;
    int index;
  } found[kMaxOutliers];
  const int D = side.head_size, count = side.outliers;
  const auto slot = [&](int index) {
    return side.channel_major ? index % kBlockTokens * D + index / kBlockTokens : index;
  };
  int held = 0;
  for (int index = 0; index < kBlockTokens * D; ++index) {
    const float size = std::fabs(normal[slot(index)]);
    if (held == count && !(size > found[held - 1].size)) continue;
    int at = held < count ? held++ : held - 1;
    for (; at > 0 && size > found[at - 1].size; --at) found[at] = found[at - 1];
    found[at] = {size, index};
  }
  std::sort(found, found + held, [](const Found& a, const Found& b) { return a.index < b.index; });
  for (int i = 0; i < held; ++i) {
    indices[i] = uint16_t(found[i].index);
    normal[slot(found[i].index)] = 0;
  }
}

void put_half(uint8_t* to, uint16_t half) {
  to[0] = uint8_t(half);
  to[1] = uint8_t(half >> 8);
}

void encode_side(const Side& side, const float* x, uint8_t* scales, uint8_t* outliers, uint8_t* runs) {
  const int D = side.head_size;
  const auto slot = [&](int index) {
    return side.channel_major ? index % kBlockTokens * D + index / kBlockTokens : index;
  };
  if (side.bits == 16) {
    for (int i = 0; i < kBlockTokens * side.stored; ++i) put_half(runs + 2 * i, to_half(x[slot(i)]));
    return;
  }
  float normal[kBlockTokens * kMaxHeadSize];
  uint8_t codes[kBlockTokens * kMaxHeadSize], run[16];
  normalise(side, x, normal);
  if (side.outliers) {
    uint16_t indices[kMaxOutliers];
    take_outliers(side, normal, indices);
    for (int i = 0; i < side.outliers; ++i) {
      const float given = x[slot(indices[i])];
      put_half(outliers + 4 * i, indices[i]);
      const int channel = side.channel_major ? indices[i] / kBlockTokens : indices[i] % D;
      put_half(outliers + 4 * i + 2, to_half(given == given ? given : side.center[channel]));
    }
  }
  const Borders borders(side);
  for (int d = 0; side.grouped && d < side.stored; ++d) {
    float column[kBlockTokens];
    uint8_t code[kBlockTokens];
    for (int t = 0; t < kBlockTokens; ++t) column[t] = normal[t * D + d];
    Side one = side;
    one.head_size = kBlockTokens;
    scales[d] = quantize_group(one, borders, column, code);
    for (int t = 0; t < kBlockTokens; ++t) codes[t * D + d] = code[t];
  }
  for (int t = 0; !side.grouped && t < kBlockTokens; ++t) {
    const uint16_t half = choose_scale(side, borders, normal + t * D);
    put_half(scales + 2 * t, half);
    quantize_row(side, borders, normal + t * D, from_half(half), codes + t * D);
  }
  for (int r = 0; r < side.stored; ++r) {
    for (int j = 0; j < 16; ++j) run[j] = codes[slot(r * 16 + j)];
    pack_run(side.bits, run, runs + r * run_bytes(side.bits));
  }
}

Side side_of(const Codec& codec, const HeadStatistics& statistics, int head_size, bool keys) {
  const std::vector<float>& levels = keys ? statistics.key_levels : statistics.value_levels;
  const int stored = keys ? codec.key_numbers(head_size) : codec.value_numbers(head_size);
  return {keys ? codec.key_bits : codec.value_bits,
          padded_numbers(stored),
          stored,
          codec.outliers,
          (keys ? statistics.key_center : statistics.value_center).data(),
          (keys ? statistics.key_spread : statistics.value_spread).data(),
          levels.empty() ? nullptr : levels.data(),
          keys || codec.value_rank,
          codec.grouped};
}

// Mean and standard deviation of every channel of x [tokens, D]. A channel that hardly moves gets a share of the others'
// spread: it must not be what a token's scale is made for.
void channel_statistics(const float* x, int tokens, int head_size, std::vector<float>& center,
                        std::vector<float>& spread) {
  std::vector<double> sum(head_size), squares(head_size);
  std::vector<int> counted(head_size);
  for (int64_t i = 0; i < int64_t(tokens) * head_size; ++i)
    if (x[i] == x[i]) {
      sum[i % head_size] += half_sized(x[i]);
      ++counted[i % head_size];
    }
  for (int d = 0; d < head_size; ++d) sum[d] /= std::max(counted[d], 1);
  for (int64_t i = 0; i < int64_t(tokens) * head_size; ++i)
    if (x[i] == x[i]) squares[i % head_size] += (half_sized(x[i]) - sum[i % head_size]) * (half_sized(x[i]) - sum[i % head_size]);
  double total = 0;
  for (int d = 0; d < head_size; ++d) total += squares[d] /= std::max(counted[d], 1);
  const double least = std::max(std::sqrt(total / head_size) / 64, 1e-6);
  center.resize(head_size);
  spread.resize(head_size);
  for (int d = 0; d < head_size; ++d) {
    center[d] = float(sum[d]);
    spread[d] = float(std::max(std::sqrt(squares[d]), least));
  }
}

struct Weighted {
  float x;
  double weight;
};

// Lloyd's algorithm on sorted numbers, from the given levels. A cell that is empty keeps its level.
void k_means(std::vector<Weighted>& sample, std::vector<float>& levels) {
  std::sort(sample.begin(), sample.end(), [](const Weighted& a, const Weighted& b) { return a.x < b.x; });
  std::vector<double> weights(sample.size() + 1), moments(sample.size() + 1);
  for (size_t i = 0; i < sample.size(); ++i) {
    weights[i + 1] = weights[i] + sample[i].weight;
    moments[i + 1] = moments[i] + sample[i].weight * sample[i].x;
  }
  for (int step = 0; step < kMeans; ++step) {
    std::vector<float> moved = levels;
    size_t first = 0;
    for (size_t c = 0; c < levels.size(); ++c) {
      size_t last = sample.size();
      if (c + 1 < levels.size()) {
        const float border = 0.5f * (levels[c] + levels[c + 1]);
        last = std::lower_bound(sample.begin(), sample.end(), border,
                                [](const Weighted& a, float b) { return a.x < b; }) - sample.begin();
      }
      if (weights[last] > weights[first]) moved[c] = float((moments[last] - moments[first]) / (weights[last] - weights[first]));
      first = last;
    }
    if (moved == levels) break;
    levels = moved;
  }
}

// Levels with the least squared error on a sample, each token divided by its scale and weighted by the scale's square
// (what the error is multiplied by). KVQuant weights by Fisher information instead, which needs gradients.
std::vector<float> find_levels(Side side, const float* x, int tokens) {
  const int D = side.head_size, blocks = tokens / kBlockTokens;
  std::vector<float> levels(size_t(side.top()) + 1);
  for (int i = 0; i <= side.top(); ++i) levels[i] = (float(i) - 0.5f * float(side.top())) / side.reach();
  const int wanted = std::max(1, int(kSampled / size_t(kBlockTokens * D)));
  const int used = std::min(blocks, wanted);
  std::vector<float> normal(size_t(used) * kBlockTokens * D);
  uint16_t indices[kMaxOutliers];
  for (int b = 0; b < used; ++b) {  // evenly spaced over the sample
    float* at = normal.data() + size_t(b) * kBlockTokens * D;
    normalise(side, x + size_t(int64_t(b) * blocks / used) * kBlockTokens * D, at);
    if (side.outliers) take_outliers(side, at, indices);
  }
  std::vector<Weighted> sample;
  for (int round = 0; round < kRounds; ++round) {
    side.levels = levels.data();
    const Borders borders(side);
    sample.clear();
    for (size_t t = 0; t < size_t(used) * kBlockTokens; ++t) {
      const float* row = normal.data() + t * D;
      const float scale = from_half(choose_scale(side, borders, row)), inverse = inverse_of(scale);
      for (int d = 0; d < D && scale > 0; ++d)
        sample.push_back({std::min(std::max(row[d] * inverse, -2.0f), 2.0f), double(scale) * scale});
    }
    k_means(sample, levels);
  }
  return levels;
}

bool known_bits(int bits) { return bits == 16 || bits == 8 || bits == 4 || bits == 3 || bits == 2; }

bool fit_side(const Side& side, const std::vector<float>& center, const std::vector<float>& spread,
              const std::vector<float>& levels, bool nonuniform) {
  if (side.bits == 16) return levels.empty();
  const size_t D = size_t(side.head_size);
  if (center.size() != D || spread.size() != D) return false;
  const size_t wanted = nonuniform && side.bits <= 4 ? size_t(side.top()) + 1 : 0;
  if (levels.size() != wanted) return false;
  for (float c : center)
    if (!(std::fabs(c) <= kLargestHalf)) return false;
  for (float s : spread)
    if (!(s >= 1e-7f && s <= 4 * kLargestHalf)) return false;
  for (size_t i = 0; i < levels.size(); ++i)
    if (!(std::fabs(levels[i]) <= 1e3f) || (i && levels[i] < levels[i - 1])) return false;
  return true;
}

bool known_rank(int rank) { return rank == 0 || (rank >= kLeastRank && rank <= kMaxHeadSize); }

// What makes coefficients of a side, or their rest, from so many numbers.
bool fit_projection(int rank, int inputs, const Projection* projection) {
  return !rank || (projection && projection->fit(rank, inputs));
}

bool fit_mean(int rank, int head_size, const std::vector<float>& mean) {
  return !rank || (mean.size() == size_t(head_size) &&
                   std::all_of(mean.begin(), mean.end(), [](float x) { return std::fabs(x) <= kLargestHalf; }));
}

bool fit_low_rank(const Codec& codec, int head_size, const HeadStatistics& s) {
  const int inputs = codec.paired() ? 2 * head_size : head_size;
  return std::max(codec.key_rank, codec.value_rank) <= head_size &&
         fit_mean(codec.key_rank, head_size, s.key_mean) && fit_mean(codec.value_rank, head_size, s.value_mean) &&
         fit_projection(codec.key_rank, inputs, s.key_projection.get()) &&
         fit_projection(codec.value_rank, inputs, s.value_projection.get()) &&
         fit_projection(codec.rest_numbers(head_size), inputs, s.rest_projection.get());
}

// What projections are made of: keys and values [tokens, D] side by side, or one of them, and its mean.
struct Projected {
  std::vector<float> pairs, mean;
  const float *keys, *values;  // their inputs
  Projected(const Codec& codec, const HeadStatistics& s, int head_size, const float* k, const float* v, int tokens)
      : keys(k), values(v) {
    if (!codec.paired()) return;
    mean = s.key_mean;
    mean.insert(mean.end(), s.value_mean.begin(), s.value_mean.end());
    pairs.reserve(size_t(tokens) * 2 * head_size);
    for (size_t t = 0; t < size_t(tokens); ++t)
      for (const float* side : {k, v}) pairs.insert(pairs.end(), side + t * head_size, side + (t + 1) * head_size);
    keys = values = pairs.data();
  }
  // A side's numbers [tokens, padded]: its channels, or coefficients in `room`.
  const float* numbers(const Codec& codec, const HeadStatistics& s, bool of_keys, int tokens, std::vector<float>& room) {
    const int rank = of_keys ? codec.key_rank : codec.value_rank;
    const float* x = of_keys ? keys : values;
    if (!rank) return x;
    room.resize(size_t(tokens) * padded_numbers(rank));
    project(*(of_keys ? s.key_projection : s.value_projection),
            codec.paired() ? mean : of_keys ? s.key_mean : s.value_mean, x, tokens, padded_numbers(rank), room.data());
    return room.data();
  }
};

// One side's statistics: of what is stored, be it channels or coefficients.
void calibrate_side(const Codec& codec, int head_size, bool keys, const float* x, int tokens, HeadStatistics& found) {
  const int bits = keys ? codec.key_bits : codec.value_bits;
  const int width = padded_numbers(keys ? codec.key_numbers(head_size) : codec.value_numbers(head_size));
  channel_statistics(x, tokens, width, keys ? found.key_center : found.value_center,
                     keys ? found.key_spread : found.value_spread);
  if (codec.nonuniform && bits <= 4)
    (keys ? found.key_levels : found.value_levels) = find_levels(side_of(codec, found, head_size, keys), x, tokens);
}

// The mean of what no token has coefficients of.
void encode_rest(const HeadStatistics& s, const std::vector<float>& mean, const float* pairs, uint8_t* to) {
  const int count = s.rest_projection->rank;
  std::vector<float> rest(count);
  project_mean(*s.rest_projection, mean, pairs, kBlockTokens, rest.data());
  float largest = 0;
  for (float x : rest) largest = std::max(largest, std::fabs(x));
  const uint16_t scale = to_half(largest / 7.5f);
  const float inverse = inverse_of(from_half(scale));
  put_half(to, scale);
  std::memset(to + 2, 0, size_t(count + 1) / 2);
  for (int i = 0; i < count; ++i) {
    const int code = int(std::min(std::max(rest[i] * inverse + 8.0f, 0.0f), 15.5f));
    to[2 + i / 2] |= uint8_t(code << i % 2 * 4);
  }
}

}  // namespace

bool Codec::known() const {
  return known_rank(key_rank) && known_rank(value_rank) && known_bits(key_bits) && known_bits(value_bits) && outliers >= 0 && outliers <= kMaxOutliers &&
         (outliers == 0 || key_bits < 16 || value_bits < 16) && (!nonuniform || std::min(key_bits, value_bits) <= 4) &&
         (!grouped || (!nonuniform && outliers == 0 && std::min(key_bits, value_bits) < 16));
}

bool HeadStatistics::fit(const Codec& codec, int head_size) const {
  if (!codec.known() || !block_head_size(head_size)) return false;
  return fit_low_rank(codec, head_size, *this) &&
         fit_side(side_of(codec, *this, head_size, true), key_center, key_spread, key_levels, codec.nonuniform) &&
         fit_side(side_of(codec, *this, head_size, false), value_center, value_spread, value_levels, codec.nonuniform);
}

HeadStatistics calibrate(const Codec& codec, int head_size, const float* keys, const float* values, int tokens,
                         std::shared_ptr<const Projection> key_projection,
                         std::shared_ptr<const Projection> value_projection,
                         std::shared_ptr<const Projection> rest_projection) {
  if (!codec.known() || !block_head_size(head_size))
    throw std::invalid_argument("no such codec, or a head size that is not a multiple of 16 up to 256");
  if (tokens < kLeastSample) throw std::invalid_argument("a codec is calibrated from 16 tokens or more");
  HeadStatistics found;
  found.key_projection = std::move(key_projection);
  found.value_projection = std::move(value_projection);
  found.rest_projection = std::move(rest_projection);
  std::vector<float> spread, room;
  if (codec.key_rank) channel_statistics(keys, tokens, head_size, found.key_mean, spread);
  if (codec.value_rank) channel_statistics(values, tokens, head_size, found.value_mean, spread);
  if (!fit_low_rank(codec, head_size, found))
    throw std::invalid_argument("a codec of low rank wants the projections of its ranks");
  Projected given(codec, found, head_size, keys, values, tokens);
  for (bool of_keys : {true, false})
    calibrate_side(codec, head_size, of_keys, given.numbers(codec, found, of_keys, tokens, room), tokens, found);
  return found;
}

size_t block_bytes(const Codec& codec, int head_size) { return (block_layout(codec, head_size).end + 15) / 16 * 16; }

void encode_block(const Codec& codec, const HeadStatistics& statistics, int head_size, const float* keys,
                  const float* values, uint8_t* block) {
  const BlockLayout at = block_layout(codec, head_size);
  Projected given(codec, statistics, head_size, keys, values, kBlockTokens);
  std::vector<float> room;
  encode_side(side_of(codec, statistics, head_size, true), given.numbers(codec, statistics, true, kBlockTokens, room),
              block + at.key_scales, block + at.key_outliers, block + at.keys);
  encode_side(side_of(codec, statistics, head_size, false), given.numbers(codec, statistics, false, kBlockTokens, room),
              block + at.value_scales, block + at.value_outliers, block + at.values);
  if (codec.rest_numbers(head_size)) encode_rest(statistics, given.mean, given.keys, block + at.rest);
  std::memset(block + at.end, 0, block_bytes(codec, head_size) - at.end);
}

}  // namespace satchel
