// The Python face of the native library. kernels/__init__.py is the public one; tests call these directly.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "kv_cache.h"
#include "linear.h"
#include "module_cache.h"
#include "module_codec.h"
#include "threads.h"
#include "variant.h"

namespace py = pybind11;
using namespace satchel;

void bind_entropy(py::module_& m);  // module_entropy.cc

namespace {

PackedMatrix packed_matrix(const Array<uint8_t>& data, int64_t outputs, int64_t inputs, int bits, int block,
                           bool has_min, float multiplier, bool split) {
  PackedMatrix w{data.data(), outputs, inputs, bits, block, has_min, multiplier, split};
  expect(bits == 4 || bits == 5 || bits == 6 || (bits == 8 && !has_min), "bits must be 4, 5, 6 or 8");
  expect(block == 16 || block == 32, "block must be 16 or 32");
  expect(inputs > 0 && inputs % 32 == 0 && outputs > 0, "inputs must be a multiple of 32");
  expect(w.known() && size_t(data.size()) == w.bytes(), "packed weights have the wrong size");
  return w;
}

// The archive, and the layer's and the head's place in it.
std::tuple<const Archive*, int, int> archive_of(const KVCache& cache, int layer, int kv_head) {
  const CacheShape& s = cache.shape();
  expect(cache.archive() && layer >= 0 && layer < s.layers && kv_head >= 0 && kv_head < s.kv_heads &&
             cache.archive_row(layer, kv_head) >= 0, "no such archive");
  return {cache.archive(), cache.archive_index(layer), cache.archive_row(layer, kv_head)};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Satchel's native kernels and KV cache; also the ONNX Runtime custom-op library of the domain 'satchel'.";
  m.attr("PAGE_TOKENS") = kPageTokens;
  bind_codecs(m);
  bind_entropy(m);

  m.def("variants", [] {
    std::vector<std::string> names;
    for (const Variant* v : variants()) names.emplace_back(v->name);
    return names;
  }, "Instruction sets that this CPU runs, slowest first.");
  m.def("active_variant", [] { return std::string(active_variant().name); });
  m.def("select_variant", [](const std::string& name) { select_variant(name.c_str()); }, py::arg("name"));

  m.def("linear", [](const Array<float>& x, const Array<uint8_t>& data, int64_t outputs, int bits, int block,
                     bool has_min, float multiplier, const std::optional<Array<float>>& bias, int thread_count,
                     bool split) {
    expect(x.ndim() == 2, "x must be a matrix");
    const PackedMatrix w = packed_matrix(data, outputs, x.shape(1), bits, block, has_min, multiplier, split);
    expect(!bias || bias->size() == outputs, "bias has the wrong size");
    const int64_t rows = x.shape(0);
    py::array_t<float> y({rows, outputs});
    float* out = y.mutable_data();
    const float* in = x.data();
    const float* b = bias ? bias->data() : nullptr;
    {
      py::gil_scoped_release release;
      std::vector<int16_t> codes(rows * w.inputs);
      std::vector<float> scales(rows * w.blocks()), sums(rows * w.blocks());
      QuantizedRows q{codes.data(), scales.data(), sums.data(), rows};
      active_variant().quantize_rows(w, in, q, 0, rows);
      threads(thread_count)((w.panels() + 3) / 4, [&](size_t task) {
        active_variant().linear(w, q, b, out, int64_t(task) * 4, std::min(w.panels(), int64_t(task) * 4 + 4));
      });
    }
    return y;
  }, py::arg("x"), py::arg("packed"), py::arg("outputs"), py::arg("bits"), py::arg("block"), py::arg("has_min"),
     py::arg("multiplier"), py::arg("bias") = py::none(), py::arg("threads") = 1, py::arg("split") = false,
     "y [M, N] = x [M, K] times the packed weights' transpose, plus bias [N].");

  m.def("vocabulary", [](const Array<float>& x, const Array<uint8_t>& data, int64_t outputs, float multiplier,
                         int64_t best_words, const std::optional<Array<float>>& bias, int thread_count) {
    const PackedMatrix w = packed_matrix(data, outputs, x.size(), 8, 32, false, multiplier, true);
    expect(!bias || bias->size() == outputs, "bias has the wrong size");
    py::array_t<float> y(outputs);
    ActivationBuffer buffer;
    vocabulary_row(w, x.data(), bias ? bias->data() : nullptr, best_words, y.mutable_data(), buffer, threads(thread_count));
    return y;
  }, py::arg("x"), py::arg("packed"), py::arg("outputs"), py::arg("multiplier"), py::arg("best_words") = 0,
     py::arg("bias") = py::none(), py::arg("threads") = 1,
     "Logits [N] of x [K] by a split matrix, exact for the best words (0: for all).");

  m.def("embed", [](const Array<int64_t>& ids, const Array<uint8_t>& data, int64_t outputs, int64_t inputs, int bits,
                    int block, bool has_min, float multiplier, bool split) {
    const PackedMatrix w = packed_matrix(data, outputs, inputs, bits, block, has_min, multiplier, split);
    py::array_t<float> out({int64_t(ids.size()), inputs});
    for (int64_t i = 0; i < ids.size(); ++i) {
      expect(ids.data()[i] >= 0 && ids.data()[i] < outputs, "a token id is outside the vocabulary");
      active_variant().embed(w, ids.data()[i], out.mutable_data() + i * inputs);
    }
    return out;
  }, py::arg("ids"), py::arg("packed"), py::arg("outputs"), py::arg("inputs"), py::arg("bits"), py::arg("block"),
     py::arg("has_min"), py::arg("multiplier"), py::arg("split") = false, "Rows of a packed matrix as float32 [len(ids), inputs].");

  m.def("gated", [](const Array<float>& gate, const Array<float>& up, const std::string& activation) {
    expect(gate.size() == up.size(), "gate and up differ in size");
    expect(activation == "silu" || activation == "gelu_tanh", "activation is neither silu nor gelu_tanh");
    py::array_t<float> out(std::vector<py::ssize_t>(gate.shape(), gate.shape() + gate.ndim()));
    active_variant().gated(activation == "silu" ? Activation::kSilu : Activation::kGeluTanh, gate.data(), up.data(),
                           out.mutable_data(), gate.size());
    return out;
  }, py::arg("gate"), py::arg("up"), py::arg("activation") = "silu", "activation(gate) * up, element by element.");

  py::class_<CacheHandle> kv(m, "KVCache");
  bind_state(kv);
  kv.def(py::init([](int layers, int heads, int kv_heads, int head_size, const std::string& storage, int thread_count,
                       int observed_queries, size_t limit_bytes, const std::optional<py::dict>& archive,
                       const std::vector<int>& windows, bool retention, const std::optional<py::dict>& streaming) {
             return std::make_unique<CacheHandle>(std::make_shared<KVCache>(CacheShape{
                 layers, heads, kv_heads, head_size, parse_storage(storage), thread_count, observed_queries,
                 limit_bytes, archive ? archive_settings(*archive) : nullptr, windows, retention,
                 streaming_heads(streaming, layers, kv_heads)}));
           }),
           py::kw_only(), py::arg("layers"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_size"),
           py::arg("storage") = "fp32", py::arg("threads") = 1, py::arg("observed_queries") = 0,
           py::arg("limit_bytes") = 0, py::arg("archive") = py::none(), py::arg("windows") = std::vector<int>(),
           py::arg("retention") = false, py::arg("streaming") = py::none())
      .def_property_readonly("handle", &CacheHandle::id)
      .def_property_readonly("closed", &CacheHandle::closed)
      .def("close", &CacheHandle::close)
      .def("fork", [](const CacheHandle& self) {
        return std::make_unique<CacheHandle>(std::shared_ptr<KVCache>(self.get().fork()));
      })
      .def("commit", [](CacheHandle& self) { self.get().commit(); })
      .def("rollback", [](CacheHandle& self) { self.get().rollback(); })
      .def("forget_from", [](CacheHandle& self, int position) { self.get().forget_from(position); },
           py::arg("position"), "Forgets every token at this position or later, committed or not. RuntimeError, and nothing "
           "is changed, when a layer with a window has forgotten what a query there would see.")
      .def("mark", [](CacheHandle& self) { self.get().mark(); },
           "Keeps what layers with a window hold now: forget_from() can come back here, and to 64 tokens before.")
      .def("release_mark", [](CacheHandle& self) { self.get().release_mark(); })
      .def("watch", [](CacheHandle& self, int first, int end) { self.get().watch(first, end); }, py::arg("first"),
           py::arg("end"), "From now on queries at position `end` or later note what attention they give to the pairs at "
           "positions first .. end - 1, in layers that see everything; first == end: no more.")
      .def("watched", [](const CacheHandle& self, int layer, int kv_head) {
        const std::vector<float> best = self.get().watched(layer, kv_head);
        return py::array_t<float>(py::ssize_t(best.size()), best.data());
      }, py::arg("layer"), py::arg("kv_head"),
         "float32 [end - first]: the logarithm of the largest share of a query's attention that each pair has had.")
      .def("value_norms", [](const CacheHandle& self, int layer, int kv_head, int first, int end) {
        const std::vector<float> norms = self.get().value_norms(layer, kv_head, first, end);
        return py::array_t<float>(py::ssize_t(norms.size()), norms.data());
      }, py::arg("layer"), py::arg("kv_head"), py::arg("first"), py::arg("end"),
         "float32 [hot pairs]: the lengths of the values of the hot pairs at positions first .. end - 1.")
      .def_property_readonly("archived_until", [](const CacheHandle& self) { return self.get().archived_until(); })
      .def("archive", [](CacheHandle& self, int until, const std::optional<Array<float>>& block_scores, int thread_count) {
        const std::shared_ptr<KVCache> cache = self.shared();
        const CacheShape& s = cache->shape();
        const int blocks = (until - cache->archived_until()) / kBlockTokens;
        expect(!block_scores || (block_scores->ndim() == 3 && block_scores->shape(0) == cache->archived_layers() &&
                                 block_scores->shape(1) == s.kv_heads && block_scores->shape(2) == blocks),
               "block_scores must be [layers that see everything, kv_heads, blocks]");
        const float* scores = block_scores ? block_scores->data() : nullptr;
        py::gil_scoped_release release;
        cache->archive_until(until, scores, threads(thread_count));
      }, py::arg("until"), py::arg("block_scores") = py::none(), py::arg("threads") = 1,
         "Stores all pairs before `until` (a multiple of 64; of 256 with clusters) in the archive; they stay hot until "
         "drop_archived().")
      .def("drop_archived", [](CacheHandle& self) { self.get().drop_archived(); },
           "Forgets in the hot tier what the archive has.")
      .def("archive_usage", [](const CacheHandle& self) {
        py::dict usage;
        const Archive* a = self.get().archive();
        usage["sink_bytes"] = a ? a->sink_bytes() : 0;
        usage["digest_bytes"] = a ? a->digest_bytes() : 0;
        usage["warm_bytes"] = a ? a->warm_bytes() : 0;
        usage["cold_bytes"] = a ? a->cold_bytes() : 0;
        usage["lost_tokens"] = a ? a->lost_tokens() : 0;
        usage["flash_bytes_read"] = a ? a->flash_bytes_read() : 0;
        return usage;
      })
      .def("recalled", [](const CacheHandle& self, int layer, int kv_head) {
        const auto [a, index, row] = archive_of(self.get(), layer, kv_head);
        return a->chosen(index, row);
      }, py::arg("layer"), py::arg("kv_head"), "Blocks (of 16 tokens) that attention reads from the archive now.")
      .def("archive_order", [](const CacheHandle& self, int layer, int kv_head) {
        const auto [a, index, row] = archive_of(self.get(), layer, kv_head);
        py::array_t<int32_t> positions(a->end());
        for (int slot = 0; slot < a->end(); ++slot) {
          const uint8_t* order = a->order(index, row, slot / kDigestTokens);
          positions.mutable_data()[slot] =
              order ? slot / kDigestTokens * kDigestTokens + order[slot % kDigestTokens] : slot;
        }
        return positions;
      }, py::arg("layer"), py::arg("kv_head"), "Positions in the order of the blocks: block b has [16 * b, 16 * b + 16).")
      .def("read_archive", [](const CacheHandle& self, int layer, int kv_head) {
        const auto [a, index, row] = archive_of(self.get(), layer, kv_head);
        const py::ssize_t n = a->end(), d = self.get().shape().head_size;
        py::array_t<float> keys({n, d}), values({n, d});
        a->read(index, row, 0, a->end(), keys.mutable_data(), values.mutable_data());
        return py::make_tuple(keys, values);
      }, py::arg("layer"), py::arg("kv_head"), "(keys before RoPE [n, D], values [n, D]) of positions 0 .. n, decoded.")
      .def("archived_heads", [](const CacheHandle& self, int layer) {
        expect(layer >= 0 && layer < self.get().shape().layers, "the cache has no such layer");
        return self.get().archived_heads(layer);
      }, py::arg("layer"), "How many KV heads of a layer are archived: those that see everything.")
      .def("tokens", [](const CacheHandle& self, int layer, int kv_head) { return self.get().tokens(layer, kv_head); },
           py::arg("layer"), py::arg("kv_head"))
      .def_property_readonly("bytes", [](const CacheHandle& self) { return self.get().bytes(); })
      .def_property_readonly("pool_bytes", [](const CacheHandle& self) { return self.get().pool().used_bytes(); })
      .def_property_readonly("pool_peak_bytes", [](const CacheHandle& self) { return self.get().pool().peak_bytes(); })
      .def_property_readonly("pool_held_bytes", [](const CacheHandle& self) { return self.get().pool().held_bytes(); })
      .def("trim", [](CacheHandle& self) { self.get().trim(); }, "Gives memory that no page is in back to the system.")
      .def_property_readonly("page_bytes", [](const CacheHandle& self) { return self.get().pool().page_bytes(); })
      .def("retain", [](CacheHandle& self, int layer, int kv_head, const Array<int32_t>& kept) {
        const std::shared_ptr<KVCache> cache = self.shared();
        py::gil_scoped_release release;
        cache->retain(layer, kv_head, kept.data(), int(kept.size()));
      }, py::arg("layer"), py::arg("kv_head"), py::arg("kept"))
      .def("retain_layer", [](CacheHandle& self, int layer, const std::vector<Array<int32_t>>& kept) {
        const std::shared_ptr<KVCache> cache = self.shared();
        std::vector<KVCache::Kept> heads;
        for (const auto& tokens : kept) {
          expect(tokens.ndim() == 1, "kept must be the tokens of each KV head");
          heads.push_back({tokens.data(), int(tokens.size())});
        }
        py::gil_scoped_release release;
        cache->retain_layer(layer, heads);
      }, py::arg("layer"), py::arg("kept"), "Keeps tokens kept[kv_head] of every head of a layer; all heads or none.")
      .def("overwrite", [](CacheHandle& self, int layer, int kv_head, const Array<int32_t>& tokens,
                           const Array<float>& keys, const Array<float>& values) {
        const std::shared_ptr<KVCache> cache = self.shared();
        for (const auto* pairs : {&keys, &values})
          expect(pairs->ndim() == 2 && pairs->shape(0) == tokens.size() && pairs->shape(1) == cache->shape().head_size,
                 "keys and values must be [tokens, head_size]");
        py::gil_scoped_release release;
        cache->overwrite(layer, kv_head, tokens.data(), int(tokens.size()), keys.data(), values.data());
      }, py::arg("layer"), py::arg("kv_head"), py::arg("tokens"), py::arg("keys"), py::arg("values"),
         "Gives tokens of a head other keys (after RoPE) and values [tokens, D].")
      .def("positions", [](const CacheHandle& self, int layer, int kv_head) {
        const KVCache& cache = self.get();
        py::array_t<int32_t> positions(cache.tokens(layer, kv_head));
        cache.positions(layer, kv_head, positions.mutable_data());
        return positions;
      }, py::arg("layer"), py::arg("kv_head"))
      .def("retention", [](const CacheHandle& self, int layer, int kv_head) {
        const KVCache& cache = self.get();
        py::array_t<float> scores(cache.tokens(layer, kv_head));
        cache.retention(layer, kv_head, scores.mutable_data());
        return scores;
      }, py::arg("layer"), py::arg("kv_head"), "What the graph said each held pair will be worth, float32 [tokens].")
      .def("read", [](const CacheHandle& self, int layer, int kv_head, bool rotated) {
        const KVCache& cache = self.get();
        const py::ssize_t n = cache.tokens(layer, kv_head), d = cache.shape().head_size;
        py::array_t<float> keys({n, d}), values({n, d});
        py::array_t<int32_t> positions(n);
        cache.read(layer, kv_head, rotated, keys.mutable_data(), values.mutable_data(), positions.mutable_data());
        return py::make_tuple(keys, values, positions);
      }, py::arg("layer"), py::arg("kv_head"), py::arg("rotated") = true,
         "(keys [n, D], values [n, D], positions [n]) as float32 and int32; keys after RoPE when `rotated`.")
      .def("observed", [](const CacheHandle& self, int layer) {
        const KVCache& cache = self.get();
        const auto& queries = cache.observed(layer);
        const auto& positions = cache.observed_positions(layer);
        py::array_t<float> q({py::ssize_t(positions.size()), py::ssize_t(cache.shape().heads),
                              py::ssize_t(cache.shape().head_size)});
        std::copy(queries.begin(), queries.end(), q.mutable_data());
        py::array_t<int32_t> p(py::ssize_t(positions.size()));
        std::copy(positions.begin(), positions.end(), p.mutable_data());
        return py::make_tuple(q, p);
      }, py::arg("layer"), "(queries before RoPE [n, H, D], positions [n]) of the last chunk's end.")
      .def("frequencies", [](const CacheHandle& self, int layer) {
        const auto& found = self.get().frequencies(layer);
        return py::array_t<float>(py::ssize_t(found.size()), found.data());
      }, py::arg("layer"), "Of the layer's RoPE [rotated dimensions / 2]; empty before its first run.")
      .def("attend", [](CacheHandle& self, int layer, const Array<float>& q, const Array<float>& k,
                        const Array<float>& v, const Array<int64_t>& positions, const Array<float>& frequencies,
                        float scale, float softcap, int window, float attention_factor, int thread_count,
                        const std::optional<Array<float>>& retention) {
        const std::shared_ptr<KVCache> cache = self.shared();  // outlives a close() from another thread
        const CacheShape& s = cache->shape();
        const auto shaped = [&](const Array<float>& a, int heads) {
          return a.ndim() == 3 && a.shape(0) == positions.size() && a.shape(1) == heads && a.shape(2) == s.head_size;
        };
        expect(shaped(q, s.heads) && shaped(k, s.kv_heads) && shaped(v, s.kv_heads), "q, k or v has the wrong shape");
        expect(!retention || (retention->ndim() == 2 && retention->shape(0) == positions.size() &&
                              retention->shape(1) == s.kv_heads), "retention must be [tokens, kv_heads]");
        py::array_t<float> out({q.shape(0), q.shape(1), q.shape(2)});
        const AttentionSettings settings{layer, scale, softcap, window, int(frequencies.size()) * 2, attention_factor};
        float* to = out.mutable_data();
        const float* scores = retention ? retention->data() : nullptr;
        {
          py::gil_scoped_release release;
          cache->attend(settings, q.data(), k.data(), v.data(), positions.data(), int(positions.size()),
                        frequencies.data(), to, threads(thread_count), scores);
        }
        return out;
      }, py::arg("layer"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("positions"), py::arg("frequencies"),
         py::kw_only(), py::arg("scale"), py::arg("softcap") = 0.0f, py::arg("window") = 0,
         py::arg("attention_factor") = 1.0f, py::arg("threads") = 1, py::arg("retention") = py::none());
}
