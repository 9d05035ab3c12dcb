// For what runs outside of a graph, where there is no pool: as many short-lived threads as asked for.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "parallel.h"

namespace satchel {

inline Parallel threads(int count) {
  if (count <= 1) return serial;
  return [count](size_t total, const Body& body) {
    std::atomic<size_t> next{0};
    Guarded guarded(body);
    auto work = [&] {
      for (size_t i; (i = next++) < total;) guarded(i);
    };
    std::vector<std::thread> helpers;
    for (int t = 1; t < count; ++t) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
    guarded.rethrow();
  };
}

}  // namespace satchel
