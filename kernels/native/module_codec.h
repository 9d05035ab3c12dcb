// What module.cc takes from module_codec.cc.
#pragma once

namespace pybind11 {
class module_;
}

namespace satchel {
void bind_codecs(pybind11::module_&);
}
