// Quantized linear layers and gated units over many threads, as the operators use them.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "variant.h"

namespace satchel {

// Memory for quantized activations, one for each thread that runs graphs, kept from layer to layer.
struct ActivationBuffer {
  std::vector<int16_t> codes;
  std::vector<float> scales, sums;
  QuantizedRows rows(const PackedMatrix& w, int64_t count) {
    const size_t values = size_t(count) * w.inputs, blocks = size_t(count) * w.blocks();
    if (codes.size() < values) codes.resize(values);
    if (scales.size() < blocks) scales.resize(blocks), sums.resize(blocks);
    return {codes.data(), scales.data(), sums.data(), count};
  }
};

// y [rows, outputs] = x [rows, inputs] times the weights' transpose, plus bias [outputs] if there is one.
inline void linear_rows(const PackedMatrix& w, const float* x, int64_t rows, const float* bias, float* y,
                        ActivationBuffer& buffer, const Parallel& parallel) {
  const Variant& variant = active_variant();
  QuantizedRows quantized = buffer.rows(w, rows);
  constexpr int64_t kRowsPerTask = 16;
  parallel(size_t((rows + kRowsPerTask - 1) / kRowsPerTask), [&](size_t task) {
    const int64_t first = int64_t(task) * kRowsPerTask;
    variant.quantize_rows(w, x, quantized, first, std::min(rows, first + kRowsPerTask));
  });
  // One row: tasks of about 64 KB of weights, above the cost of handing out a task. Many rows: 4 panels.
  const int64_t panel_bytes = w.blocks() * int64_t(w.record_bytes());
  const int64_t per_task = rows > 8 ? 4 : std::max<int64_t>(1, 65536 / panel_bytes);
  parallel(size_t((w.panels() + per_task - 1) / per_task), [&](size_t task) {
    const int64_t first = int64_t(task) * per_task;
    variant.linear(w, quantized, bias, y, first, std::min(w.panels(), first + per_task));
  });
}

// out = activation(gate) * up; `out` may be `gate`.
inline void gated_rows(Activation activation, const float* gate, const float* up, float* out, size_t count,
                       const Parallel& parallel) {
  constexpr size_t kSlice = 1 << 15;
  parallel((count + kSlice - 1) / kSlice, [&](size_t task) {
    const size_t first = task * kSlice;
    active_variant().gated(activation, gate + first, up + first, out + first, std::min(kSlice, count - first));
  });
}

}  // namespace satchel
