"""Hostile ONNX folders: one row per attack, one line of complaint, nothing run and nothing left behind."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from satchel.errors import ModelError
from satchel.export.architectures import read_model
from satchel.export.exporter import export_model
from satchel.export.sources import open_source, optimum, protobuf
from satchel.export.sources.onnx_graph import MAX_DEPTH
from tiny_folders import tiny_config, write_json
from tiny_onnx import write_optimum_folder

UP = "/model/layers.1/mlp/up_proj/MatMul"
NORM = "model.layers.1.input_layernorm.weight"
HUGE = 1 << 62
Damage = Callable[[Path], object]


def graph(change: Callable[[onnx.ModelProto], object]) -> Damage:
    """The graph is changed; its external data stay where they are."""

    def apply(folder: Path) -> None:
        path = folder / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return apply


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def tensor(model: onnx.ModelProto, name: str = "") -> onnx.TensorProto:
    """The initializer of a name, or that of layer 1's up projection [64, 96]."""
    wanted = name or node(model, UP).input[1]
    return next(tensor for tensor in model.graph.initializer if tensor.name == wanted)


def entry(key: str, value: str | None, name: str = "") -> Damage:
    """An entry of a tensor's external data is another one, or is missing."""

    def change(model: onnx.ModelProto) -> None:
        found = tensor(model, name)
        entries = {entry.key: entry.value for entry in found.external_data} | {key: value}
        found.ClearField("external_data")
        for name_, text in entries.items():
            if text is not None:
                found.external_data.add(key=name_, value=text)

    return graph(change)


def dims(*sizes: int, name: str = "") -> Damage:
    return graph(lambda model: tensor(model, name).dims.__setitem__(slice(None), sizes))


def data_type(number: int, name: str = "") -> Damage:
    return graph(lambda model: setattr(tensor(model, name), "data_type", number))


def operator(kind: str, **attributes: Any) -> Damage:
    """The multiplication with a matrix is another operation."""

    def change(model: onnx.ModelProto) -> None:
        found = node(model, UP)
        found.op_type = kind
        found.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())

    return graph(change)


def rename(new: str, old: str = UP) -> Damage:
    return graph(lambda model: setattr(node(model, old), "name", new))


def values(field: str, names: list[str]) -> Damage:
    """Other inputs or outputs."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names
        )

    return graph(change)


def without(part: str) -> Damage:
    """All nodes of a module are gone, and the weights that have its name."""
    name_part = part.strip("/").replace("/", ".")

    def change(model: onnx.ModelProto) -> None:
        for name in [node.name for node in model.graph.node if part in node.name]:
            model.graph.node.remove(node(model, name))
        for found in [found for found in model.graph.initializer if name_part in found.name]:
            model.graph.initializer.remove(found)

    return graph(change)


def again(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(tensor(model))


def second_matrix(model: onnx.ModelProto) -> None:
    found = node(model, UP)
    other = helper.make_node("MatMul", ["x", node(model, UP.replace("up", "gate")).input[1]], ["y"], name=found.name)
    model.graph.node.append(other)


def nested(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "g", [], [])
    for _ in range(MAX_DEPTH):
        inner = helper.make_graph([helper.make_node("If", ["c"], ["d"], then_branch=inner)], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=inner))


def circle(model: onnx.ModelProto) -> None:
    found = node(model, UP)
    found.input[1] = "around"
    model.graph.node.append(helper.make_node("Identity", ["back"], ["around"]))
    model.graph.node.append(helper.make_node("Transpose", ["around"], ["back"], perm=[1, 0]))


def as_int32(model: onnx.ModelProto) -> None:
    """float16 numbers as varints."""
    found = tensor(model, NORM)
    found.CopyFrom(helper.make_tensor(NORM, TensorProto.FLOAT16, [64], np.ones(64)))


def adapter(model: onnx.ModelProto) -> None:
    """A LoRA beside a matrix."""
    name = UP.replace("MatMul", "lora_A/default/MatMul")
    model.graph.initializer.append(helper.make_tensor("onnx::MatMul_9", 1, [64, 4], np.zeros(256)))
    model.graph.node.append(helper.make_node("MatMul", ["x", "onnx::MatMul_9"], ["y"], name=name))


def inside(change: Callable[[Path], object]) -> Damage:
    """The folder has its weights in the graph."""

    def apply(folder: Path) -> None:
        (folder / "model.onnx_data").unlink()
        write_optimum_folder(folder)
        change(folder)

    return apply


def raw(data: bytes) -> Damage:
    return lambda folder: (folder / "model.onnx").write_bytes(data)


def cut(name: str, keep: float) -> Damage:
    def apply(folder: Path) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * keep))

    return apply


def linked_out(name: str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return apply


def outside(folder: Path) -> None:
    """A file above the folder that would be read if the name were followed."""
    (folder.parent / "secret").write_bytes(bytes(1 << 16))
    entry("location", "../secret")(folder)


def pipe(folder: Path) -> None:
    (folder / "model.onnx_data").unlink()
    os.mkfifo(folder / "model.onnx_data")


def many_files(folder: Path) -> None:
    """Every initializer has a file of its own, and there are more than anybody needs."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    for index in range(80):
        model.graph.initializer.append(helper.make_tensor(f"onnx::MatMul_{index}", 1, [64, 64], bytes(16384), raw=True))
        name = f"/model/layers.{index + 2}/mlp/up_proj/MatMul"
        model.graph.node.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{index}"], ["y"], name=name))
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=1024)


