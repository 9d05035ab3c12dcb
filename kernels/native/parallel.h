// How a kernel spreads its tasks: over ONNX Runtime's pool inside a graph run, in a plain loop elsewhere.
#pragma once

#include <cstddef>
#include <exception>
#include <mutex>
#include <functional>

namespace satchel {

using Body = std::function<void(size_t)>;
// Calls body(0) .. body(count - 1), in any order and on any thread, and returns when all are done.
using Parallel = std::function<void(size_t count, const Body& body)>;

inline void serial(size_t count, const Body& body) {
  for (size_t i = 0; i < count; ++i) body(i);
}

// A body that may throw, made safe for a pool that may not see exceptions: the first one is kept for rethrow().
class Guarded {
 public:
  explicit Guarded(const Body& body) : body_(body) {}
  void operator()(size_t i) noexcept {
    try {
      body_(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const Body& body_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace satchel
