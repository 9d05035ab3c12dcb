// The Python face of the codecs: whole arrays of blocks, for calibration, tests and benchmarks.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "codec.h"
#include "module_codec.h"
#include "variant.h"

namespace py = pybind11;

namespace satchel {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void expect(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

Codec make_codec(int key_bits, int value_bits, bool nonuniform, int outliers, bool grouped, int key_rank, int value_rank) {
  const Codec codec{key_bits, value_bits, nonuniform, outliers, grouped, key_rank, value_rank};
  expect(codec.known(), "no codec has " + std::to_string(key_bits) + " bits for keys, " + std::to_string(value_bits) +
                            " for values and " + std::to_string(outliers) +
                            " outliers; bits are 16, 8, 4, 3 or 2 (levels of their own up to 4), outliers at most 128, and none of both in the grouped form; ranks are 0 or from 4 to 256");
  return codec;
}

int checked_head_size(py::ssize_t head_size) {
  expect(head_size <= 256 && block_head_size(int(head_size)), "the head size must be a multiple of 16 up to 256");
  return int(head_size);
}

void expect_fit(const Codec& codec, const HeadStatistics& statistics, int head_size) {
  expect(statistics.fit(codec, head_size) || (codec.key_bits == 16 && codec.value_bits == 16 && !codec.low_rank()),
         "the statistics are not of this codec and head size");
}

void expect_ranks(const Codec& codec, int head_size) {
  expect(codec.key_rank <= head_size && codec.value_rank <= head_size, "a rank is at most the head size");
}

// encoders [..., inputs, rank] and decoders [..., rank, inputs] of `count` heads; none where the rank is 0
std::vector<std::shared_ptr<const Projection>> make_projections(const Array<float>& encoders, const Array<float>& decoders,
                                                                py::ssize_t count, int inputs, int head_size) {
  const auto n = encoders.ndim();
  expect(n >= 2 && decoders.ndim() == n && encoders.shape(n - 2) == inputs && decoders.shape(n - 1) == inputs &&
             encoders.shape(n - 1) == decoders.shape(n - 2) && encoders.shape(n - 1) <= inputs &&
             encoders.size() == count * inputs * encoders.shape(n - 1) && decoders.size() == encoders.size(),
         "encoders must be [..., head_size, rank] and decoders [..., rank, head_size], one for each head; of both keys "
         "and values twice the head size");
  const int rank = int(encoders.shape(n - 1));
  const size_t size = size_t(inputs) * rank;
  std::vector<std::shared_ptr<const Projection>> found;
  for (py::ssize_t i = 0; rank && i < count; ++i) {
    auto one = std::make_shared<Projection>();
    one->rank = rank;
    one->encoder.assign(encoders.data() + i * size, encoders.data() + (i + 1) * size);
    const float* rows = decoders.data() + i * size;
    for (int side = 0; side < inputs; side += head_size)
      for (int r = 0; r < rank; ++r)
        one->decoder.insert(one->decoder.end(), rows + size_t(r) * inputs + side, rows + size_t(r) * inputs + side + head_size);
    expect(one->fit(rank, inputs), "a projection has numbers that are not finite");
    found.push_back(std::move(one));
  }
  return found;
}

std::shared_ptr<LowRankBasis> basis_from(const Array<float>& key_encoders, const Array<float>& key_decoders,
                                         const Array<float>& value_encoders, const Array<float>& value_decoders,
                                         const std::optional<Array<float>>& rest_encoders,
                                         const std::optional<Array<float>>& rest_decoders) {
  expect(key_encoders.ndim() == 4 && value_encoders.ndim() == 4, "a basis is [layers, kv_heads, head_size, rank]");
  auto basis = std::make_shared<LowRankBasis>();
  basis->layers = int(key_encoders.shape(0));
  basis->kv_heads = int(key_encoders.shape(1));
  basis->key_rank = int(key_encoders.shape(3));
  basis->value_rank = int(value_encoders.shape(3));
  const bool paired = basis->key_rank && basis->value_rank;
  expect(!paired || key_encoders.shape(2) % 2 == 0, "a basis of pairs is [layers, kv_heads, 2 * head_size, rank]");
  basis->head_size = checked_head_size(key_encoders.shape(2) / (paired ? 2 : 1));
  const int inputs = (paired ? 2 : 1) * basis->head_size;
  for (int rank : {basis->key_rank, basis->value_rank})
    expect(!rank || (rank >= kLeastRank && rank <= basis->head_size), "a rank is 4 or more, and at most the head size");
  const py::ssize_t count = key_encoders.shape(0) * key_encoders.shape(1);
  basis->keys = make_projections(key_encoders, key_decoders, count, inputs, basis->head_size);
  basis->values = make_projections(value_encoders, value_decoders, count, inputs, basis->head_size);
  if (rest_encoders && rest_decoders)
    basis->rests = make_projections(*rest_encoders, *rest_decoders, count, inputs, basis->head_size);
  const int rest = basis->rests.empty() ? 0 : basis->rests[0]->rank;
  expect(rest == (paired ? inputs - basis->key_rank - basis->value_rank : 0),
         "the rest of a basis of pairs is all other coefficients; one side alone has none");
  return basis;
}

// Of keys, of values or of the rest.
using OfBasis = std::vector<std::shared_ptr<const Projection>> LowRankBasis::*;
std::shared_ptr<const Projection> of_head(const std::shared_ptr<LowRankBasis>& basis, OfBasis part, int layer, int kv_head) {
  if (!basis) return nullptr;
  expect(layer >= 0 && layer < basis->layers && kv_head >= 0 && kv_head < basis->kv_heads, "the basis has no such head");
  const auto& heads = (*basis).*part;
  return heads.empty() ? nullptr : heads[size_t(layer) * basis->kv_heads + kv_head];
}

// keys and values [T, D] alike; returns T
int checked_pairs(const Array<float>& keys, const Array<float>& values) {
  expect(keys.ndim() == 2 && values.ndim() == 2 && keys.shape(0) == values.shape(0) &&
             keys.shape(1) == values.shape(1) && keys.shape(0) < (1 << 28),
         "keys and values must both be [tokens, head_size]");
  checked_head_size(keys.shape(1));
  return int(keys.shape(0));
}

std::vector<float> to_vector(const Array<float>& a) { return {a.data(), a.data() + a.size()}; }
py::array_t<float> to_array(const std::vector<float>& v) { return py::array_t<float>(py::ssize_t(v.size()), v.data()); }

py::array_t<uint8_t> encode(const Codec& codec, const HeadStatistics& statistics, const Array<float>& keys,
                            const Array<float>& values) {
  const int tokens = checked_pairs(keys, values), D = int(keys.shape(1));
  expect(tokens % kBlockTokens == 0, "encode_blocks takes whole blocks of 16 tokens");
  expect_fit(codec, statistics, D);
  const size_t bytes = block_bytes(codec, D);
  py::array_t<uint8_t> blocks({py::ssize_t(tokens / kBlockTokens), py::ssize_t(bytes)});
  const float *k = keys.data(), *v = values.data();
  uint8_t* out = blocks.mutable_data();
  py::gil_scoped_release release;
  for (int b = 0; b < tokens / kBlockTokens; ++b)
    encode_block(codec, statistics, D, k + size_t(b) * kBlockTokens * D, v + size_t(b) * kBlockTokens * D,
                 out + b * bytes);
  return blocks;
}

py::tuple decode(const Codec& codec, const HeadStatistics& statistics, int head_size, const Array<uint8_t>& blocks) {
  const int D = checked_head_size(head_size);
  expect_fit(codec, statistics, D);
  const size_t bytes = block_bytes(codec, D);
  expect(blocks.ndim() == 2 && size_t(blocks.shape(1)) == bytes, "blocks must be [n, block_bytes]");
  const py::ssize_t count = blocks.shape(0);
  py::array_t<float> keys({count, py::ssize_t(D), py::ssize_t(kBlockTokens)});
  py::array_t<float> values({count, py::ssize_t(kBlockTokens), py::ssize_t(D)});
  const BlockFormat format{codec, &statistics, D};
  const uint8_t* in = blocks.data();
  float *k = keys.mutable_data(), *v = values.mutable_data();
  {
    py::gil_scoped_release release;
    const auto decode_block = active_variant().decode_block;
    for (py::ssize_t b = 0; b < count; ++b, k += kBlockTokens * D, v += kBlockTokens * D)
      decode_block(format, in + size_t(b) * bytes, k, v);
  }
  return py::make_tuple(keys, values);
}

}  // namespace

void bind_codecs(py::module_& m) {
  m.attr("BLOCK_TOKENS") = kBlockTokens;
  py::class_<Codec>(m, "NativeCodec")
      .def(py::init(&make_codec), py::kw_only(), py::arg("key_bits"), py::arg("value_bits"),
           py::arg("nonuniform") = false, py::arg("outliers") = 0, py::arg("grouped") = false, py::arg("key_rank") = 0,
           py::arg("value_rank") = 0)
      .def_readonly("key_bits", &Codec::key_bits)
      .def_readonly("value_bits", &Codec::value_bits)
      .def_readonly("nonuniform", &Codec::nonuniform)
      .def_readonly("outliers", &Codec::outliers)
      .def_readonly("grouped", &Codec::grouped)
      .def_readonly("key_rank", &Codec::key_rank)
      .def_readonly("value_rank", &Codec::value_rank)
      .def("__eq__", [](const Codec& a, const Codec& b) {
        return a.key_bits == b.key_bits && a.value_bits == b.value_bits && a.nonuniform == b.nonuniform &&
               a.outliers == b.outliers && a.grouped == b.grouped && a.key_rank == b.key_rank &&
               a.value_rank == b.value_rank;
      }, py::is_operator())
      .def("__hash__", [](const Codec& c) {
        return ((((c.key_bits * 32 + c.value_bits) * 2 + c.nonuniform) * 2 + c.grouped) * 256 + c.outliers) * 512 +
               c.key_rank + 17 * c.value_rank;
      })
      .def("__repr__", [](const Codec& c) {
        return "NativeCodec(key_bits=" + std::to_string(c.key_bits) + ", value_bits=" + std::to_string(c.value_bits) +
               ", nonuniform=" + (c.nonuniform ? "True" : "False") + ", outliers=" + std::to_string(c.outliers) +
               ", grouped=" + (c.grouped ? "True" : "False") +
               (c.low_rank() ? ", key_rank=" + std::to_string(c.key_rank) + ", value_rank=" + std::to_string(c.value_rank)
                             : "") + ")";
      });

  py::class_<LowRankBasis, std::shared_ptr<LowRankBasis>>(m, "LowRankBasis")
      .def(py::init(&basis_from), py::kw_only(), py::arg("key_encoders"), py::arg("key_decoders"),
           py::arg("value_encoders"), py::arg("value_decoders"), py::arg("rest_encoders") = py::none(),
           py::arg("rest_decoders") = py::none(),
           "Of pairs: encoders [layers, kv_heads, 2 * head_size, rank] and decoders [..., rank, 2 * head_size], where the "
           "rest is all other coefficients. Or with a rank of 0 on one side: of the other side alone, head_size wide.")
      .def_readonly("key_rank", &LowRankBasis::key_rank)
      .def_readonly("value_rank", &LowRankBasis::value_rank);

  py::class_<HeadStatistics>(m, "HeadStatistics")
      .def(py::init([](const Array<float>& key_center, const Array<float>& key_spread, const Array<float>& value_center,
                       const Array<float>& value_spread, const Array<float>& key_levels,
                       const Array<float>& value_levels) {
        HeadStatistics s;
        s.key_center = to_vector(key_center), s.key_spread = to_vector(key_spread);
        s.value_center = to_vector(value_center), s.value_spread = to_vector(value_spread);
        s.key_levels = to_vector(key_levels), s.value_levels = to_vector(value_levels);
        return s;
      }), py::arg("key_center"), py::arg("key_spread"), py::arg("value_center"), py::arg("value_spread"),
          py::arg("key_levels"), py::arg("value_levels"))
      .def_property_readonly("key_mean", [](const HeadStatistics& s) { return to_array(s.key_mean); })
      .def_property_readonly("value_mean", [](const HeadStatistics& s) { return to_array(s.value_mean); })
      .def_property_readonly("key_center", [](const HeadStatistics& s) { return to_array(s.key_center); })
      .def_property_readonly("key_spread", [](const HeadStatistics& s) { return to_array(s.key_spread); })
      .def_property_readonly("value_center", [](const HeadStatistics& s) { return to_array(s.value_center); })
      .def_property_readonly("value_spread", [](const HeadStatistics& s) { return to_array(s.value_spread); })
      .def_property_readonly("key_levels", [](const HeadStatistics& s) { return to_array(s.key_levels); })
      .def_property_readonly("value_levels", [](const HeadStatistics& s) { return to_array(s.value_levels); })
      .def("fit", &HeadStatistics::fit, py::arg("codec"), py::arg("head_size"));

  m.def("calibrate", [](const Codec& codec, const Array<float>& keys, const Array<float>& values,
                        const std::shared_ptr<LowRankBasis>& basis, int layer, int kv_head) {
    const int tokens = checked_pairs(keys, values), D = int(keys.shape(1));
    const float *k = keys.data(), *v = values.data();
    const auto part = [&](OfBasis of) { return of_head(basis, of, layer, kv_head); };
    auto of_keys = part(&LowRankBasis::keys), of_values = part(&LowRankBasis::values), rest = part(&LowRankBasis::rests);
    py::gil_scoped_release release;
    return calibrate(codec, D, k, v, tokens, std::move(of_keys), std::move(of_values), std::move(rest));
  }, py::arg("codec"), py::arg("keys"), py::arg("values"), py::arg("basis") = nullptr, py::arg("layer") = 0,
     py::arg("kv_head") = 0,
     "Statistics of one KV head from keys (before RoPE) and values [T, D] of a sample, T >= 16; with ranks, of the "
     "coefficients in this head's part of the basis.");
  m.def("block_bytes", [](const Codec& codec, int head_size) {
    expect_ranks(codec, checked_head_size(head_size));
    return block_bytes(codec, head_size);
  }, py::arg("codec"), py::arg("head_size"));
  m.def("encode_blocks", &encode, py::arg("codec"), py::arg("statistics"), py::arg("keys"), py::arg("values"),
        "uint8 [T / 16, block_bytes] of keys (before RoPE) and values [T, D].");
  m.def("decode_blocks", &decode, py::arg("codec"), py::arg("statistics"), py::arg("head_size"), py::arg("blocks"),
        "(keys [n, D, 16], values [n, 16, D]) as float32.");
}

}  // namespace satchel