def two_graphs(folder: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (folder / name).write_bytes((folder / "model.onnx").read_bytes())
    (folder / "model.onnx").unlink()


def in_a_folder(folder: Path) -> None:
    """As on the hub, where the graph lies below the config."""
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")


# what is done to a folder with external data -> what the message says
HOSTILE: dict[str, tuple[Damage, str]] = {
    # where the data lie
    "data above the folder": (outside, r"names the file '\.\./secret', which is not a plain file name"),
    "data anywhere": (entry("location", "/etc/passwd"), "'/etc/passwd', which is not a plain file name"),
    "data with a path": (entry("location", "a/b"), "not a plain file name"),
    "data with a Windows path": (entry("location", "..\\b"), "not a plain file name"),
    "data with a zero byte": (entry("location", "a\0b"), "not a plain file name"),
    "data with a long name": (entry("location", "x" * 4000), "cannot be read"),
    "data with an endless name": (entry("location", "x" * 5000), "no text of at most 4096 bytes"),
    "data in the folder itself": (entry("location", "."), "not a plain file name"),
    "data without a name": (entry("location", None), "names the file '', which is not a plain file name"),
    "data linked out of the folder": (linked_out("model.onnx_data"), "is a link out of its folder"),
    "graph linked out of the folder": (linked_out("model.onnx"), "is a link out of its folder"),
    "data that are a pipe": (pipe, "is not a regular file"),
    "no data": (lambda folder: (folder / "model.onnx_data").unlink(), r"has no model\.onnx_data; download the whole"),
    "data cut": (cut("model.onnx_data", 0.7), r"of 'model\.onnx_data', which ends at \d+; download it again"),
    "empty data": (cut("model.onnx_data", 0), "which ends at 0; download it again"),
    "offset past the end": (entry("offset", "99999999"), "lies at 99999999 … 100024575 of 'model.onnx_data'"),
    "offset of 2^62": (entry("offset", str(10**17)), "which ends at"),
    "offset of 2^70": (entry("offset", str(1 << 70)), "lies at '1180591620717411303424' .*, which cannot be"),
    "negative offset": (entry("offset", "-4096"), "lies at '-4096' with '24576' bytes, which cannot be"),
    "offset of text": (entry("offset", "here"), "lies at 'here'"),
    "offset of other digits": (entry("offset", "٣"), "lies at '٣'"),
    "negative length": (entry("length", "-1"), "with '-1' bytes, which cannot be"),
    "length of another size": (entry("length", "4096"), r"of shape \[64, 96\] takes 24576 bytes but has 4096"),
    "length past the end": (entry("length", "9999999"), "which ends at"),
    "length of a float": (entry("length", "24576.0"), "with '24576.0' bytes"),
    "many files": (many_files, "has its weights in more than 64 files; save them in one"),
    # the graph's file
    "empty graph": (raw(b""), "is not a valid ONNX file: it has 0 graphs instead of one"),
    "graph of text": (raw(b"weights: none\n"), "is not a valid ONNX file"),
    "graph of a zip": (raw(b"PK\3\4" + bytes(100)), "is not a valid ONNX file"),
    "graph of zeros": (raw(bytes(1000)), "is not a valid ONNX file: it has 0 graphs"),
    "graph that is HTML": (raw(b"<!DOCTYPE html><html></html>"), "is not a valid ONNX file"),
    "pointer of Git LFS": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "not a valid ONNX file"),
    "graph cut": (cut("model.onnx", 0.5), r"a field would end at byte \d+, what it is in ends at \d+ \(cut short\?\)"),
    "graph cut at its end": (cut("model.onnx", 0.999), r"\(cut short\?\)"),
    "graph cut, weights inside": (inside(cut("model.onnx", 0.6)), r"\(cut short\?\)"),
    "two graphs": (lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() * 2),
                   "it has 2 graphs instead of one"),
    "length of 2^63": (raw(b"\x3a" + b"\xff" * 9 + b"\x01"), r"a field would end at byte \d{19,20}"),
    "number without an end": (raw(b"\x3a" + b"\xff" * 20), "a number at byte 1 does not end"),
    "graph that is a number": (raw(b"\x38\x05"), "there is no message at byte 1"),
    "nodes that are numbers": (raw(b"\x3a\x02\x08\x05"), "there is no message"),
    "names of bytes": (raw(b"\x3a\x06\x0a\x04\x1a\x02\xff\xfe"), "is not UTF-8"),
    "graphs in graphs": (graph(nested), "nested more than 8 deep"),
    "graphs of a model of several": (two_graphs, r"has 'a\.onnx', 'b\.onnx', and none of them is model\.onnx"),
    "graph in a folder below": (in_a_folder, r"has its weights in the folder 'onnx' \('model.onnx'\); put config.json"),
    # shapes and types
    "shape for another size": (dims(64, 97), r"of shape \[64, 97\] takes 24832 bytes but has 24576"),
    "shape turned": (dims(96, 64), r"blk\.1\.ffn_up\.weight has the shape \[64, 96\], its metadata says \[96, 64\]"),
    "shape of a vector": (dims(64 * 96), "has no tensor blk.1.ffn_up.weight"),
    "shape that overflows": (dims(1 << 40, 1 << 40), "has the impossible shape"),
    "shape of 2^62": (dims(HUGE, 4), "has the impossible shape"),
    "negative shape": (dims(-64, -96), "has the impossible shape"),
    "many dimensions": (dims(*[1] * 9), "more than 8 dimensions"),
    "empty matrix": (dims(0, 96), "takes 0 bytes but has 24576"),
    "other widths": (dims(32, 192), "blk.1.ffn_up.weight has the shape"),
    "integers": (data_type(TensorProto.INT8), r"up_proj\.weight' .* neither float32 nor float16 nor bfloat16"),
    "doubles": (data_type(TensorProto.DOUBLE), "neither float32 nor float16 nor bfloat16"),
    "float8": (data_type(TensorProto.FLOAT8E4M3FN), "neither float32 nor float16 nor bfloat16"),
    "unknown type": (data_type(99), "neither float32 nor float16 nor bfloat16"),
    "type of another size": (data_type(TensorProto.FLOAT16), "takes 12288 bytes but has 24576"),
    "numbers one by one": (inside(graph(as_int32)), r"the values of 'model.layers.1.input_layernorm.weight' are not"),
    "no values": (inside(graph(lambda model: tensor(model).ClearField("raw_data"))), "are not one piece of bytes"),
    "too few values": (inside(graph(lambda model: setattr(tensor(model), "raw_data", b"abcd"))), "but has 4"),
    # names
    "initializer twice": (graph(again), "it has two initializers 'onnx::MatMul_"),
    "two matrices in one place": (graph(second_matrix), r"layers\.1\.mlp\.up_proj\.weight' is both 'onnx::MatMul_"),
    "initializer without a name": (graph(lambda model: setattr(tensor(model), "name", "")), "an initializer with the"),
    "initializer with a newline": (graph(lambda model: setattr(tensor(model), "name", "a\nb")), r"the name 'a\\nb'"),
    "node without a name": (rename(""), r"which matrix 'onnx::MatMul_\d+' is cannot be told, the MatMul with it has"),
    "node with another name": (rename("node_MatMul_12"), "has the name 'node_MatMul_12'"),
    "node of another layer": (rename(UP.replace("layers.1", "layers.0")), r"layers\.0\.mlp\.up_proj\.weight' is both"),
    "node of no layer": (rename(UP.replace("layers.1", "layers.7")), "has no tensor blk.1.ffn_up.weight"),
    "node with a path": (rename("/../../etc/MatMul"), "has no tensor blk.1.ffn_up.weight"),
    "node with newlines": (rename("/a\nb/MatMul"), "cannot be told"),
    "adapter beside a matrix": (inside(graph(adapter)), r"up_proj\.weight' is both"),
    "no layer": (without("/model/layers.1/"), "has no tensor blk.1."),
    "no matrix": (without("/model/layers.1/mlp/up_proj"), "has no tensor blk.1.ffn_up.weight"),
    "no norm": (without("/model/norm"), "has no tensor output_norm.weight"),
    "no embedding": (without("/model/embed_tokens"), "has no embedding of tokens under the names that Optimum gives"),
    "values in a circle": (graph(circle), "has no tensor blk.1.ffn_up.weight"),
    # other graphs
    "encoder": (values("output", ["last_hidden_state"]), "is not a decoder .from 'input_ids, .* to 'last_hidden_sta"),
    "vision model": (values("input", ["pixel_values"]), "is not a decoder .from 'pixel_values'"),
    "embeddings as input": (values("input", ["inputs_embeds", "attention_mask"]), "is not a decoder"),
    "MatMulNBits": (operator("MatMulNBits"), r"has quantized weights \(MatMulNBits\), .* without quantization"),
    "MatMulInteger": (operator("MatMulInteger"), r"has quantized weights \(MatMulInteger\)"),
    "DequantizeLinear": (operator("DequantizeLinear"), r"has quantized weights \(DequantizeLinear\)"),
    "DynamicQuantizeLinear": (operator("DynamicQuantizeLinear"), r"has quantized weights \(DynamicQuantizeLinear\)"),
    "GatherBlockQuantized": (operator("GatherBlockQuantized"), r"quantized weights \(GatherBlockQuantized\)"),
    "multiplied and scaled": (operator("Gemm", alpha=0.5), "Gemm does more with 'onnx::MatMul_.*' than multiply"),
    "multiplied the other way": (operator("Gemm", transA=1), "Gemm does more"),
    "matrix turned twice": (operator("Gemm", transB=1), "blk.1.ffn_up.weight has the shape"),
    # the config
    "another size in the config": (
        lambda folder: write_json(folder / "config.json", tiny_config(hidden_size=128)),
        "token_embd.weight has the shape",
    ),
    "another kind in the config": (
        lambda folder: write_json(folder / "config.json", tiny_config("t5")), "has the model_type 't5'",
    ),
    "more layers in the config": (
        lambda folder: write_json(folder / "config.json", tiny_config(num_hidden_layers=3)), "has no tensor blk.2.",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is a folder without config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_graph(case: str, tmp_path: Path) -> None:
    damage, message = HOSTILE[case]
    folder = write_optimum_folder(tmp_path / "model", external=True)
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        export_model(folder, tmp_path / "package")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "package").exists()


