"""ONNX folders as Optimum exports them: the same package as from the safetensors with the same weights."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import satchel
from onnx import helper
from satchel.errors import ModelError
from satchel.export.blocks import to_float
from satchel.export.exporter import export_model
from satchel.export.sources import open_source, views
from satchel.export.sources.onnx_graph import read_graph
from tiny_folders import tiny_config, tiny_tensors, write_json, write_tiny_folder, write_weights
from tiny_onnx import optimum_graph, save_graph, write_optimum_folder

FORM = Path(__file__).with_name("optimum_form.txt")
# what differs from `write_optimum_folder`'s defaults
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "output of its own": {"tied": False},
    "biases": {"kind": "qwen2", "tied": False},
    "float16": {"kind": "qwen2", "dtype": "F16"},
    "bfloat16": {"kind": "qwen2", "dtype": "BF16", "tied": False},
    "external data": {"external": True},
    "external float16": {"external": True, "dtype": "F16", "tied": False},
    "two branches": {"merged": True, "name": "decoder_model_merged.onnx", "tied": False},
    "two branches with external data": {"merged": True, "name": "decoder_model_merged.onnx", "external": True},
    "constants not folded": {"folded": False, "kind": "qwen2", "tied": False},
    "not folded, two branches": {"folded": False, "kind": "qwen2", "merged": True},
    "with past only": {"name": "decoder_with_past_model.onnx"},
    "a name of its own": {"name": "my_llama.onnx"},
}
Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("form", FORMS)
def test_graph_and_safetensors_of_the_same_weights_are_the_same_package(form: str, tmp_path: Path) -> None:
    options = FORMS[form]
    kind, tied, dtype = options.get("kind", "llama"), options.get("tied", True), options.get("dtype", "F32")
    theirs = write_tiny_folder(tmp_path / "a" / "model", kind, dtype=dtype, tied=tied)
    ours = write_optimum_folder(tmp_path / "b" / "model", **options)
    assert not list(ours.glob("*.safetensors"))
    with open_source(theirs) as wanted, open_source(ours) as found:
        assert found.metadata == wanted.metadata
        assert found.interleaved_rope is False
        assert set(found.tensors) == set(wanted.tensors)
        for name, tensor in wanted.tensors.items():
            view = found.tensors[name]
            assert (view.name, view.type_name, view.shape, view.size) == (
                tensor.name, tensor.type_name, tensor.shape, tensor.size
            )  # fmt: skip
            whole = tensor.read_rows(0, tensor.rows)
            np.testing.assert_array_equal(view.read_rows(0, view.rows), whole, err_msg=name)
            pieces = [view.read_rows(start, stop) for start, stop in view.row_chunks(7)]
            np.testing.assert_array_equal(np.concatenate(pieces), whole, err_msg=name)
    packages = [export_model(folder, tmp_path / folder.parent.name / "package") for folder in (theirs, ours)]
    assert packages[0].data_file.read_bytes() == packages[1].data_file.read_bytes()
    assert packages[0].spec == packages[1].spec


def test_logits_are_those_of_the_safetensors(tmp_path: Path) -> None:
    """The whole way, for one form; that of the others is the same from the package on."""
    folders = [write_tiny_folder(tmp_path / "a", "qwen2"), write_optimum_folder(tmp_path / "b", "qwen2")]
    logits = []
    for folder in folders:
        with satchel.load(folder, cache_dir=tmp_path / "cache") as model:
            logits.append(model.last_logits(list(range(70))))
    np.testing.assert_array_equal(*logits)
    assert np.ptp(logits[0]) > 1


# --- Gemma's norms lack their 1 in safetensors; in graphs it is folded into them, or not ---


def gemma_tensors(alike: bool = False) -> dict[str, Floats]:
    """A gemma3's tensors, with norms around 0."""
    rng = np.random.default_rng(3)
    norms = {"input_layernorm": 64, "post_attention_layernorm": 64, "pre_feedforward_layernorm": 64,
             "post_feedforward_layernorm": 64, "self_attn.q_norm": 16, "self_attn.k_norm": 16}  # fmt: skip
    found = {name: values for name, values in tiny_tensors().items() if values.ndim == 2}
    for name, size in {
        **{f"model.layers.{layer}.{norm}.weight": size for layer in range(2) for norm, size in norms.items()},
        "model.norm.weight": 64,
    }.items():
        found[name] = (0.0 if alike else rng.normal(0, 0.3, size)) * np.ones(size, np.float32)
    return {name: values.astype(np.float32) for name, values in found.items()}


