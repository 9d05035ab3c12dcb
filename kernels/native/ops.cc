// The operators of the domain "satchel", as ONNX Runtime sees them.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "experts.h"
#include "kv_cache.h"
#include "linear.h"
#include "ort_api.h"
#include "parallel.h"
#include "variant.h"

namespace satchel {
namespace {

ort::Api api;

Parallel pool_of(const ort::KernelContext* context) {
  return [context](size_t count, const Body& body) {
    if (count <= 1) return serial(count, body);
    Guarded guarded(body);
    api.parallel_for(context, [](void* user, size_t i) { (*static_cast<Guarded*>(user))(i); }, count, &guarded);
    guarded.rethrow();
  };
}

struct Matrix {
  const float* data;
  int64_t rows, columns;
};
Matrix matrix(const ort::KernelContext* context, size_t index) {
  const ort::Value* value = api.input(context, index);
  int64_t sizes[2] = {1, 1};
  const size_t rank = api.shape(value, sizes, 2);
  if (rank != 2) throw std::invalid_argument("satchel op: input " + std::to_string(index) + " must be a matrix");
  return {api.data<const float>(value), sizes[0], sizes[1]};
}
// An attribute that must lie in [0, limit]: anything else would be cut when it is made an int.
int small_attribute(const ort::KernelInfo* info, const char* name, int64_t limit = 1 << 30) {
  const int64_t value = api.attribute_int(info, name);
  if (value < 0 || value > limit)
    throw std::invalid_argument("satchel op: attribute " + std::string(name) + " is " + std::to_string(value));
  return int(value);
}
int64_t length(const ort::Value* value) {
  int64_t size = 1;
  api.shape(value, &size, 1);
  return size;
}

// `prefix` is for operators with several packed matrices.
PackedMatrix packed_attributes(const ort::KernelInfo* info, const std::string& prefix = "") {
  const auto integer = [&](const char* name) { return api.attribute_int(info, (prefix + name).c_str()); };
  PackedMatrix w{};
  w.outputs = integer("N");
  w.inputs = integer("K");
  const int64_t bits = integer("bits"), block = integer("block");
  w.has_min = integer("has_min") != 0;
  w.split = prefix.empty() && integer("split") != 0;  // matrices of experts never are
  w.multiplier = api.attribute_float(info, (prefix + "multiplier").c_str());
  w.bits = bits >= 0 && bits <= 8 ? int(bits) : 0;
  w.block = block == 16 || block == 32 ? int(block) : 0;
  if (!w.known()) throw std::invalid_argument("satchel op: a packed weight format that this version does not know");
  return w;
}
PackedMatrix packed(const PackedMatrix& attributes, const ort::KernelContext* context, size_t index) {
  PackedMatrix w = attributes;
  const ort::Value* value = api.input(context, index);
  w.data = api.data<const uint8_t>(value);
  if (size_t(length(value)) != w.bytes()) throw std::invalid_argument("satchel op: packed weights have the wrong size");
  return w;
}

// An optional input; null where there is none.
const float* bias_of(const ort::KernelContext* context, size_t index, const PackedMatrix& w) {
  if (api.input_count(context) <= index) return nullptr;
  const ort::Value* value = api.input(context, index);
  if (!value) return nullptr;
  if (length(value) != w.outputs) throw std::invalid_argument("satchel op: bias has the wrong size");
  return api.data<const float>(value);
}

class QuantizedLinear {
 public:
  static constexpr const char* kName = "QuantizedLinear";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8, ort::kFloat};
  static constexpr size_t kInputCount = 3, kRequiredInputs = 2;
  explicit QuantizedLinear(const ort::KernelInfo* info) : attributes_(packed_attributes(info)) {}

