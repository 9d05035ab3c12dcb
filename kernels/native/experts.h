// A mixture of experts: each token passes the few feed-forward blocks that its router's logits prefer.
#pragma once

#include "parallel.h"
#include "variant.h"

namespace satchel {

struct ExpertSettings {
  int count, used;
  bool normalized;  // the weights of a token's experts add up to 1
  Activation activation;
};

// Throws std::invalid_argument when the stacked matrices [count * outputs, inputs] do not fit together.
void check_experts(const ExpertSettings&, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down);

// out [rows, hidden]: the sum over a row's experts of weight * down(activation(gate(x)) * up(x)); the weights are the
// softmax of logits [rows, count].
void mix_experts(const ExpertSettings&, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
                 const float* x, const float* logits, int64_t rows, float* out, const Parallel&);

}  // namespace satchel
