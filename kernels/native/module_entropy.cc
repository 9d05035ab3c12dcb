// The Python face of the entropy coder.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "entropy.h"
#include "threads.h"

namespace py = pybind11;
using namespace satchel;

namespace {

struct Bytes {
  explicit Bytes(const py::buffer& buffer) : info(buffer.request()) {
    py::ssize_t stride = info.itemsize;
    for (py::ssize_t i = info.ndim; i-- > 0; stride *= info.shape[i])
      if (info.shape[i] > 1 && info.strides[i] != stride) throw std::invalid_argument("the data is not contiguous");
  }
  const uint8_t* data() const { return static_cast<const uint8_t*>(info.ptr); }
  size_t size() const { return size_t(info.size) * size_t(info.itemsize); }
  py::buffer_info info;
};

}  // namespace

void bind_entropy(py::module_& m) {
  m.attr("ENTROPY_BLOCK_BYTES") = kEntropyBlockBytes;
  m.attr("ENTROPY_MAX_RATIO") = kEntropyMaxRatio;
  m.def("entropy_encode", [](const py::buffer& data, int planes, int thread_count) {
    const Bytes in(data);
    std::vector<uint8_t> coded;
    {
      py::gil_scoped_release release;
      coded = entropy_encode(in.data(), in.size(), planes, threads(thread_count));
    }
    return py::bytes(reinterpret_cast<const char*>(coded.data()), coded.size());
  }, py::arg("data"), py::kw_only(), py::arg("planes"), py::arg("threads") = 1,
     "The coded form of a buffer, in blocks of ENTROPY_BLOCK_BYTES; planes is 2 for 16-bit values.");
  m.def("entropy_decode", [](const py::buffer& coded, size_t original_bytes, int planes, int thread_count) {
    const Bytes in(coded);
    if (original_bytes / kEntropyMaxRatio > in.size())
      throw std::invalid_argument("coded data is damaged: it is too small for what it claims to hold");
    py::array_t<uint8_t> out(static_cast<py::ssize_t>(original_bytes));
    uint8_t* to = out.mutable_data();
    {
      py::gil_scoped_release release;
      entropy_decode(in.data(), in.size(), planes, to, original_bytes, threads(thread_count));
    }
    return out;
  }, py::arg("coded"), py::arg("original_bytes"), py::kw_only(), py::arg("planes"), py::arg("threads") = 1,
     "uint8 [original_bytes]. Raises ValueError when `coded` is not what entropy_encode writes for that many bytes.");
}