  void compute(ort::KernelContext* context) const {
    const Matrix x = matrix(context, 0);
    const PackedMatrix w = packed(attributes_, context, 1);
    const float* bias = bias_of(context, 2, w);
    if (x.columns != w.inputs) throw std::invalid_argument("satchel.QuantizedLinear: x has the wrong width");
    const int64_t sizes[2] = {x.rows, w.outputs};
    float* y = api.data<float>(api.output(context, 0, sizes, 2));
    if (x.rows == 0) return;

    static thread_local ActivationBuffer buffer;
    linear_rows(w, x.data, x.rows, bias, y, buffer, pool_of(context));
  }

 private:
  PackedMatrix attributes_;
};

// The last position's logits, exact for as many of the best words as the third input [1] says (0: for all).
class VocabularyProjection {
 public:
  static constexpr const char* kName = "VocabularyProjection";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8, ort::kInt64, ort::kFloat};
  static constexpr size_t kInputCount = 4, kRequiredInputs = 3;
  explicit VocabularyProjection(const ort::KernelInfo* info) : attributes_(packed_attributes(info)) {
    if (!attributes_.split) throw std::invalid_argument("satchel.VocabularyProjection: the matrix must be split");
  }

  void compute(ort::KernelContext* context) const {
    const Matrix x = matrix(context, 0);
    const PackedMatrix w = packed(attributes_, context, 1);
    const float* bias = bias_of(context, 3, w);
    if (x.columns != w.inputs || x.rows != 1)
      throw std::invalid_argument("satchel.VocabularyProjection: x must be one row of the matrix's width");
    const ort::Value* best_words = api.input(context, 2);
    if (length(best_words) != 1) throw std::invalid_argument("satchel.VocabularyProjection: best_words must be one number");
    const int64_t sizes[2] = {1, w.outputs};
    static thread_local ActivationBuffer buffer;
    vocabulary_row(w, x.data, bias, *api.data<const int64_t>(best_words),
                   api.data<float>(api.output(context, 0, sizes, 2)), buffer, pool_of(context));
  }

 private:
  PackedMatrix attributes_;
};

class QuantizedEmbedding {
 public:
  static constexpr const char* kName = "QuantizedEmbedding";
  static constexpr int kInputs[] = {ort::kInt64, ort::kUint8};
  static constexpr size_t kInputCount = 2, kRequiredInputs = 2;
  explicit QuantizedEmbedding(const ort::KernelInfo* info) : attributes_(packed_attributes(info)) {}

  void compute(ort::KernelContext* context) const {
    const ort::Value* ids_value = api.input(context, 0);
    const int64_t tokens = length(ids_value);
    const auto* ids = api.data<const int64_t>(ids_value);
    const PackedMatrix w = packed(attributes_, context, 1);
    const int64_t sizes[2] = {tokens, w.inputs};
    float* out = api.data<float>(api.output(context, 0, sizes, 2));
    for (int64_t t = 0; t < tokens; ++t) {
      if (ids[t] < 0 || ids[t] >= w.outputs)
        throw std::invalid_argument("token id " + std::to_string(ids[t]) + " is outside the vocabulary of " +
                                    std::to_string(w.outputs));
      active_variant().embed(w, ids[t], out + t * w.inputs);
    }
  }

 private:
  PackedMatrix attributes_;
};

Activation activation_attribute(const ort::KernelInfo* info) {
  return Activation(small_attribute(info, "activation", int64_t(Activation::kGeluTanh)));
}

class GatedUnit {
 public:
  static constexpr const char* kName = "GatedUnit";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat};
  static constexpr size_t kInputCount = 2, kRequiredInputs = 2;
  explicit GatedUnit(const ort::KernelInfo* info) : activation_(activation_attribute(info)) {}

  void compute(ort::KernelContext* context) const {
    const Matrix gate = matrix(context, 0), up = matrix(context, 1);
    if (gate.rows != up.rows || gate.columns != up.columns)
      throw std::invalid_argument("satchel.GatedUnit: gate and up differ in shape");
    const int64_t sizes[2] = {gate.rows, gate.columns};
    float* out = api.data<float>(api.output(context, 0, sizes, 2));
    gated_rows(activation_, gate.data, up.data, out, size_t(gate.rows) * gate.columns, pool_of(context));
  }

 private:
  Activation activation_;
};

