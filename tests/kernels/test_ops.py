"""The operators of the domain ``satchel`` as ONNX Runtime runs them: the same numbers, and refusals, no crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from satchel import kernels
from satchel.export.packing import unpack
from satchel.kernels import _native as native
from satchel.kernels import reference

Array = NDArray[Any]
TYPES = {
    "float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64,
    "float64": TensorProto.DOUBLE,
}  # fmt: skip
FORMAT = {"N": 33, "K": 64, "bits": 8, "block": 32, "has_min": 0, "split": 0, "multiplier": 0.5}
ATTENTION = {
    "layer": 0, "heads": 4, "kv_heads": 2, "head_size": 16, "scale": 0.25, "softcap": 0.0, "window": 0,
    "rope_dims": 16, "rope_attention_factor": 1.0,
}  # fmt: skip
FREQUENCIES = (100.0 ** (-np.arange(8) / 8)).astype(np.float32)


def session(
    op: str, feeds: Mapping[str, Array], attributes: Mapping[str, Any], threads: int = 2
) -> ort.InferenceSession:
    """A graph of one node whose inputs may have any shape."""
    inputs = [
        helper.make_tensor_value_info(name, TYPES[value.dtype.name], [f"{name}{i}" for i in range(value.ndim)])
        for name, value in feeds.items()
    ]
    node = helper.make_node(op, list(feeds), ["y"], domain="satchel", **attributes)
    graph = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("satchel", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(kernels.CUSTOM_OP_LIBRARY)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op: str, feeds: Mapping[str, Array], attributes: Mapping[str, Any], threads: int = 2) -> Array:
    result: Array = session(op, feeds, attributes, threads).run(["y"], dict(feeds))[0]
    return result


def packed_bytes(bits: int = 8, block: int = 32, has_min: bool = False, outputs: int = 33, inputs: int = 64) -> Array:
    """Random codes under ordinary scales: any bytes are valid codes."""
    rng = np.random.default_rng(bits)
    header = 2 if has_min else 1
    records = rng.integers(0, 256, (-(-outputs // 16), inputs // block, 32 * header + 2 * block * bits), np.uint8)
    factors = rng.uniform(0.5, 1.0, (*records.shape[:2], 16 * header)).astype(np.float16)
    records[:, :, : 32 * header] = factors.view(np.uint8)
    return records.reshape(-1)


def matrix(rows: int, columns: int = 64) -> Array:
    return np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)


def attention_feeds(cache: kernels.KVCache, tokens: int = 5, first: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(tokens)
    q, k, v = (rng.normal(size=(tokens, width)).astype(np.float32) for width in (64, 32, 32))
    places = np.arange(first, first + tokens)
    return {"q": q, "k": k, "v": v, "positions": places, "cache": np.array([cache.handle]), "frequencies": FREQUENCIES}


def make_cache(**options: Any) -> kernels.KVCache:
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "head_size": 16, **options}
    return kernels.KVCache(**shape)


# --- the same numbers


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "block", "has_min"), [(4, 32, True), (5, 16, False), (8, 32, False)])
def test_linear(threads: int, rows: int, bias: bool, bits: int, block: int, has_min: bool) -> None:
    packed, x = packed_bytes(bits, block, has_min), matrix(rows)
    offsets = np.arange(33, dtype=np.float32)
    feeds = {"x": x, "w": packed} | ({"b": offsets} if bias else {})
    attributes = {**FORMAT, "bits": bits, "block": block, "has_min": int(has_min)}
    expected = native.linear(x, packed, 33, bits, block, has_min, 0.5, offsets if bias else None)
    np.testing.assert_array_equal(run("QuantizedLinear", feeds, attributes, threads), expected)


def test_logits_that_need_not_be_exact() -> None:
    packed, x, words = packed_bytes(outputs=16 * 520), matrix(1), 16 * 520  # any bytes are valid halves, too
    offsets = np.zeros(words, np.float32)
    offsets[5] = 1e5
    feeds = {"x": x, "w": packed, "best_words": np.zeros(1, np.int64), "b": offsets}
    attributes = {**FORMAT, "N": words, "split": 1}
    found = {}
    for best in (0, 1):
        feeds["best_words"] = np.array([best])
        found[best] = run("VocabularyProjection", feeds, attributes)[0]
        expected = native.vocabulary(x[0], packed, words, 0.5, best, offsets)
        np.testing.assert_array_equal(found[best], expected)
    assert (found[0] != found[1]).any()
    refused("VocabularyProjection", feeds | {"best_words": np.arange(2)}, attributes, "best_words must be one number")
    refused("VocabularyProjection", feeds | {"x": matrix(2)}, attributes, "must be one row")
    for change in ({"split": 0}, {"split": 0, "bits": 4}):
        refused("VocabularyProjection", feeds, attributes | change, "the matrix must be split")
    refused("VocabularyProjection", feeds, attributes | {"bits": 4}, "weight format that this version does not know")


def test_a_large_linear_in_many_tasks() -> None:
    """Several tasks of 64 KB for one row, several of 4 panels for many."""
    packed = packed_bytes(8, 32, False, 1030, 512)
    for rows in (1, 20):
        x = matrix(rows, 512)
        got = run("QuantizedLinear", {"x": x, "w": packed}, {**FORMAT, "N": 1030, "K": 512})
        np.testing.assert_array_equal(got, native.linear(x, packed, 1030, 8, 32, False, 0.5))


def test_a_session_takes_other_lengths_in_turn() -> None:
    """The buffer of activations is kept from run to run."""
    packed = packed_bytes()
    opened = session("QuantizedLinear", {"x": matrix(1), "w": packed}, FORMAT)
    for rows in (3, 40, 1, 17):
        x = matrix(rows)
        got = opened.run(["y"], {"x": x, "w": packed})[0]
        np.testing.assert_array_equal(got, native.linear(x, packed, 33, 8, 32, False, 0.5))


@pytest.mark.parametrize(("bits", "block", "has_min"), [(4, 32, True), (5, 16, False), (8, 32, False)])
def test_embedding(bits: int, block: int, has_min: bool) -> None:
    packed, ids = packed_bytes(bits, block, has_min), np.array([0, 32, 16, 0, 31])
    attributes = {**FORMAT, "bits": bits, "block": block, "has_min": int(has_min)}
    got = run("QuantizedEmbedding", {"ids": ids, "w": packed}, attributes)
    np.testing.assert_array_equal(got, native.embed(ids, packed, 33, 64, bits, block, has_min, 0.5))
    assert run("QuantizedEmbedding", {"ids": ids[:0], "w": packed}, attributes).shape == (0, 64)


@pytest.mark.parametrize(("code", "activation"), [(0, "silu"), (1, "gelu_tanh")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 1000), (0, 7), (3, 32768)])
def test_gated(shape: tuple[int, int], code: int, activation: str) -> None:
    rng = np.random.default_rng(1)
    gate, up = (rng.normal(0, 3, shape).astype(np.float32) for _ in range(2))
    got = run("GatedUnit", {"g": gate, "u": up}, {"activation": code})
    np.testing.assert_allclose(got, native.gated(gate, up, activation), rtol=1e-6)


EXPERTS, HIDDEN, WIDTH = 5, 64, 32
STACKED = {
    "gate": (EXPERTS * WIDTH, HIDDEN, 8, 32, False), "up": (EXPERTS * WIDTH, HIDDEN, 4, 32, True),
    "down": (EXPERTS * HIDDEN, WIDTH, 6, 16, False),
}  # fmt: skip


def expert_inputs(rows: int) -> tuple[dict[str, Array], dict[str, Any]]:
    rng = np.random.default_rng(rows)
    logits = rng.normal(0, 2, (rows, EXPERTS)).astype(np.float32)
    feeds: dict[str, Array] = {"x": matrix(rows, HIDDEN), "logits": logits}
    attributes: dict[str, Any] = {"experts": EXPERTS, "used": 2, "normalized": 1, "activation": 0}
    for name, (outputs, inputs, bits, block, has_min) in STACKED.items():
        feeds[name] = packed_bytes(bits, block, has_min, outputs, inputs)
        values = {"N": outputs, "K": inputs, "bits": bits, "block": block, "has_min": int(has_min), "multiplier": 2**-9}
        attributes |= {f"{name}_{key}": value for key, value in values.items()}
    return feeds, attributes


@pytest.mark.parametrize(("normalized", "activation"), [(1, "silu"), (0, "silu"), (1, "gelu_tanh")])
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 70])
def test_experts(rows: int, normalized: int, activation: str) -> None:
    feeds, attributes = expert_inputs(rows)
    attributes |= {"normalized": normalized, "activation": int(activation == "gelu_tanh")}
    plain = {
        name: unpack(feeds[name], *STACKED[name], 2**-9).reshape(EXPERTS, -1, STACKED[name][1]) for name in STACKED
    }
    expected = reference.mixture_of_experts(
        feeds["x"], feeds["logits"], *plain.values(), used=2, normalized=bool(normalized), activation=activation
    )
    got = run("MixtureOfExperts", feeds, attributes)
    np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max(initial=0.0))
    for row in range(min(rows, 3)):  # alone as among others
        one = {name: feeds[name][row : row + 1] if name in ("x", "logits") else feeds[name] for name in feeds}
        alone = run("MixtureOfExperts", one, attributes)[0]
        np.testing.assert_allclose(got[row], alone, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_experts_by_a_router_that_fails(fault: float) -> None:
    feeds, attributes = expert_inputs(3)
    feeds["logits"][1, 2] = fault
    got = run("MixtureOfExperts", feeds, attributes)
    assert np.isfinite(got[[0, 2]]).all(), "other tokens do not suffer"


@pytest.mark.parametrize(
    "change",
    [{"experts": 4}, {"experts": 0}, {"used": 6}, {"used": 0}, {"down_N": 64}, {"up_N": 32}, {"gate_K": 32}],
    ids=str,
)
def test_experts_that_do_not_fit(change: dict[str, int]) -> None:
    feeds, attributes = expert_inputs(2)
    refused("MixtureOfExperts", feeds, {**attributes, **change}, "do not fit together")


def test_experts_with_wrong_inputs() -> None:
    feeds, attributes = expert_inputs(2)
    refused("MixtureOfExperts", {**feeds, "x": matrix(2, 32)}, attributes, "shapes disagree")
    refused("MixtureOfExperts", {**feeds, "logits": matrix(3, EXPERTS)}, attributes, "shapes disagree")
    refused("MixtureOfExperts", {**feeds, "up": feeds["up"][:-1]}, attributes, "wrong size")


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "change",
    [
        {}, {"window": 3}, {"softcap": 2.0}, {"rope_attention_factor": 1.5}, {"rope_dims": 8}, {"rope_dims": 0},
        {"layer": 1},
    ],
)
def test_attention(storage: str, change: dict[str, Any]) -> None:
    settings = {**ATTENTION, **change}
    frequencies = FREQUENCIES[: settings["rope_dims"] // 2]
    cache, twin = make_cache(storage=storage), make_cache(storage=storage)
    feeds = {**attention_feeds(cache), "frequencies": frequencies}
    opened = session("CachedAttention", feeds, settings)
    for first, tokens in ((0, 5), (5, 80), (85, 1)):
        feeds = {**attention_feeds(cache, tokens, first), "frequencies": frequencies}
        q, k, v = (feeds[name].reshape(tokens, -1, 16) for name in "qkv")
        expected = twin.attend(
            settings["layer"], q, k, v, feeds["positions"], frequencies, scale=0.25, softcap=settings["softcap"],
            window=settings["window"], attention_factor=settings["rope_attention_factor"],
        )  # fmt: skip
        np.testing.assert_array_equal(opened.run(["y"], feeds)[0], expected.reshape(tokens, 64))
        cache.commit()
        for name in range(3):
            np.testing.assert_array_equal(cache.read(settings["layer"], 1)[name], twin.read(settings["layer"], 1)[name])


def test_one_session_serves_many_caches() -> None:
    caches = [make_cache() for _ in range(3)]
    opened = session("CachedAttention", attention_feeds(caches[0]), ATTENTION)
    outs = [opened.run(["y"], attention_feeds(cache))[0] for cache in caches]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])
    assert [cache.tokens(0, 0) for cache in caches] == [5, 5, 5]


# --- refusals. A broken kernel might crash: what could is run in a process of its own (below).


def refused(op: str, feeds: Mapping[str, Array], attributes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        run(op, feeds, attributes)
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "does not know"), ({"bits": 0}, "does not know"), ({"bits": -8}, "does not know"),
        ({"bits": 2**32 + 8}, "does not know"), ({"block": 0}, "does not know"), ({"block": 48}, "does not know"),
        ({"N": 0}, "does not know"), ({"N": -33}, "does not know"), ({"K": 0}, "does not know"),
        ({"K": 48}, "does not know"), ({"has_min": 1}, "does not know"), ({"N": 49}, "wrong size"),
        ({"K": 96}, "wrong size"), ({"bits": 4}, "wrong size"), ({"N": 2**62}, "wrong size|does not know"),
    ],
)  # fmt: skip
def test_hostile_weight_formats(change: dict[str, int], message: str) -> None:
    attributes = {**FORMAT, **change}
    x = matrix(2, attributes["K"] or 64)
    refused("QuantizedLinear", {"x": x, "w": packed_bytes()}, attributes, message)
    refused("QuantizedEmbedding", {"ids": np.array([1]), "w": packed_bytes()}, attributes, message)


@pytest.mark.parametrize("missing", sorted(FORMAT))
def test_missing_weight_attributes(missing: str) -> None:
    attributes = {name: value for name, value in FORMAT.items() if name != missing}
    refused("QuantizedLinear", {"x": matrix(1), "w": packed_bytes()}, attributes, missing)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": matrix(2, 96), "w": packed_bytes()}, "x has the wrong width"),
        ({"x": matrix(2).reshape(-1), "w": packed_bytes()}, "must be a matrix"),
        ({"x": matrix(2).reshape(1, 2, 64), "w": packed_bytes()}, "too many dimensions"),
        ({"x": matrix(2), "w": packed_bytes()[:-1]}, "packed weights have the wrong size"),
        ({"x": matrix(2), "w": packed_bytes()[:0]}, "packed weights have the wrong size"),
        ({"x": matrix(2), "w": packed_bytes().reshape(2, -1)}, "too many dimensions"),
        ({"x": matrix(2), "w": packed_bytes(), "b": np.zeros(32, np.float32)}, "bias has the wrong size"),
        ({"x": matrix(2), "w": packed_bytes(), "b": np.zeros((33, 1), np.float32)}, "too many dimensions"),
        ({"x": matrix(2).astype(np.float64), "w": packed_bytes()}, "."),
    ],
)
def test_hostile_linear_inputs(feeds: dict[str, Array], message: str) -> None:
    refused("QuantizedLinear", feeds, FORMAT, message)


@pytest.mark.parametrize("index", [-1, 33, 2**62])
def test_ids_outside_the_vocabulary(index: int) -> None:
    refused("QuantizedEmbedding", {"ids": np.array([0, index]), "w": packed_bytes()}, FORMAT, f"{index} is outside")


def test_gated_of_different_shapes() -> None:
    refused("GatedUnit", {"g": matrix(2, 6), "u": matrix(3, 4)}, {"activation": 0}, "differ in shape")
    refused("GatedUnit", {"g": matrix(2), "u": matrix(2).reshape(-1)}, {"activation": 1}, "must be a matrix")


ONE = np.zeros((5, 64), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ONE[:4]}, "shapes disagree"), ({"q": ONE[:, :48]}, "shapes disagree"),
        ({"q": ONE.reshape(5, 4, 16)}, "too many dimensions"), ({"k": ONE[:, :16]}, "shapes disagree"),
        ({"k": ONE[:4, :32]}, "shapes disagree"), ({"v": ONE}, "shapes disagree"),
        ({"v": ONE[:0, :32]}, "shapes disagree"), ({"positions": np.arange(4)}, "shapes disagree"),
        ({"positions": np.arange(5)[:, None]}, "too many dimensions"),
        ({"positions": np.arange(5) - 1}, "out of range"), ({"positions": np.arange(5)[::-1].copy()}, "must ascend"),
        ({"frequencies": FREQUENCIES[:7]}, "shapes disagree"), ({"cache": np.array([0])}, "closed"),
        ({"frequencies": np.zeros(9, np.float32)}, "shapes disagree"),
        ({"cache": np.array([-1])}, "closed"), ({"cache": np.array([2**40])}, "closed"),
    ],
)  # fmt: skip
def test_hostile_attention_inputs(change: dict[str, Array], message: str) -> None:
    cache = make_cache()
    refused("CachedAttention", {**attention_feeds(cache), **change}, ATTENTION, message)
    assert cache.tokens(0, 0) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "no such layer"), ({"layer": -1}, "no such layer"), ({"heads": 2}, "another model"),
        ({"kv_heads": 4}, "another model"), ({"head_size": 32}, "another model"), ({"head_size": -16}, "another model"),
        ({"rope_dims": 15}, "shapes disagree|rope_dims"), ({"rope_dims": 17}, "rope_dims"),
        ({"rope_dims": -16}, "shapes disagree"), ({"rope_dims": 2**32 + 16}, "."), ({"layer": 2**32}, "."),
        ({"window": -1}, "window"),
    ],
)  # fmt: skip
def test_hostile_attention_attributes(change: dict[str, int], message: str) -> None:
    cache = make_cache()
    refused("CachedAttention", attention_feeds(cache), {**ATTENTION, **change}, message)


@pytest.mark.parametrize("missing", sorted(ATTENTION))
def test_missing_attention_attributes(missing: str) -> None:
    attributes = {name: value for name, value in ATTENTION.items() if name != missing}
    refused("CachedAttention", attention_feeds(make_cache()), attributes, missing)


def test_a_closed_cache_is_refused_and_others_go_on() -> None:
    closed, other = make_cache(), make_cache()
    opened = session("CachedAttention", attention_feeds(other), ATTENTION)
    feeds = attention_feeds(closed)
    closed.close()
    with pytest.raises(Exception, match="this KV cache is closed"):
        opened.run(["y"], feeds)
    assert opened.run(["y"], attention_feeds(other))[0].shape == (5, 64)


def test_a_full_cache_says_so() -> None:
    page = make_cache().page_bytes
    cache = make_cache(limit_bytes=3 * page)
    opened = session("CachedAttention", attention_feeds(cache), ATTENTION)
    opened.run(["y"], attention_feeds(cache))
    cache.commit()
    with pytest.raises(Exception, match=f"more than its limit of {3 * page} bytes"):
        opened.run(["y"], attention_feeds(cache, 80, 5))
    cache.rollback()
    assert cache.tokens(0, 0) == 5
    assert opened.run(["y"], attention_feeds(cache, 10, 5))[0].shape == (10, 64)


CRASHERS = {
    "no cache named": "feeds['cache'] = np.zeros(0, np.int64)",
    "a cache as a scalar": "feeds['cache'] = np.array(cache.handle)",
    "two caches named": "feeds['cache'] = np.array([cache.handle, cache.handle])",
    "no tokens": "feeds.update(q=np.zeros((0, 64), np.float32), k=np.zeros((0, 32), np.float32), "
    "v=np.zeros((0, 32), np.float32), positions=np.zeros(0, np.int64))",
}


@pytest.mark.parametrize("name", CRASHERS)
def test_nothing_crashes(name: str) -> None:
    """In a process of its own; an error is as good as a result, a signal is not."""
    here = os.path.abspath(__file__)  # noqa: PTH100
    done = in_process(
        f"""
        import importlib.util, numpy as np
        spec = importlib.util.spec_from_file_location("ops", {here!r})
        ops = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ops)
        cache = ops.make_cache()
        feeds = ops.attention_feeds(cache)
        {CRASHERS[name]}
        try:
            print("result", ops.run("CachedAttention", feeds, ops.ATTENTION).shape)
        except Exception as error:
            print("refused", error)
        """
    )
    assert done.returncode == 0, f"{signal.Signals(-done.returncode).name}: {done.stderr[-300:]}"
    assert done.stdout.startswith(("result", "refused"))


def test_a_matrix_whose_bytes_wrap_around_is_refused() -> None:
    attributes = {**FORMAT, "N": 16 * (2**58 + 1)}
    done = in_process(
        f"""
        import importlib.util, numpy as np
        spec = importlib.util.spec_from_file_location("ops", {os.path.abspath(__file__)!r})
        ops = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ops)
        feeds = {{"ids": np.array([2**40]), "w": np.zeros(1088, np.uint8)}}
        try:
            print("result", ops.run("QuantizedEmbedding", feeds, {attributes!r}).shape)
        except Exception as error:
            print("refused", error)
        """  # noqa: PTH100
    )
    assert (done.returncode, done.stdout[:7]) == (0, "refused"), done.stderr[-300:]


def in_process(code: str) -> subprocess.CompletedProcess[str]:
    arguments: Sequence[str] = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
