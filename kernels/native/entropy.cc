#include "entropy.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

namespace satchel {
namespace {

// A state is 32 bits, kept at kLowest or above; 16-bit words go in and out. With 12-bit frequencies one word is always
// enough. Eight states take turns, so that a CPU works on several symbols at once (and a vector unit could).
constexpr int kStates = 8, kFrequencyBits = 12;
constexpr uint32_t kTotal = 1u << kFrequencyBits, kLowest = 1u << 16;
constexpr size_t kBlockHeader = 8, kPlaneHeader = 8, kBitmapBytes = 32, kStateBytes = 4 * kStates;
enum PlaneMode : uint32_t { kRaw = 0, kRans = 1, kConstant = 2 };

using Counts = std::array<uint32_t, 256>;
using Blocks = std::vector<std::pair<size_t, size_t>>;  // offset of the coded block, offset of its original

[[noreturn]] void damaged(const char* what) {
  throw std::invalid_argument(std::string("coded data is damaged: ") + what);
}

void require(bool condition, const char* what) {
  if (!condition) damaged(what);
}

// Little-endian, whatever the machine is.
uint32_t load32(const uint8_t* p) { return p[0] | p[1] << 8 | p[2] << 16 | uint32_t(p[3]) << 24; }
uint32_t load16(const uint8_t* p) { return uint32_t(p[0] | p[1] << 8); }
void store32(uint8_t* p, uint32_t v) {
  for (int i = 0; i < 4; ++i) p[i] = uint8_t(v >> (8 * i));
}
void store16(uint8_t* p, uint32_t v) {
  p[0] = uint8_t(v);
  p[1] = uint8_t(v >> 8);
}

size_t least_block(size_t original) { return (original + kEntropyMaxRatio - 1) / kEntropyMaxRatio; }

// --- encoding --------------------------------------------------------------------------------------------------------

Counts count_bytes(const uint8_t* data, size_t n) {
  std::array<Counts, 4> parts{};  // four tables, so that equal neighbours do not wait for each other
  size_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) ++parts[j][data[i + j]];
  for (; i < n; ++i) ++parts[0][data[i]];
  Counts counts{};
  for (int s = 0; s < 256; ++s) counts[s] = parts[0][s] + parts[1][s] + parts[2][s] + parts[3][s];
  return counts;
}

// Frequencies that sum to kTotal, at least 1 for what occurs; the rounding's remainder goes to the most frequent.
Counts normalize(const Counts& counts, size_t n) {
  Counts f{};
  int64_t spare = kTotal;
  for (int s = 0; s < 256; ++s) {
    if (!counts[s]) continue;
    f[s] = std::max<uint32_t>(1, uint32_t((uint64_t(counts[s]) * kTotal + n / 2) / n));
    spare -= f[s];
  }
  if (spare > 0) *std::max_element(f.begin(), f.end()) += uint32_t(spare);
  for (; spare < 0; ++spare) --*std::max_element(f.begin(), f.end());
  return f;
}

struct Symbol {
  uint32_t frequency, start, limit;  // a state below limit takes this symbol without giving a word first
  uint64_t reciprocal;               // x / frequency == x * reciprocal >> 44 for x < limit
};

// Writes a rANS payload into out[0 .. room) and returns its size, or 0 when it has no room. `n` is at least 2.
size_t encode_rans(const uint8_t* data, size_t n, const Counts& counts, uint8_t* out, size_t room) {
  const Counts f = normalize(counts, n);
  std::array<Symbol, 256> symbols{};
  uint32_t start = 0;
  size_t header = kBitmapBytes;
  for (int s = 0; s < 256; ++s) {
    if (!f[s]) continue;
    if (f[s] == kTotal) return 0;  // cannot be with two symbols, as each gets at least 1
    symbols[s] = {f[s], start, f[s] << 20, ((uint64_t(1) << 44) + f[s] - 1) / f[s]};
    start += f[s];
    header += 2;
  }
  header += kStateBytes;
  if (room <= header) return 0;
  // What the decoder reads first is written last: words go backwards from the end of the room.
  uint8_t* const floor = out + header;
  uint8_t* words = out + room;
  uint32_t x[kStates];
  std::fill(x, x + kStates, kLowest);
  for (size_t i = n; i-- > 0;) {
    const Symbol& symbol = symbols[data[i]];
    uint32_t& state = x[i % kStates];
    if (state >= symbol.limit) {
      if (words - floor < 2) return 0;
      words -= 2;
      store16(words, state);
      state >>= 16;
    }
    const uint32_t quotient = uint32_t((state * symbol.reciprocal) >> 44);
    state = (quotient << kFrequencyBits) + (state - quotient * symbol.frequency) + symbol.start;
  }
  std::memset(out, 0, kBitmapBytes);
  uint8_t* at = out + kBitmapBytes;
  for (int s = 0; s < 256; ++s) {
    if (!f[s]) continue;
    out[s / 8] |= uint8_t(1u << (s % 8));
    store16(at, f[s]);
    at += 2;
  }
  for (uint32_t state : x) store32(at, state), at += 4;
  const size_t used = out + room - words;
  std::memmove(at, words, used);
  return header + used;
}

// Appends one plane: the shortest of its three forms.
void encode_plane(const uint8_t* data, size_t n, std::vector<uint8_t>& out) {
  const Counts counts = count_bytes(data, n);
  const size_t begin = out.size();
  out.resize(begin + kPlaneHeader + n);
  uint8_t* payload = out.data() + begin + kPlaneHeader;
  uint32_t mode = kRaw;
  size_t length = n;
  const uint32_t most = *std::max_element(counts.begin(), counts.end());
  if (n > 1 && most == n) {
    mode = kConstant;
    length = 1;
    payload[0] = data[0];
  } else if (const size_t coded = n > 1 ? encode_rans(data, n, counts, payload, n - 1) : 0) {
    mode = kRans;
    length = coded;
  } else {
    std::copy(data, data + n, payload);
  }
  store32(out.data() + begin, mode);
  store32(out.data() + begin + 4, uint32_t(length));
  out.resize(begin + kPlaneHeader + length);
}

std::vector<uint8_t> encode_block(const uint8_t* data, size_t n, int planes) {
  std::vector<uint8_t> out(kBlockHeader);
  if (planes == 1) {
    encode_plane(data, n, out);
  } else {
    std::vector<uint8_t> plane(n - n / 2);
    for (size_t first = 0; first < 2; ++first) {
      const size_t count = first ? n / 2 : n - n / 2;
      for (size_t i = 0; i < count; ++i) plane[i] = data[2 * i + first];
      encode_plane(plane.data(), count, out);
    }
  }
  out.resize(std::max(out.size(), least_block(n)));
  store32(out.data(), uint32_t(n));
  store32(out.data() + 4, uint32_t(out.size() - kBlockHeader));
  return out;
}

// --- decoding --------------------------------------------------------------------------------------------------------

struct Reader {
  const uint8_t* at;
  const uint8_t* end;
  size_t left() const { return size_t(end - at); }
  const uint8_t* take(size_t n, const char* what) {
    require(left() >= n, what);
    at += n;
    return at - n;
  }
};

void decode_rans(Reader in, uint8_t* out, size_t n) {
  const uint8_t* bitmap = in.take(kBitmapBytes, "a frequency table is cut short");
  // One entry for each slot of the frequency range: symbol | frequency << 8 | (slot - the symbol's first slot) << 20.
  std::array<uint32_t, kTotal> table;
  uint32_t filled = 0;
  for (uint32_t s = 0; s < 256; ++s) {
    if (!(bitmap[s / 8] >> (s % 8) & 1)) continue;
    const uint32_t f = load16(in.take(2, "a frequency table is cut short"));
    require(f > 0 && f < kTotal && f <= kTotal - filled, "frequencies do not sum to 4096");
    for (uint32_t i = 0; i < f; ++i) table[filled++] = s | f << 8 | i << 20;
  }
  require(filled == kTotal, "frequencies do not sum to 4096");
  uint32_t x[kStates];
  for (uint32_t& state : x) {
    state = load32(in.take(4, "states are cut short"));
    require(state >= kLowest, "a state is too small");
  }
  const auto step = [&table](uint32_t& state, uint8_t& symbol) {
    const uint32_t entry = table[state & (kTotal - 1)];
    symbol = uint8_t(entry);
    state = (entry >> 8 & (kTotal - 1)) * (state >> kFrequencyBits) + (entry >> 20);
  };
  size_t i = 0;
  const uint8_t* words = in.at;
  while (n - i >= kStates && in.end - words >= 2 * kStates) {
#pragma GCC unroll 8  // keeps the states in registers
    for (int j = 0; j < kStates; ++j) {
      step(x[j], out[i + j]);
      const uint32_t low = x[j] < kLowest;  // as a number: a branch here would be guessed wrong every few symbols
      x[j] = x[j] << (16 * low) | (load16(words) & (0u - low));
      words += 2 * low;
    }
    i += kStates;
  }
  for (; i < n; ++i) {
    uint32_t& state = x[i % kStates];
    step(state, out[i]);
    if (state >= kLowest) continue;
    require(in.end - words >= 2, "words are cut short");
    state = state << 16 | load16(words);
    words += 2;
  }
  require(words == in.end, "words are left over");
  for (uint32_t state : x) require(state == kLowest, "the last states are wrong");
}

void decode_plane(Reader& in, uint8_t* out, size_t n) {
  const uint8_t* header = in.take(kPlaneHeader, "a plane is cut short");
  const uint32_t mode = load32(header);
  const size_t length = load32(header + 4);
  const uint8_t* payload = in.take(length, "a plane is cut short");
  if (mode == kRaw) {
    require(length == n, "a raw plane has the wrong length");
    std::copy(payload, payload + n, out);
  } else if (mode == kConstant) {
    require(length == 1, "a constant plane has the wrong length");
    std::fill(out, out + n, payload[0]);
  } else {
    require(mode == kRans, "a plane has an unknown mode");
    decode_rans({payload, payload + length}, out, n);
  }
}

void decode_block(Reader in, int planes, uint8_t* out, size_t n) {
  if (planes == 1) {
    decode_plane(in, out, n);
  } else {
    const size_t lows = n - n / 2, highs = n / 2;
    std::vector<uint8_t> both(n);
    const uint8_t *low = both.data(), *high = low + lows;
    decode_plane(in, both.data(), lows);
    decode_plane(in, both.data() + lows, highs);
    for (size_t i = 0; i < highs; ++i) {
      out[2 * i] = low[i];
      out[2 * i + 1] = high[i];
    }
    if (lows > highs) out[n - 1] = low[lows - 1];
  }
  require(std::all_of(in.at, in.end, [](uint8_t byte) { return byte == 0; }), "padding is not zero");
}

// Where the blocks begin; every length is checked here, so that the blocks can be decoded in any order.
Blocks index_blocks(const uint8_t* coded, size_t bytes, size_t original) {
  Blocks blocks;
  size_t at = 0, done = 0;
  while (done < original) {
    require(bytes - at >= kBlockHeader, "a block is cut short");
    const size_t n = load32(coded + at), stored = load32(coded + at + 4);
    require(n == std::min(kEntropyBlockBytes, original - done), "a block has the wrong length");
    require(stored <= bytes - at - kBlockHeader, "a block is cut short");
    require(kBlockHeader + stored >= least_block(n), "a block is too small for what it claims to hold");
    blocks.emplace_back(at, done);
    at += kBlockHeader + stored;
    done += n;
  }
  require(at == bytes, "bytes are left over");
  return blocks;
}

void require_planes(int planes) {
  if (planes != 1 && planes != 2) throw std::invalid_argument("planes must be 1 or 2");
}

}  // namespace