// The feed-forward blocks of a mixture of experts; the three matrices are stacked by expert along their outputs.
class MixtureOfExperts {
 public:
  static constexpr const char* kName = "MixtureOfExperts";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kUint8, ort::kUint8, ort::kUint8};
  static constexpr size_t kInputCount = 5, kRequiredInputs = 5;
  explicit MixtureOfExperts(const ort::KernelInfo* info)
      : gate_(packed_attributes(info, "gate_")), up_(packed_attributes(info, "up_")),
        down_(packed_attributes(info, "down_")) {
    settings_.count = small_attribute(info, "experts");
    settings_.used = small_attribute(info, "used");
    settings_.normalized = api.attribute_int(info, "normalized") != 0;
    settings_.activation = activation_attribute(info);
    check_experts(settings_, gate_, up_, down_);
  }

  void compute(ort::KernelContext* context) const {
    const Matrix x = matrix(context, 0), logits = matrix(context, 1);
    if (x.columns != gate_.inputs || logits.columns != settings_.count || logits.rows != x.rows)
      throw std::invalid_argument("satchel.MixtureOfExperts: the inputs' shapes disagree");
    const int64_t sizes[2] = {x.rows, x.columns};
    float* out = api.data<float>(api.output(context, 0, sizes, 2));
    mix_experts(settings_, packed(gate_, context, 2), packed(up_, context, 3), packed(down_, context, 4), x.data,
                logits.data, x.rows, out, pool_of(context));
  }

 private:
  PackedMatrix gate_, up_, down_;
  ExpertSettings settings_{};
};

class CachedAttention {
 public:
  static constexpr const char* kName = "CachedAttention";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt64, ort::kInt64, ort::kFloat,
                                    ort::kFloat};
  static constexpr size_t kInputCount = 7, kRequiredInputs = 6;
  explicit CachedAttention(const ort::KernelInfo* info)
      : heads_(int(std::clamp<int64_t>(api.attribute_int(info, "heads"), -1, 1 << 20))),
        kv_heads_(int(std::clamp<int64_t>(api.attribute_int(info, "kv_heads"), -1, 1 << 20))),
        head_size_(int(std::clamp<int64_t>(api.attribute_int(info, "head_size"), -1, 1 << 20))) {
    settings_.layer = int(std::clamp<int64_t>(api.attribute_int(info, "layer"), -1, 1 << 20));
    settings_.scale = api.attribute_float(info, "scale");
    settings_.softcap = api.attribute_float(info, "softcap");
    settings_.window = small_attribute(info, "window");
    settings_.rope_dims = int(std::clamp<int64_t>(api.attribute_int(info, "rope_dims"), -1, 1 << 20));
    settings_.rope_attention_factor = api.attribute_float(info, "rope_attention_factor");
  }

  void compute(ort::KernelContext* context) const {
    const Matrix q = matrix(context, 0), k = matrix(context, 1), v = matrix(context, 2);
    const ort::Value* positions = api.input(context, 3);
    const ort::Value* frequencies = api.input(context, 5);
    const auto cache = find_cache(*api.data<const int64_t>(api.input(context, 4)));
    const CacheShape& shape = cache->shape();
    if (shape.heads != heads_ || shape.kv_heads != kv_heads_ || shape.head_size != head_size_)
      throw std::invalid_argument("satchel.CachedAttention: the cache was made for another model");
    const int64_t kv_width = int64_t(kv_heads_) * head_size_;
    if (q.columns != int64_t(heads_) * head_size_ || k.columns != kv_width || v.columns != kv_width ||
        k.rows != q.rows || v.rows != q.rows || length(positions) != q.rows ||
        length(frequencies) != settings_.rope_dims / 2)
      throw std::invalid_argument("satchel.CachedAttention: the inputs' shapes disagree");
    const float* retention = nullptr;
    if (api.input_count(context) > 6 && api.input(context, 6)) {
      const Matrix scores = matrix(context, 6);
      if (scores.rows != q.rows || scores.columns != kv_heads_)
        throw std::invalid_argument("satchel.CachedAttention: retention has the wrong shape");
      retention = scores.data;
    }
    const int64_t sizes[2] = {q.rows, q.columns};
    float* out = api.data<float>(api.output(context, 0, sizes, 2));
    cache->attend(settings_, q.data, k.data, v.data, api.data<const int64_t>(positions), int(q.rows),
                  api.data<const float>(frequencies), out, pool_of(context), retention);
  }

 private:
  int heads_, kv_heads_, head_size_;
  AttentionSettings settings_{};
};