def gemma_folder(folder: Path, tensors: dict[str, Floats], **options: Any) -> Path:
    write_tiny_folder(folder)
    config = tiny_config("gemma3_text", hidden_activation="gelu_pytorch_tanh", head_dim=16, sliding_window=24,
                         query_pre_attn_scalar=16, hidden_act=...)  # fmt: skip
    write_json(folder / "config.json", config)
    if options:
        save_graph(folder, optimum_graph(tensors, norm_shift=1.0, **options))
    else:
        write_weights(folder, tensors)
    return folder


@pytest.mark.parametrize("alike", [False, True], ids=["norms differ", "norms alike"])
@pytest.mark.parametrize("options", [{"folded": True}, {"folded": False}, {"folded": False, "merged": True}],
                         ids=["folded", "not folded", "two branches"])  # fmt: skip
def test_the_one_in_gemmas_norms(options: dict[str, Any], alike: bool, tmp_path: Path) -> None:
    tensors = gemma_tensors(alike)
    folders = [gemma_folder(tmp_path / "a", tensors), gemma_folder(tmp_path / "b", tensors, **options)]
    packages = [export_model(folder, tmp_path / f"p{index}") for index, folder in enumerate(folders)]
    assert packages[0].data_file.read_bytes() == packages[1].data_file.read_bytes()
    with open_source(folders[1]) as source:
        norm = source.tensors["blk.1.attn_norm.weight"]
        found = to_float(norm.read_rows(0, 1), norm.type_name)
        np.testing.assert_array_equal(found[0], tensors["model.layers.1.input_layernorm.weight"] + np.float32(1))


# --- the form of the fixtures, and the parser ---


