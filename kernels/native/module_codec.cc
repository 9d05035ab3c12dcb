// The Python face of the codecs: whole arrays of blocks, for calibration, tests and benchmarks.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

Codec make_codec(int key_bits, int value_bits, bool nonuniform, int outliers, bool grouped) {
  const Codec codec{key_bits, value_bits, nonuniform, outliers, grouped};
  expect(codec.known(), "no codec has " + std::to_string(key_bits) + " bits for keys, " + std::to_string(value_bits) +
                            " for values and " + std::to_string(outliers) +
                            " outliers; bits are 16, 8, 4, 3 or 2 (levels of their own up to 4), outliers at most 128, and none of both in the grouped form");
  return codec;
}

int checked_head_size(py::ssize_t head_size) {
  expect(head_size <= 256 && block_head_size(int(head_size)), "the head size must be a multiple of 16 up to 256");
  return int(head_size);
}

void expect_fit(const Codec& codec, const HeadStatistics& statistics, int head_size) {
  expect(statistics.fit(codec, head_size) || (codec.key_bits == 16 && codec.value_bits == 16),
         "the statistics are not of this codec and head size");
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
           py::arg("nonuniform") = false, py::arg("outliers") = 0, py::arg("grouped") = false)
      .def_readonly("key_bits", &Codec::key_bits)
      .def_readonly("value_bits", &Codec::value_bits)
      .def_readonly("nonuniform", &Codec::nonuniform)
      .def_readonly("outliers", &Codec::outliers)
      .def_readonly("grouped", &Codec::grouped)
      .def("__eq__", [](const Codec& a, const Codec& b) {
        return a.key_bits == b.key_bits && a.value_bits == b.value_bits && a.nonuniform == b.nonuniform &&
               a.outliers == b.outliers && a.grouped == b.grouped;
      }, py::is_operator())
      .def("__hash__", [](const Codec& c) {
        return (((c.key_bits * 32 + c.value_bits) * 2 + c.nonuniform) * 2 + c.grouped) * 256 + c.outliers;
      })
      .def("__repr__", [](const Codec& c) {
        return "NativeCodec(key_bits=" + std::to_string(c.key_bits) + ", value_bits=" + std::to_string(c.value_bits) +
               ", nonuniform=" + (c.nonuniform ? "True" : "False") + ", outliers=" + std::to_string(c.outliers) +
               ", grouped=" + (c.grouped ? "True" : "False") + ")";
      });

  py::class_<HeadStatistics>(m, "HeadStatistics")
      .def(py::init([](const Array<float>& key_center, const Array<float>& key_spread, const Array<float>& value_center,
                       const Array<float>& value_spread, const Array<float>& key_levels,
                       const Array<float>& value_levels) {
        return HeadStatistics{to_vector(key_center),   to_vector(key_spread), to_vector(value_center),
                              to_vector(value_spread), to_vector(key_levels), to_vector(value_levels)};
      }), py::arg("key_center"), py::arg("key_spread"), py::arg("value_center"), py::arg("value_spread"),
          py::arg("key_levels"), py::arg("value_levels"))
      .def_property_readonly("key_center", [](const HeadStatistics& s) { return to_array(s.key_center); })
      .def_property_readonly("key_spread", [](const HeadStatistics& s) { return to_array(s.key_spread); })
      .def_property_readonly("value_center", [](const HeadStatistics& s) { return to_array(s.value_center); })
      .def_property_readonly("value_spread", [](const HeadStatistics& s) { return to_array(s.value_spread); })
      .def_property_readonly("key_levels", [](const HeadStatistics& s) { return to_array(s.key_levels); })
      .def_property_readonly("value_levels", [](const HeadStatistics& s) { return to_array(s.value_levels); })
      .def("fit", &HeadStatistics::fit, py::arg("codec"), py::arg("head_size"));

  m.def("calibrate", [](const Codec& codec, const Array<float>& keys, const Array<float>& values) {
    const int tokens = checked_pairs(keys, values), D = int(keys.shape(1));
    const float *k = keys.data(), *v = values.data();
    py::gil_scoped_release release;
    return calibrate(codec, D, k, v, tokens);
  }, py::arg("codec"), py::arg("keys"), py::arg("values"),
     "Statistics of one KV head from keys (before RoPE) and values [T, D] of a sample, T >= 16.");
  m.def("block_bytes", [](const Codec& codec, int head_size) {
    return block_bytes(codec, checked_head_size(head_size));
  }, py::arg("codec"), py::arg("head_size"));
  m.def("encode_blocks", &encode, py::arg("codec"), py::arg("statistics"), py::arg("keys"), py::arg("values"),
        "uint8 [T / 16, block_bytes] of keys (before RoPE) and values [T, D].");
  m.def("decode_blocks", &decode, py::arg("codec"), py::arg("statistics"), py::arg("head_size"), py::arg("blocks"),
        "(keys [n, D, 16], values [n, 16, D]) as float32.");
}

}  // namespace satchel
