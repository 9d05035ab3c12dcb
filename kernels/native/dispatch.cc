// Which variant of the hot loops this process uses.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "variant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace satchel {

extern const Variant variant_baseline;
#if defined(__x86_64__)
extern const Variant variant_avx2;
extern const Variant variant_avx512;
extern const Variant variant_avx512vnni;
#endif

#if defined(__x86_64__)
static bool has_f16c() {  // not every compiler knows the name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
#endif

std::vector<const Variant*> variants() {
  std::vector<const Variant*> found{&variant_baseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) found.push_back(&variant_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back(&variant_avx512);
    if (__builtin_cpu_supports("avx512vnni")) found.push_back(&variant_avx512vnni);
  }
#endif
  return found;
}

static const Variant* find(const char* name) {
  std::string known;
  for (const Variant* v : variants()) {
    if (std::string(v->name) == name) return v;
    known += std::string(known.empty() ? "" : ", ") + v->name;
  }
  throw std::invalid_argument("SIMD variant '" + std::string(name) + "' is not one that this CPU runs (" + known + ")");
}

static std::atomic<const Variant*> active{nullptr};

const Variant& active_variant() {
  const Variant* v = active.load(std::memory_order_acquire);
  if (!v) {
    const char* wanted = std::getenv("SATCHEL_SIMD");
    v = wanted && *wanted ? find(wanted) : variants().back();
    active.store(v, std::memory_order_release);
  }
  return *v;
}

void select_variant(const char* name) { active.store(find(name), std::memory_order_release); }

}  // namespace satchel
