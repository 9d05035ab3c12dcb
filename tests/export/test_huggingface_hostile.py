"""Hostile model folders: one row per attack, one line of complaint, nothing run and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from satchel.errors import ModelError
from satchel.export.exporter import export_model
from satchel.export.sources import open_source
from satchel.export.sources.folder import ModelFolder
from tiny_folders import (
    safetensors_bytes,
    tiny_config,
    tiny_tensors,
    write_json,
    write_safetensors,
    write_tiny_folder,
)

HUGE = 1 << 62
QUERY = "model.layers.0.self_attn.q_proj.weight"
Damage = Callable[[Path], object]


def weights(header: Any, data: bytes = b"") -> Damage:
    """The folder's only weight file with another content."""
    return lambda folder: (folder / "model.safetensors").write_bytes(safetensors_bytes(header, data))


def one(dtype: Any = "F32", shape: Any = (2, 2), place: Any = (0, 16), **more: Any) -> dict[str, Any]:
    """A header with one tensor."""
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": place, **more}}


def raw(data: bytes) -> Damage:
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def cut(bytes_left: int) -> Damage:
    return lambda folder: os.truncate(folder / "model.safetensors", bytes_left)


def sharded(change: Callable[[dict[str, str]], object], more: Damage | None = None) -> Damage:
    """Three shards with an index whose map is changed."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write_tiny_folder(folder, shards=3)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        write_json(path, index)
        if more is not None:
            more(folder)

    return apply


def unchanged(places: dict[str, str]) -> None:
    """Leaves the map as it is."""


def to(name: str) -> Callable[[dict[str, str]], object]:
    """One tensor is in the file ``name``."""
    return lambda places: places.update({QUERY: name})


def index_of(value: Any) -> Damage:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        path = folder / "model.safetensors.index.json"
        path.write_bytes(value) if isinstance(value, bytes) else write_json(path, value)

    return apply


def config(**changes: Any) -> Damage:
    return lambda folder: write_json(folder / "config.json", tiny_config(**changes))


def file(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def linked_out(name: str) -> Damage:
    """The file lies beside the folder, and a link in the folder leads to it."""

    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return apply


class Trap:
    """A pickle of it makes a file when somebody loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(folder.parent / "sprung")))