def test_what_is_damaged_was_whole(tmp_path: Path) -> None:
    """Every row starts from a folder that can be read; so do those with the weights inside."""
    folder = write_optimum_folder(tmp_path / "model", external=True)
    export_model(folder, tmp_path / "p1")
    inside(lambda _: None)(folder)
    export_model(folder, tmp_path / "p2")


def test_a_folder_of_endless_fields_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "MAX_FIELDS", 1000)
    folder = write_optimum_folder(tmp_path)
    (folder / "model.onnx").write_bytes(b"\x08\x01" * 1001)
    with pytest.raises(ModelError, match="it has more than 1000 fields"):
        open_source(folder)


def test_nothing_of_the_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a session nor the onnx package opens the graph."""
    import onnxruntime

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the graph was opened by a library")

    folder = write_optimum_folder(tmp_path, external=True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    for name in ("load", "load_model", "load_from_string", "load_model_from_string"):
        monkeypatch.setattr(onnx, name, refuse)
    with open_source(folder) as source:
        read_model(source)
        for found in source.tensors.values():
            found.read_rows(0, found.rows)


@pytest.mark.parametrize("external", [False, True])
def test_mutants_are_never_more_than_an_error(external: bool, tmp_path: Path) -> None:
    """Bytes of what is not a weight; graphs that can be opened are read, too. benchmarks/fuzz_files.py has more."""
    rng = random.Random(external)
    folder = write_optimum_folder(tmp_path, external=external)
    path = folder / "model.onnx"
    whole = path.read_bytes()
    weights = {index for found in onnx.load(path, load_external_data=False).graph.initializer
               for at in [whole.find(found.raw_data) if len(found.raw_data) > 64 else -1] if at >= 0
               for index in range(at, at + len(found.raw_data))}  # fmt: skip
    places = sorted(set(range(len(whole))) - weights)
    assert len(places) > 3000
    refused = read = longest = lines = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(places)
            data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0xFF, 0))
        if rng.random() < 0.1:
            del data[rng.choice(places) :]
        path.write_bytes(data)
        try:
            with open_source(folder) as source:
                read_model(source)
                read += 1
                for found in source.tensors.values():
                    found.read_rows(0, min(found.rows, 3))
        except ModelError as error:
            refused += 1
            lines += str(error).count("\n")
            longest = max(longest, len(str(error)))
    assert refused > 150
    assert read > 50
    assert not lines
    assert longest < 1000


def test_the_table_of_quantized_operators_says_what_it_is_for() -> None:
    assert not {"MatMul", "Gemm", "Gather", "Mul", "QuickGelu"} & optimum.QUANTIZED
