// The entropy decoder on mutated input, without Python, so that it can be built with sanitizers.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Ikernels/native
//       tests/kernels/native/check_entropy.cc kernels/native/entropy.cc && ./a.out 100000
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "entropy.h"

using namespace satchel;

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 20000;
  std::mt19937 random(1);
  const auto below = [&random](size_t limit) { return size_t(random()) % limit; };
  int refused = 0;
  for (int i = 0; i < count; ++i) {
    const int planes = 1 + i % 2;
    const size_t n = i % 1000 == 999 ? kEntropyBlockBytes + below(5000) : below(600);
    std::vector<uint8_t> data(n);
    const int kind = i % 5;
    for (uint8_t& byte : data) byte = kind ? uint8_t(below(size_t(1) << (2 * kind - 1))) : 7;
    std::vector<uint8_t> coded = entropy_encode(data.data(), n, planes, serial);
    std::unique_ptr<uint8_t[]> out(new uint8_t[n]);  // exactly n bytes, so that one more is found
    entropy_decode(coded.data(), coded.size(), planes, out.get(), n, serial);
    if (!std::equal(data.begin(), data.end(), out.get())) {
      std::printf("case %d does not come back\n", i);
      return 1;
    }
    for (int mutant = 0; mutant < 3 && !coded.empty(); ++mutant) {
      std::vector<uint8_t> changed = coded;
      for (size_t change = 1 + below(4); change-- > 0;) {
        const size_t at = below(3) ? below(std::min<size_t>(changed.size(), 64)) : below(changed.size());
        changed[at] = below(2) ? uint8_t(random()) : uint8_t(changed[at] ^ 1 << below(8));
      }
      if (below(4) == 0) changed.resize(below(changed.size() + 1));
      std::vector<uint8_t> exact(changed.begin(), changed.end());  // no room behind its end
      exact.shrink_to_fit();
      const size_t claimed = below(4) ? n : below(2000);
      std::unique_ptr<uint8_t[]> to(new uint8_t[claimed]);
      try {
        entropy_decode(exact.data(), exact.size(), planes, to.get(), claimed, serial);
      } catch (const std::invalid_argument&) {
        ++refused;
      }
    }
  }
  std::printf("%d cases, %d mutants refused\n", count, refused);
  return refused > count ? 0 : 1;
}
