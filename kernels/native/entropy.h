// The entropy coder of snapshots: interleaved rANS (Duda, arXiv 1311.2540) of order 0 over planes of bytes, in blocks
// that are decoded independently. docs/snapshot-format.md has the bytes; kernels/reference_entropy.py is the twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace satchel {

constexpr size_t kEntropyBlockBytes = size_t(1) << 20;  // of original data; only the last block of a section is shorter
constexpr size_t kEntropyMaxRatio = 256;                // an original is at most so many times its coded form

// The coded form of `bytes` bytes, which may be several blocks. `planes`: 1, or 2 for values of 16 bits, whose low and
// high bytes are coded apart.
std::vector<uint8_t> entropy_encode(const uint8_t* data, size_t bytes, int planes, const Parallel& parallel);

// Decodes exactly `original` bytes into `out`. Whatever `coded` holds, nothing outside of the two buffers is touched.
// Throws std::invalid_argument when it is not what entropy_encode could have written for this many bytes.
void entropy_decode(const uint8_t* coded, size_t bytes, int planes, uint8_t* out, size_t original,
                    const Parallel& parallel);

}  // namespace satchel