// The table of C functions that makes a class above an operator. No C++ exception crosses into ONNX Runtime.
template <class Op>
const ort::CustomOp* table() {
  static const ort::CustomOp op = [] {
    ort::CustomOp t{};
    t.version = ort::kApiVersion;
    t.name = [](const ort::CustomOp*) { return Op::kName; };
    t.execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    t.input_type = [](const ort::CustomOp*, size_t i) { return Op::kInputs[i]; };
    t.input_count = [](const ort::CustomOp*) { return Op::kInputCount; };
    t.output_type = [](const ort::CustomOp*, size_t) { return int(ort::kFloat); };
    t.output_count = [](const ort::CustomOp*) { return size_t(1); };
    t.input_characteristic = [](const ort::CustomOp*, size_t i) {
      return int(i < Op::kRequiredInputs ? ort::kRequired : ort::kOptional);
    };
    t.output_characteristic = [](const ort::CustomOp*, size_t) { return int(ort::kRequired); };
    t.input_memory_type = [](const ort::CustomOp*, size_t) { return 0; };
    t.variadic_input_min = [](const ort::CustomOp*) { return 1; };
    t.variadic_input_homogeneous = [](const ort::CustomOp*) { return 1; };
    t.variadic_output_min = [](const ort::CustomOp*) { return 1; };
    t.variadic_output_homogeneous = [](const ort::CustomOp*) { return 1; };
    t.start_version = [](const ort::CustomOp*) { return 1; };
    t.end_version = [](const ort::CustomOp*) { return INT32_MAX; };
    t.destroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
    t.create_kernel_v2 = [](const ort::CustomOp*, const void*, const ort::KernelInfo* info,
                            void** kernel) -> ort::Status* {
      try {
        *kernel = new Op(info);
        return nullptr;
      } catch (const std::exception& error) {
        return api.create_status(ort::kInvalidArgument, error.what());
      }
    };
    t.compute_v2 = [](void* kernel, ort::KernelContext* context) -> ort::Status* {
      try {
        static_cast<const Op*>(kernel)->compute(context);
        return nullptr;
      } catch (const std::invalid_argument& error) {
        return api.create_status(ort::kInvalidArgument, error.what());
      } catch (const std::exception& error) {
        return api.create_status(ort::kFail, error.what());
      }
    };
    return t;
  }();
  return &op;
}

}  // namespace
}  // namespace satchel

extern "C" __attribute__((visibility("default"))) satchel::ort::Status* RegisterCustomOps(
    satchel::ort::SessionOptions* options, const satchel::ort::ApiBase* base) {
  using namespace satchel;
  const void* const* slots = base->get_api(ort::kApiVersion);
  if (!slots) return nullptr;
  api = ort::Api(slots);
  static ort::CustomOpDomain* domain = nullptr;  // lives as long as the process: sessions refer to it
  try {
    if (!domain) {
      ort::CustomOpDomain* made = nullptr;
      api.check(api.create_domain("satchel", &made));
      for (const ort::CustomOp* op : {table<QuantizedLinear>(), table<VocabularyProjection>(),
                                      table<QuantizedEmbedding>(), table<GatedUnit>(),
                                      table<MixtureOfExperts>(), table<CachedAttention>()})
        api.check(api.domain_add(made, op));
      domain = made;
    }
    return api.add_domain(options, domain);
  } catch (const std::exception& error) {
    return api.create_status(ort::kFail, error.what());
  }
}
