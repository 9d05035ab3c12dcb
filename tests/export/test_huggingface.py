"""Hugging Face folders as a source: the same package as from a GGUF file of the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_model import reference_from_package
from satchel.errors import ModelError
from satchel.export import exporter
from satchel.export.blocks import to_float
from satchel.export.exporter import ensure_package, export_model
from satchel.export.resolve import resolve_model
from satchel.export.sources import Source, open_source
from tiny_folders import (
    safetensors_bytes,
    tiny_config,
    tiny_tensors,
    write_json,
    write_safetensors,
    write_tiny_folder,
    write_weights,
)
from tiny_models import tiny_weights, write_tiny_gguf


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "output of its own"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_folder_and_file_of_the_same_weights_are_the_same_package(kind: str, tied: bool, tmp_path: Path) -> None:
    """The GGUF file's rows are permuted for llama, the folder's never are."""
    folder = export_model(write_tiny_folder(tmp_path / "hf", kind, tied=tied, shards=3), tmp_path / "a")
    source = write_tiny_gguf(
        tmp_path / "m.gguf", kind, types=("F32",), embedding_type="F32", output="tied" if tied else "separate"
    )
    with open_source(source) as opened:
        assert opened.interleaved_rope == (kind == "llama")
    file = export_model(source, tmp_path / "b")
    found, wanted = reference_from_package(folder.folder), reference_from_package(file.folder)
    assert found.weights.keys() == wanted.weights.keys()
    for name in found.weights:
        if tied or name != "output":  # the tiny GGUF has its output in 8 bits
            np.testing.assert_array_equal(found.weights[name], wanted.weights[name], err_msg=name)
    assert folder.manifest.tokenizer == file.manifest.tokenizer
    assert folder.manifest.source_name == "hf"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_are_read_in_any_float_type(dtype: str, tmp_path: Path) -> None:
    steps = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-7}
    with open_source(write_tiny_folder(tmp_path, "qwen2", dtype=dtype, shards=2)) as source:
        assert not source.interleaved_rope
        wanted = {name: values for name, values in tiny_weights_by_name().items() if name != "output.weight"}
        assert set(source.tensors) == set(wanted)
        for name, values in wanted.items():
            tensor = source.tensors[name]
            assert (tensor.type_name, tensor.shape) == (dtype, values.shape)
            found = to_float(tensor.read_rows(0, tensor.rows), dtype).reshape(values.shape)
            assert (np.abs(found - values) <= np.abs(values) * steps[dtype] + 1e-7).all()
        matrix = source.tensors["blk.1.attn_k.weight"]
        whole = matrix.read_rows(0, 32)
        pieces = [matrix.read_rows(start, stop) for start, stop in matrix.row_chunks(5)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def tiny_weights_by_name() -> dict[str, Any]:
    return dict(
        tiny_weights(seed=0, layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, feed_forward=96, vocab=300)
    )


def test_shards_and_one_file_are_the_same(tmp_path: Path) -> None:
    packages = [
        export_model(write_tiny_folder(tmp_path / str(shards), shards=shards), tmp_path / f"p{shards}")
        for shards in (1, 4)
    ]
    assert packages[0].data_file.read_bytes() == packages[1].data_file.read_bytes()


def test_a_file_of_another_name_is_found_when_it_is_the_only_one(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with open_source(folder) as source:
        assert source.paths[-1].name == "weights.safetensors"


def test_left_overs_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    surplus = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "lm_head.weight": np.ones((300, 64), np.float32),  # the config says that it is the embedding
    }
    write_weights(folder, {**tiny_tensors(), **surplus})
    assert export_model(folder, tmp_path / "p").spec.tied_embeddings


def test_names_without_their_prefix(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    write_weights(folder, {name.removeprefix("model."): values for name, values in tiny_tensors().items()})
    with open_source(folder) as source:
        assert {"token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"} <= set(source.tensors)


def test_a_surplus_tensor_is_refused_by_its_own_name(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    write_weights(folder, {**tiny_tensors(), "model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)})
    with pytest.raises(ModelError, match=r"llama does not use here: model\.layers\.0\.self_attn\.q_norm\.weight"):
        export_model(folder, tmp_path / "p")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_that_are_not_numbers(dtype: str, tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "hf", dtype=dtype)
    with open_source(folder) as source:
        tensor = source.tensors["blk.1.ffn_up.weight"]
    nan = {"F32": b"\0\0\xc0\x7f", "F16": b"\0\x7e", "BF16": b"\xc0\x7f"}[dtype]
    with (folder / "model.safetensors").open("rb+") as file:
        file.seek(tensor.offset)  # type: ignore[attr-defined]
        file.write(nan)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        export_model(folder, tmp_path / "p")
    assert not (tmp_path / "p").exists()


# --- what a name leads to ---


def test_a_model_folder_and_a_package_folder_are_told_apart(tmp_path: Path) -> None:
    folder, cache = write_tiny_folder(tmp_path / "tiny-1.5b"), tmp_path / "cache"
    package = resolve_model(folder, cache_dir=cache)
    assert package.folder.is_relative_to(cache)
    assert package.folder.name.startswith("tiny-1.5b-")
    assert resolve_model(package.folder, cache_dir=cache) == package
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="is not a model package"):
        resolve_model(empty, cache_dir=cache)


def test_an_unchanged_folder_is_read_once_and_a_changed_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = write_tiny_folder(tmp_path / "m", shards=2), tmp_path / "cache"
    first = ensure_package(folder, cache)
    read: list[Source] = []
    whole = Source.hash
    monkeypatch.setattr(Source, "hash", lambda self, progress=None: (read.append(self), whole(self, progress))[1])
    assert ensure_package(folder, cache).folder == first.folder
    assert read == []
    write_json(folder / "generation_config.json", {"eos_token_id": 268})
    again = ensure_package(folder, cache)
    assert len(read) == 1
    assert again.folder != first.folder
    (folder / "generation_config.json").unlink()
    assert ensure_package(folder, cache).folder not in (first.folder, again.folder)


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    def hash_of(folder: Path) -> str:
        with open_source(folder) as source:
            assert source.size == sum(path.stat().st_size for path in source.paths)
            return source.sha256

    one, same = (write_tiny_folder(tmp_path / name, shards=2) for name in ("a", "b"))
    (same / "README.md").write_text("no part of the model")
    assert hash_of(one) == hash_of(same)
    write_tiny_folder(same, seed=1, shards=2)
    assert hash_of(one) != hash_of(same)


def test_progress_counts_all_files(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    folder = write_tiny_folder(tmp_path / "m", shards=3)
    export_model(folder, tmp_path / "p", progress=lambda *call: calls.append(call))
    for stage in ("checking", "exporting"):
        mine = [(done, total) for name, done, total in calls if name == stage]
        assert mine == sorted(mine)
        assert mine[-1][0] == mine[-1][1] > 0


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """A sparse gigabyte: opened and read in part, never whole."""
    import tracemalloc

    folder = write_tiny_folder(tmp_path)
    rows, columns = 1 << 18, 1 << 10
    size = 4 * rows * columns
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}}
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, b""))
    os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    try:
        with open_source(folder) as source:
            tensor = source.tensors["token_embd.weight"]
            assert not tensor.read_rows(rows - 8, rows).any()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    with open_source(folder) as source:
        os.truncate(folder / "model.safetensors", 4000)
        tensor = source.tensors["blk.1.ffn_up.weight"]
        with pytest.raises(ModelError, match=r"ends inside tensor model\.layers\.1\.mlp\.up_proj\.weight"):
            tensor.read_rows(0, tensor.rows)


def test_the_hub_cache_of_links_is_a_folder_like_any(tmp_path: Path) -> None:
    real = write_tiny_folder(tmp_path / "real")
    repo = tmp_path / "models--HuggingFaceTB--Tiny"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(index))
    with open_source(snapshot) as source:
        assert source.name == "Tiny"
    package = export_model(snapshot, tmp_path / "p")
    assert package.spec.name == "Tiny"


def test_exporter_refuses_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; AutoTokenizer"):
        exporter.export_model(folder, tmp_path / "p")


def test_the_rows_of_an_untied_output_must_be_there(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "m")
    write_json(folder / "config.json", tiny_config(tie_word_embeddings=False))
    with pytest.raises(ModelError, match=r"no lm_head\.weight, and its config does not set tie_word_embeddings"):
        open_source(folder)
    write_json(folder / "config.json", tiny_config(tie_word_embeddings=...))
    assert export_model(folder, tmp_path / "p").spec.tied_embeddings, "the config does not say, the file does"


def test_one_safetensors_file_written_by_the_library(tmp_path: Path) -> None:
    numpy_format = pytest.importorskip("safetensors.numpy", reason="needs the extra 'reference'")
    folder = write_tiny_folder(tmp_path)
    numpy_format.save_file(tiny_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    with open_source(folder) as source:
        assert len(source.tensors) == 20
    ours = write_safetensors(tmp_path / "ours.safetensors", tiny_tensors())
    loaded = numpy_format.load_file(ours)
    assert all(np.array_equal(loaded[name], values) for name, values in tiny_tensors().items())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