def with_code(folder: Path) -> None:
    """A model that brings code along and asks for it: the code stays where it is."""
    write_json(folder / "config.json", tiny_config("mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}))
    (folder / "modeling_mine.py").write_text(f"open({str(folder.parent / 'sprung')!r}, 'w')\n")
    (folder / "__init__.py").write_text(f"open({str(folder.parent / 'sprung')!r}, 'w')\n")


def only_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def only_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "m.gguf").write_bytes(b"GGUF")


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def circle(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


def twice_in_shards(folder: Path) -> None:
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    write_safetensors(folder / names[1], tiny_tensors())


# what is done to the folder -> what the message says
HOSTILE: dict[str, tuple[Damage, str]] = {
    # the header of a safetensors file
    "empty file": (raw(b""), "has 0 bytes, less than the smallest header"),
    "length cut": (raw(b"\x10\0\0"), "has 3 bytes, less than the smallest header"),
    "header cut": (cut(300), "its header would end at byte .*, the file ends at 300"),
    "data cut": (cut(100_000), "lies at .*, outside of the"),
    "header longer than the file": (raw(struct.pack("<Q", 1 << 20) + b"{}"), "ends at byte|end at byte"),
    "header of 2^64 bytes": (raw(b"\xff" * 8 + b"{}"), "would end at byte 18446744073709551623"),
    "header that is no JSON": (weights(b"{nothing}"), "is not valid JSON"),
    "header that is no object": (weights(b"[1, 2]  "), "its header is no JSON object"),
    "header of bytes": (weights(b"{\xff\xfe\0}"), "is not valid JSON"),
    "header that nests": (weights(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "header of a zip": (raw(b"PK\3\4" + bytes(100)), "would end at byte"),
    "tensor twice": (weights(b'{"t":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"t":{}}'), "key 't' twice"),
    "tensor of text": (weights({"t": "x"}), "tensor 't' has no record"),
    "unknown type": (weights(one("F31"), bytes(16)), "has the type 'F31', which is not known"),
    "type of a list": (weights(one(["F32"]), bytes(16)), "which is not known"),
    "offsets past the end": (weights(one(place=(0, 32), shape=(2, 4)), bytes(16)), "lies at .*outside of the 16 bytes"),
    "offsets of 2^62": (weights(one(place=(HUGE, HUGE + 16)), bytes(16)), "outside of the 16 bytes"),
    "offsets of 2^70": (weights(one(place=(0, 1 << 70)), bytes(16)), "outside of the 16 bytes"),
    "negative offsets": (weights(one(place=(-16, 0)), bytes(16)), "outside of the 16 bytes"),
    "offsets backwards": (weights(one(place=(16, 0)), bytes(16)), "outside of the 16 bytes"),
    "offsets of floats": (weights(one(place=(0.0, 16.0)), bytes(16)), "outside of the 16 bytes"),
    "offsets that are no numbers": (weights(b'{"t":{"dtype":"F32","shape":[4],"data_offsets":[NaN,16]}}'), "outside"),
    "one offset": (weights(one(place=(16,)), bytes(16)), "outside of the 16 bytes"),
    "no offsets": (weights(one(place=None), bytes(16)), "outside of the 16 bytes"),
    "shape for another size": (weights(one(shape=(2, 3)), bytes(16)), "takes 24 bytes but has 16"),
    "shape that overflows": (weights(one(shape=(1 << 40, 1 << 40)), bytes(16)), "impossible shape"),
    "negative shape": (weights(one(shape=(-2, -2)), bytes(16)), "impossible shape"),
    "shape of truth": (weights(one(shape=(True, 4)), bytes(16)), "impossible shape"),
    "many dimensions": (weights(one(shape=(1,) * 9), bytes(16)), "impossible shape"),
    "overlapping tensors": (
        weights(one() | {"u": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
        "'u' overlaps another",
    ),
    "hole between tensors": (
        weights(one() | {"u": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}}, bytes(32)),
        "starts behind a hole",
    ),
    "bytes at the end": (weights(one(), bytes(17)), "its tensors end at byte .*, the file at"),
    "no tensors": (weights({}), "has no tensor token_embd.weight"),
    "empty tensor": (
        weights({"model.norm.weight": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}), "it is empty",
    ),
    "wrong type": (
        weights({"model.norm.weight": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}, bytes(16)),
        r"'model\.norm\.weight' .* neither float32 nor float16 nor bfloat16",
    ),
    "two tensors for one place": (
        weights({name: {"dtype": "F32", "shape": [1], "data_offsets": [index * 4, index * 4 + 4]}
                 for index, name in enumerate(("model.norm.weight", "norm.weight"))}, bytes(8)),
        "is a second tensor for output_norm.weight",
    ),
    "newlines in names": (
        weights({"a\nb": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
        r"it has the tensor name 'a\\nb'",
    ),
    "endless names": (weights({"a" * 100_000: {}}), "it has the tensor name 'aaaa"),
    # the index of shards
    "missing shard": (
        sharded(unchanged, lambda folder: (folder / "model-00002-of-00003.safetensors").unlink()),
        r"lacks 'model-00002-of-00003\.safetensors', which model\.safetensors\.index\.json names",
    ),
    "shards that never were": (
        sharded(lambda places: places.update({f"t{n}": f"x{n}.safetensors" for n in range(9)})),
        "lacks 'x0.safetensors', 'x1.safetensors', 'x2.safetensors' and 6 more",
    ),
    "shard above the folder": (sharded(to("../x.safetensors")), "not a plain file name"),
    "shard with a path": (sharded(to("a/x.safetensors")), "not a plain file name"),
    "shard anywhere": (sharded(to("/etc/x.safetensors")), "not a plain file name"),
    "shard with a Windows path": (
        sharded(to("..\\x.safetensors")), "not a plain file name",
    ),
    "shard with a zero byte": (sharded(to("x\0.safetensors")), "not a plain file name"),
    "shard of half a character": (sharded(to("\ud800.safetensors")), "cannot be read"),
    "shard with a long name": (
        sharded(to("x" * 5000 + ".safetensors")), "cannot be read",
    ),
    "shard that is a pickle": (sharded(to("x.bin")), "not a safetensors file"),
    "shard linked out of the folder": (
        sharded(unchanged, linked_out("model-00002-of-00003.safetensors")), "is a link out of its folder",
    ),
    "shard without its tensor": (
        sharded(lambda places: places.update({"model.more": "model-00001-of-00003.safetensors"})),
        r"model-00001-of-00003\.safetensors has no tensor 'model\.more'",
    ),
    "tensor in another shard": (
        sharded(to("model-00003-of-00003.safetensors")), "the index says model-00003",
    ),
    "tensor in two shards": (sharded(unchanged, twice_in_shards), "is in model-0000.* and in model-0000"),
    "index of a list": (index_of([]), "has no JSON object in it but a list"),
    "index without a map": (index_of({"weight_map": 3}), "has no weight_map"),
    "index of numbers": (index_of({"weight_map": {"t": 1}}), "has no weight_map"),
    "empty index": (index_of({"weight_map": {}}), "has no weight_map"),
    "endless index": (index_of(b" " * ((16 << 20) + 1)), "has more than 16 MiB"),
    # other weights
    "pickles only": (pickled, r"only as pickle files \('pytorch_model\.bin'\), which can run code.*safe_serialization"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights \(model\.safetensors\)"),
    "adapter only": (only_adapter, "adapters must be merged"),
    "a GGUF in the folder": (only_gguf, r"give the path of its \.gguf file: .*m\.gguf"),
    "weights linked out of the folder": (linked_out("model.safetensors"), "is a link out of its folder"),
    "weights that are a folder": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
        "is not a regular file",
    ),
    # the config
    "config that is a pipe": (pipe, "is not a regular file"),
    "config in a circle": (circle, "cannot be read"),
    "config linked out of the folder": (linked_out("config.json"), "is a link out of its folder"),
    "config cut": (file("config.json", b'{"model_type": "ll'), "is not valid JSON"),
    "config that nests": (file("config.json", b'{"a":' * 100_000), "nested too deeply"),
    "config of a huge number": (
        file("config.json", b'{"a": ' + b"9" * 100_000 + b"}"), "is not valid JSON|no model_type",
    ),
    "endless config": (file("config.json", b" " * ((16 << 20) + 1)), "has more than 16 MiB"),
    "config with a key twice": (
        file("config.json", b'{"model_type": "llama", "model_type": "x"}'), "'model_type' twice",
    ),
    "code in the folder": (with_code, "has the model_type 'mine'.*; supported are: gemma2, "),
    "no kind": (config(model_type=...), r"names no model_type \('LlamaForCausalLM'\); supported are"),
    "kind of a list": (config(model_type=["llama"]), r"has the model_type \['llama'\]"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
    "another activation": (config(hidden_act="relu"), "has hidden_act 'relu'; supported for llama: silu"),
    "no width": (config(hidden_size=...), "has no hidden_size, which must be a whole number from 1"),
    "no layers": (config(num_hidden_layers=...), "has no num_hidden_layers"),
    "no heads": (config(num_attention_heads=0), "has num_attention_heads 0, which must be"),
    "no context": (config(max_position_embeddings=...), "has no max_position_embeddings"),
    "a million layers": (config(num_hidden_layers=10**6), "has num_hidden_layers 1000000, which must be .* to 1024"),
    "width of text": (config(hidden_size="64"), "has hidden_size '64', which must be"),
    "width of infinity": (config(hidden_size=float("inf")), "has hidden_size inf, which must be"),
    "width of 2^80": (config(hidden_size=1 << 80), "has hidden_size 1208925819614629174706176, which must be"),
    "epsilon that is no number": (config(rms_norm_eps=float("nan")), "has rms_norm_eps nan, which must be a positive"),
    "base of infinity": (config(rope_theta=float("inf")), "has rope_theta inf, which must be a positive number"),
    "window of text": (config(sliding_window="all"), "has sliding_window 'all', which must be"),
    "layers of an unknown kind": (
        config(sliding_window=8, layer_types=["full_attention", "chunked_attention"]),
        "has the layer type 'chunked_attention'; supported: full_attention, sliding_attention",
    ),
    "kinds of too few layers": (config(sliding_window=8, layer_types=["full_attention"]), "one entry for each of 2"),
    "no kinds": (config(sliding_window=8, layer_types={"a": 1}), "one entry for each of 2"),
    "unknown scaling": (config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "has the rope_type 'dynamic'"),
    "scaling without a factor": (config(rope_scaling={"rope_type": "linear"}), "has no rope_scaling.factor"),
    "scaling of text": (config(rope_scaling="llama3"), "has rope_scaling 'llama3', which must be a record"),
    "factors of the wrong number": (
        config(rope_scaling={"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}),
        r"rope_scaling.long_factor \[1\.0\], which must be a list of 8 positive numbers",
    ),
    "more rotation than head": (config(partial_rotary_factor=3.0), "has partial_rotary_factor 3.0"),
    "head of 2^40": (config(head_dim=1 << 40), "dimensions, which cannot be"),
    "text in a text": (config(model_type="gemma3", text_config=[1]), "has text_config .*, which must be a record"),
    # the tokenizer
    "tokenizer linked out": (linked_out("tokenizer.json"), "is a link out of its folder"),
    "settings linked out": (linked_out("tokenizer_config.json"), "is a link out of its folder"),
    "template of bytes": (file("chat_template.jinja", b"\xff\xfe"), "is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder(case: str, tmp_path: Path) -> None:
    damage, message = HOSTILE[case]
    folder = write_tiny_folder(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        export_model(folder, tmp_path / "package")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "package").exists()
    assert not (tmp_path / "sprung").exists(), "code of the folder was run"


def test_the_trap_would_spring(tmp_path: Path) -> None:
    """The checker of pickles can fail."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung"))).close()
    assert (tmp_path / "sprung").exists()


def test_an_unreadable_file_is_said(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    (folder / "model.safetensors").chmod(0)
    if os.access(folder / "model.safetensors", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ModelError, match="check its permissions"):
        open_source(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0"])
def test_only_plain_names_are_looked_up(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a plain file name"):
        ModelFolder(tmp_path).find(name)


def test_a_link_within_the_folder_is_fine(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "data")
    (folder / "model.safetensors").symlink_to("data")
    open_source(folder).close()


def test_random_damage_is_never_more_than_an_error(tmp_path: Path) -> None:
    """Any byte of the header and of the records may be another one."""
    rng = np.random.default_rng(0)
    folder = write_tiny_folder(tmp_path / "model", shards=2)
    files = [path for path in sorted(folder.iterdir()) if path.name != "chat_template.jinja"]
    whole = {path: path.read_bytes() for path in files}
    refused = lines = 0
    for round_ in range(150):
        path = files[round_ % len(files)]
        data = bytearray(whole[path])
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(0, min(len(data), 3000)))] = int(rng.integers(0, 256))
        path.write_bytes(data)
        try:
            export_model(folder, tmp_path / "package")
        except ModelError as error:
            refused += 1
            lines += str(error).count("\n")
        path.write_bytes(whole[path])
    assert refused > 50
    assert lines == 0
