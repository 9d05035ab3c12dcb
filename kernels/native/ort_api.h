// The part of ONNX Runtime's C API that a custom-op library needs, declared by slot number.
//
// ONNX Runtime's headers are on no package registry, but its API is a table of function pointers to which entries are
// only ever appended: an index never changes. We ask for API version 17 and name only the slots we call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace satchel::ort {

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct CustomOp;

constexpr uint32_t kApiVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

// The table itself; every member calls one slot.
class Api {
 public:
  explicit Api(const void* const* slots = nullptr) : slots_(slots) {}
  explicit operator bool() const { return slots_ != nullptr; }

  Status* create_status(ErrorCode code, const char* message) const {
    return call<Status*, ErrorCode, const char*>(0, code, message);
  }
  Status* create_domain(const char* name, CustomOpDomain** out) const {
    return call<Status*, const char*, CustomOpDomain**>(26, name, out);
  }
  Status* domain_add(CustomOpDomain* domain, const CustomOp* op) const {
    return call<Status*, CustomOpDomain*, const CustomOp*>(27, domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return call<Status*, SessionOptions*, CustomOpDomain*>(28, options, domain);
  }

  template <class T>
  T* data(const Value* value) const {
    void* out = nullptr;
    check(call<Status*, Value*, void**>(51, const_cast<Value*>(value), &out));
    return static_cast<T*>(out);
  }
  // Number of elements, and the sizes of up to `rank` dimensions.
  size_t shape(const Value* value, int64_t* sizes, size_t rank) const {
    TensorInfo* info = nullptr;
    check(call<Status*, const Value*, TensorInfo**>(65, value, &info));
    size_t count = 0;
    Status* status = call<Status*, const TensorInfo*, size_t*>(61, info, &count);
    if (!status && count <= rank) status = call<Status*, const TensorInfo*, int64_t*, size_t>(62, info, sizes, count);
    call<void, TensorInfo*>(99, info);
    check(status);
    if (count > rank) throw std::invalid_argument("satchel op: an input has too many dimensions");
    return count;
  }
  float attribute_float(const KernelInfo* info, const char* name) const {
    float out = 0;
    check(call<Status*, const KernelInfo*, const char*, float*>(85, info, name, &out));
    return out;
  }
  int64_t attribute_int(const KernelInfo* info, const char* name) const {
    int64_t out = 0;
    check(call<Status*, const KernelInfo*, const char*, int64_t*>(86, info, name, &out));
    return out;
  }
  size_t input_count(const KernelContext* context) const {
    size_t out = 0;
    check(call<Status*, const KernelContext*, size_t*>(88, context, &out));
    return out;
  }
  const Value* input(const KernelContext* context, size_t index) const {
    const Value* out = nullptr;
    check(call<Status*, const KernelContext*, size_t, const Value**>(90, context, index, &out));
    return out;
  }
  Value* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank) const {
    Value* out = nullptr;
    check(call<Status*, KernelContext*, size_t, const int64_t*, size_t, Value**>(91, context, index, sizes, rank, &out));
    return out;
  }
  void parallel_for(const KernelContext* context, void (*fn)(void*, size_t), size_t total, void* user) const {
    check(call<Status*, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*>(274, context, fn, total,
                                                                                           total, user));
  }

  void check(Status* status) const {
    if (!status) return;
    const char* text = call<const char*, const Status*>(2, status);  // GetErrorMessage
    std::string message = text ? text : "unknown error";
    call<void, Status*>(93, status);  // ReleaseStatus
    throw std::runtime_error("ONNX Runtime: " + message);
  }

 private:
  template <class R, class... A>
  R call(size_t slot, A... args) const {
    using Function = R (*)(A...);
    return reinterpret_cast<Function>(const_cast<void*>(slots_[slot]))(args...);
  }
  const void* const* slots_;
};

// One operator, as ONNX Runtime reads it (version 17: later entries absent).
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
};

}  // namespace satchel::ort
