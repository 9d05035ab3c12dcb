#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "linear.h"

namespace satchel {

namespace {

constexpr int kPanelRows = 16;

struct Visit {  // of a row to an expert
  int64_t row;
  float weight;
};

PackedMatrix slice(const PackedMatrix& stacked, int count, int expert) {
  PackedMatrix one = stacked;
  one.outputs = stacked.outputs / count;
  one.data = stacked.data + one.bytes() * size_t(expert);
  return one;
}

// The visits to each expert, in the order of rows.
std::vector<std::vector<Visit>> route(const ExpertSettings& s, const float* logits, int64_t rows) {
  std::vector<std::vector<Visit>> visits(s.count);
  std::vector<int> order(s.count);
  for (int64_t row = 0; row < rows; ++row) {
    const float* of_row = logits + row * s.count;
    std::iota(order.begin(), order.end(), 0);
    // Logits that are no numbers come last, by index: an order must be one, whatever a damaged model computes.
    std::partial_sort(order.begin(), order.begin() + s.used, order.end(), [&](int a, int b) {
      const bool known_a = of_row[a] == of_row[a], known_b = of_row[b] == of_row[b];
      if (known_a != known_b) return known_a;
      return known_a && of_row[a] != of_row[b] ? of_row[a] > of_row[b] : a < b;
    });
    const float peak = of_row[order[0]];
    double total = 0;
    for (int i = 0; i < (s.normalized ? s.used : s.count); ++i)
      total += std::exp(double((s.normalized ? of_row[order[i]] : of_row[i]) - peak));
    for (int i = 0; i < s.used; ++i)
      visits[order[i]].push_back({row, float(std::exp(double(of_row[order[i]] - peak)) / total)});
  }
  return visits;
}

}  // namespace

void check_experts(const ExpertSettings& s, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) {
  const bool stacked = s.count > 0 && s.used > 0 && s.used <= s.count && gate.outputs % (int64_t(s.count) * kPanelRows) == 0 &&
                       down.outputs % (int64_t(s.count) * kPanelRows) == 0;
  if (!stacked || gate.outputs != up.outputs || gate.inputs != up.inputs || down.inputs != gate.outputs / s.count ||
      down.outputs / s.count != gate.inputs)
    throw std::invalid_argument("satchel.MixtureOfExperts: the experts' matrices do not fit together");
}

void mix_experts(const ExpertSettings& s, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
                 const float* x, const float* logits, int64_t rows, float* out, const Parallel& parallel) {
  const int64_t hidden = gate.inputs, width = down.inputs;
  std::fill_n(out, rows * hidden, 0.0f);
  ActivationBuffer buffer;
  std::vector<float> in, opened, inner, result;
  const std::vector<std::vector<Visit>> visits = route(s, logits, rows);
  for (int expert = 0; expert < s.count; ++expert) {
    const std::vector<Visit>& mine = visits[expert];
    const int64_t count = int64_t(mine.size());
    if (!count) continue;
    in.resize(count * hidden);
    result.resize(count * hidden);
    opened.resize(count * width);
    inner.resize(count * width);
    for (int64_t i = 0; i < count; ++i) std::memcpy(&in[i * hidden], x + mine[i].row * hidden, hidden * sizeof(float));
    linear_rows(slice(gate, s.count, expert), in.data(), count, nullptr, opened.data(), buffer, parallel);
    linear_rows(slice(up, s.count, expert), in.data(), count, nullptr, inner.data(), buffer, parallel);
    gated_rows(s.activation, opened.data(), inner.data(), opened.data(), opened.size(), parallel);
    linear_rows(slice(down, s.count, expert), opened.data(), count, nullptr, result.data(), buffer, parallel);
    for (int64_t i = 0; i < count; ++i) {
      float* to = out + mine[i].row * hidden;
      const float *from = &result[i * hidden], weight = mine[i].weight;
      for (int64_t d = 0; d < hidden; ++d) to[d] += weight * from[d];
    }
  }
}

}  // namespace satchel