def weight_uses(model: onnx.ModelProto) -> list[str]:
    """A line for each node that a weight goes into: operator, name, which input, weight, dimensions. Layer 0 only."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    lines = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            tensor = tensors.get(name)
            other_layer = "/layers." in node.name and "/layers.0/" not in node.name
            if tensor is None or not tensor.dims or tensor.data_type == onnx.TensorProto.INT64 or other_layer:
                continue
            # the numbers that torch counts up say nothing
            shown = name.rpartition("_")[0] if "::" in name else name
            place = node.name if "/" in node.name else "-"
            lines.append(f"{node.op_type} {place} {index} {shown} {len(tensor.dims)}")
    return sorted(lines)


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "llama-unfolded", "gemma3"])
def test_the_fixtures_have_the_form_of_real_exports(name: str) -> None:
    """``optimum_form.txt`` is what `weight_uses` says of the folders that benchmarks/optimum_folders.py makes."""
    part = next(part for part in FORM.read_text().split("# ") if part.startswith(f"{name}\n"))
    rng = np.random.default_rng(0)
    tensors = gemma_tensors() if name == "gemma3" else tiny_tensors()
    if name in ("gemma3", "llama-biases"):
        tensors["lm_head.weight"] = rng.normal(size=(300, 64)).astype(np.float32)
    if name == "llama-biases":
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            tensors[key.replace(".weight", ".bias")] = rng.normal(size=len(tensors[key])).astype(np.float32)
    graph = optimum_graph(tensors, folded="unfolded" not in name, norm_shift=1.0 if name == "gemma3" else 0.0)
    assert weight_uses(graph) == part.splitlines()[1:]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_the_graph_is_read_as_the_onnx_package_reads_it(external: bool, merged: bool, tmp_path: Path) -> None:
    write_optimum_folder(tmp_path, "qwen2", external=external, merged=merged)
    path = tmp_path / "model.onnx"
    wanted = onnx.load(path, load_external_data=False).graph
    with path.open("rb", buffering=0) as file:
        found = read_graph(path, file)
    assert found.inputs == [value.name for value in wanted.input]
    assert found.outputs == [value.name for value in wanted.output]
    data = path.read_bytes()
    assert list(found.initializers) == [tensor.name for tensor in wanted.initializer]
    for tensor in wanted.initializer:
        mine = found.initializers[tensor.name]
        assert (mine.shape, mine.data_type) == (tuple(tensor.dims), tensor.data_type)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            assert mine.external == {entry.key: entry.value for entry in tensor.external_data}
        else:
            assert data[mine.start : mine.stop] == tensor.raw_data

    def compare(mine: Any, theirs: Any) -> None:
        assert len(mine.nodes) == len(theirs.node)
        for node, other in zip(mine.nodes, theirs.node, strict=True):
            assert (node.operator, node.name) == (other.op_type, other.name)
            assert (node.inputs, node.outputs) == (tuple(other.input), tuple(other.output))
            values = {item.name: helper.get_attribute_value(item) for item in other.attribute}
            assert node.attributes.get("perm") == values.get("perm")
            graphs = [value for value in values.values() if isinstance(value, onnx.GraphProto)]
            for below, below_theirs in zip(node.graphs, graphs, strict=True):
                compare(below, below_theirs)

    compare(found, wanted)


def test_numbers_in_other_forms(tmp_path: Path) -> None:
    """float_data is read as raw_data is; Gemm with and without transB; a norm by a fused operator; unpacked dims."""
    folder = write_optimum_folder(tmp_path / "b", "qwen2", tied=False)
    model = onnx.load(folder / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    values = onnx.numpy_helper.to_array(tensors["model.norm.weight"])
    tensors["model.norm.weight"].CopyFrom(helper.make_tensor("model.norm.weight", 1, [64], values.tolist()))
    for node in model.graph.node:
        if node.name == "/model/layers.0/self_attn/q_proj/MatMul":
            node.op_type = "Gemm"
            node.input.append("model.layers.0.self_attn.q_proj.bias")
        if node.name == "/model/layers.1/mlp/up_proj/MatMul":
            node.op_type = "Gemm"
            node.attribute.append(helper.make_attribute("transB", 1))
            turned = onnx.numpy_helper.to_array(tensors[node.input[1]]).T
            tensors[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(turned), node.input[1]))
        if node.name == "/model/layers.1/input_layernorm/Mul_1":
            node.op_type, node.name = "SimplifiedLayerNormalization", f"{node.name}/SimplifiedLayerNormFusion/"
            node.input[:] = [node.input[1], node.input[0]]
    model.graph.initializer.append(helper.make_tensor("epsilon", 1, [1], [1e-6]))
    model.graph.node.append(helper.make_node("Add", ["x", "epsilon"], ["y"], name="/model/norm/Add"))
    added = next(node for node in model.graph.node if node.name == "/model/layers.0/self_attn/q_proj/Add")
    model.graph.node.remove(added)
    save_graph(folder, model)
    theirs = export_model(write_tiny_folder(tmp_path / "a", "qwen2", tied=False), tmp_path / "pa")
    assert export_model(folder, tmp_path / "pb").data_file.read_bytes() == theirs.data_file.read_bytes()


# --- reading ---


@pytest.mark.parametrize("size", [1, 100, 1000, 30_000])
def test_bands_of_any_size_read_the_same(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = write_tiny_folder(tmp_path / "a", tied=False, dtype="F16")
    ours = write_optimum_folder(tmp_path / "b", tied=False, dtype="F16")
    with open_source(theirs) as wanted, open_source(ours) as found:
        monkeypatch.setattr(views, "BAND_BYTES", size)
        rng = np.random.default_rng(size)
        names = ["output.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight"]
        for _ in range(30):  # any order, two matrices in turn
            name = names[rng.integers(3)]
            start, stop = sorted(rng.integers(0, found.tensors[name].rows + 1, 2))
            np.testing.assert_array_equal(
                found.tensors[name].read_rows(start, stop), wanted.tensors[name].read_rows(start, stop)
            )


@pytest.mark.parametrize("external", [False, True], ids=["in the graph", "beside it"])
def test_memory_does_not_grow_with_a_matrix(external: bool, tmp_path: Path) -> None:
    """A sparse gigabyte, transposed: opened and read in part, one band at a time."""
    folder = write_optimum_folder(tmp_path, tied=False)
    rows, columns = 1 << 18, 1 << 10
    size = 4 * rows * columns
    model = onnx.load(folder / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    output = next(node.input[1] for node in model.graph.node if node.name == "/lm_head/MatMul")
    tensors[output].dims[:] = [columns, rows]
    tensors[output].raw_data = b""
    if external:
        helper_entries = {"location": "model.onnx_data", "offset": "0", "length": str(size)}
        tensors[output].data_location = onnx.TensorProto.EXTERNAL
        for key, value in helper_entries.items():
            tensors[output].external_data.add(key=key, value=value)
        save_graph(folder, model)
        (folder / "model.onnx_data").touch()
        os.truncate(folder / "model.onnx_data", size)
    else:
        place_in_the_graph(folder / "model.onnx", model, tensors[output], size)
    tracemalloc.start()
    try:
        with open_source(folder) as source:
            tensor = source.tensors["output.weight"]
            assert tensor.shape == (rows, columns)
            for start in (0, 64, rows - 64):
                assert not tensor.read_rows(start, start + 64).any()
        assert tracemalloc.get_traced_memory()[1] < views.BAND_BYTES + (4 << 20)
    finally:
        tracemalloc.stop()


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def place_in_the_graph(path: Path, model: onnx.ModelProto, tensor: onnx.TensorProto, size: int) -> None:
    """Writes the model with ``size`` zeros as the values of ``tensor``, none of which is stored."""
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("raw_data")
    model.graph.initializer.remove(tensor)
    head = copy.SerializeToString() + b"\x4a" + varint(size)  # field 9
    graph = model.graph.SerializeToString() + b"\x2a" + varint(len(head) + size) + head  # field 5
    model.ClearField("graph")
    data = model.SerializeToString() + b"\x3a" + varint(len(graph) + size) + graph  # field 7
    path.write_bytes(data)
    os.truncate(path, len(data) + size)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    folder = write_optimum_folder(tmp_path, external=True)
    with open_source(folder) as source:
        os.truncate(folder / "model.onnx_data", 4000)
        tensor = source.tensors["blk.1.ffn_up.weight"]
        for _ in range(2):
            with pytest.raises(ModelError, match=r"ends inside tensor model\.layers\.1\.mlp\.up_proj\.weight"):
                tensor.read_rows(0, tensor.rows)


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "b")
    tensors = tiny_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = np.nan
    save_graph(folder, optimum_graph(tensors))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        export_model(folder, tmp_path / "p")


# --- which files ---


def test_every_file_counts(tmp_path: Path) -> None:
    """The package is made again when the data beside the graph are others."""
    folder = write_optimum_folder(tmp_path, external=True)
    with open_source(folder) as source:
        assert [path.name for path in source.paths] == [
            "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.onnx",
            "model.onnx_data",
        ]  # fmt: skip
        mark, digest = source.mark, source.sha256
    data = bytearray((folder / "model.onnx_data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx_data").write_bytes(data)
    with open_source(folder) as source:
        assert source.mark != mark
        assert source.sha256 != digest


def test_safetensors_come_first(tmp_path: Path) -> None:
    folder = write_optimum_folder(tmp_path)
    write_weights(folder, tiny_tensors())
    with open_source(folder) as source:
        assert "model.safetensors" in {path.name for path in source.paths}


def test_of_several_graphs_the_one_with_all_weights(tmp_path: Path) -> None:
    folder = write_optimum_folder(tmp_path, name="decoder_with_past_model.onnx")
    (folder / "model_quantized.onnx").write_bytes(b"")
    (folder / "decoder_model.onnx").write_bytes(b"")
    with open_source(folder) as source:
        assert source.paths[-1].name == "decoder_with_past_model.onnx"