std::vector<uint8_t> entropy_encode(const uint8_t* data, size_t bytes, int planes, const Parallel& parallel) {
  require_planes(planes);
  std::vector<std::vector<uint8_t>> blocks((bytes + kEntropyBlockBytes - 1) / kEntropyBlockBytes);
  parallel(blocks.size(), [&](size_t i) {
    const size_t first = i * kEntropyBlockBytes;
    blocks[i] = encode_block(data + first, std::min(kEntropyBlockBytes, bytes - first), planes);
  });
  if (blocks.size() == 1) return std::move(blocks[0]);
  std::vector<uint8_t> out;
  for (const auto& block : blocks) out.insert(out.end(), block.begin(), block.end());
  return out;
}

void entropy_decode(const uint8_t* coded, size_t bytes, int planes, uint8_t* out, size_t original,
                    const Parallel& parallel) {
  require_planes(planes);
  const Blocks blocks = index_blocks(coded, bytes, original);
  parallel(blocks.size(), [&](size_t i) {
    const auto [at, first] = blocks[i];
    const size_t end = i + 1 < blocks.size() ? blocks[i + 1].first : bytes;
    decode_block({coded + at + kBlockHeader, coded + end}, planes, out + first,
                 std::min(kEntropyBlockBytes, original - first));
  });
}

}  // namespace satchel
