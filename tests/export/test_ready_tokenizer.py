"""tokenizer.json of a model folder: used as it is, told apart by kind, and refused when it is crafted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from satchel.errors import ModelError
from satchel.export.ready_tokenizer import ReadyTokenizer
from satchel.export.sources import TokenizerFiles
from satchel.export.tokenizer import TokenizerSettings
from satchel.runtime.tokenizer import Tokenizer
from tiny_folders import tiny_config, tiny_tokenizer

Change = Callable[[dict[str, Any]], object]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab", "c", "<0x0A>", "<0xC3>", "<0xA9>"]
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
RESTORE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
LEGACY = {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, "pre_tokenizer": None}
GEMMA = {
    "normalizer": REPLACE,
    "pre_tokenizer": {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
    },
}  # fmt: skip


def metaspace(scheme: str, *, split: bool = False) -> dict[str, Any]:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return {"normalizer": None, "pre_tokenizer": step}


def sentencepiece(parts: dict[str, Any]) -> dict[str, Any]:
    special = [{"id": index, "content": PIECES[index], **FLAGS, "special": True} for index in range(3)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, **parts,
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": [RESTORE, {"type": "ByteFallback"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(PIECES)},
            "merges": [["a", "b"], ["▁", "a"], ["▁", "ab"]],
        },
    }  # fmt: skip


def read(
    record: Any, config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None, *,
    model: dict[str, Any] | None = None, template: str | None = None, vocab: int = 300,
) -> ReadyTokenizer:  # fmt: skip
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    files = TokenizerFiles(Path("tokenizer.json"), lambda: data, config or {}, generation or {}, model or {}, template)
    return ReadyTokenizer(files, vocab)


def spell(ready: ReadyTokenizer, *segments: tuple[str, bool], start: bool = True) -> list[bytes]:
    tokenizer = Tokenizer(ready.tokenizer, ready.settings)
    return [tokenizer.token_bytes(index) for index in tokenizer.encode_segments(segments, start=start)]


def test_a_byte_level_file() -> None:
    ready = read(tiny_tokenizer(), {"eos_token": "<|im_end|>"}, model=tiny_config())
    assert ready.settings == TokenizerSettings(
        kind="byte-level", bos_id=266, eos_id=268, bos_token="<|endoftext|>", eos_token="<|im_end|>",
        cut_at_spaces=True, stop_ids=(266, 268),
    )  # fmt: skip
    tokenizer = Tokenizer(ready.tokenizer, ready.settings)
    text = "the <|im_end|> of é"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 268 not in tokenizer.encode(text)
    assert 268 in tokenizer.encode(text, special=True)


@pytest.mark.parametrize("parts", [LEGACY, metaspace("first"), metaspace("always"), metaspace("first", split=True)])
def test_a_sentencepiece_file_with_a_space_before_the_text(parts: dict[str, Any]) -> None:
    """All spellings of it: a text gets the space, its continuation does not."""
    ready = read(sentencepiece(parts))
    assert ready.settings.kind == "sentencepiece"
    assert ready.settings.add_space_prefix
    assert spell(ready, ("ab", False)) == [b" ab"]
    assert spell(ready, ("ab", False), ("ab ab", False)) == [b" ab", b"ab", b" ab"]
    assert spell(ready, ("ab", False), start=False) == [b"ab"]
    assert spell(ready, ("é\n", False), start=False) == [b"\xc3", b"\xa9", b"\n"]
    tokenizer = Tokenizer(ready.tokenizer, ready.settings)
    assert tokenizer.decode(tokenizer.encode("ab ab\n")) == "ab ab\n"


@pytest.mark.parametrize("parts", [GEMMA, metaspace("never")])
def test_a_sentencepiece_file_without_a_space_before_the_text(parts: dict[str, Any]) -> None:
    ready = read(sentencepiece(parts))
    assert not ready.settings.add_space_prefix
    assert spell(ready, ("ab ab", False)) == [b"ab", b" ab"]


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []}


@pytest.mark.parametrize(
    ("processor", "config", "wanted"),
    [
        (TEMPLATE, {"bos_token": "<s>"}, True),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}, {"bos_token": "<s>"}, True),
        (TEMPLATE, {"bos_token": "<s>", "add_bos_token": False}, False),
        (None, {"bos_token": {"content": "<s>", "lstrip": False}, "add_bos_token": True}, True),
        (None, {"bos_token": "<s>"}, False),
        (TEMPLATE, {"bos_token": "</s>"}, False),
        (TEMPLATE, {"bos_token": None, "add_bos_token": True}, False),
    ],
)
def test_the_beginning_is_put_there_once_and_by_us(processor: Any, config: dict[str, Any], wanted: bool) -> None:
    record = {**sentencepiece(LEGACY), "post_processor": processor}
    ready = read(record, config, model={"bos_token_id": 1})
    assert ready.settings.add_bos == wanted
    assert ready.tokenizer.post_processor is None
    assert ready.tokenizer.encode("ab").tokens == ["▁ab"]
    assert spell(ready, ("ab", False)) == ([b"<s>"] if wanted else []) + [b" ab"]


def test_ends_of_an_answer() -> None:
    plain = sentencepiece(LEGACY)
    assert read(plain).settings.stop_ids == (2,), "by its usual spelling"
    assert read(plain, {"eos_token": "ab"}).settings.stop_ids == (2, 6)
    both = read(plain, {"eos_token": "</s>"}, {"eos_token_id": [5, 4]}, model={"eos_token_id": 9})
    assert both.settings.stop_ids == (2, 4, 5)
    assert read(plain, model={"eos_token_id": [9, 7]}).settings.stop_ids == (2, 7, 9)
    assert read(plain, model={"eos_token_id": [9, 7]}).settings.eos_id == 9
    assert read(plain, {"eos_token": None}, model={"eos_token_id": 9}).settings.eos_id is None


def test_chat_templates() -> None:
    plain = tiny_tokenizer()
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    assert read(plain).settings.chat_template is None
    assert read(plain, {"chat_template": "C"}).settings.chat_template == "C"
    assert read(plain, {"chat_template": several}).settings.chat_template == "D"
    assert read(plain, {"chat_template": several[:1]}).settings.chat_template is None
    assert read(plain, {"chat_template": "C"}, template="J").settings.chat_template == "J"
    with pytest.raises(ModelError, match="chat_template that is not text but int"):
        read(plain, {"chat_template": 3})
    with pytest.raises(ModelError, match="chat_template that is not valid Unicode"):
        read(plain, {"chat_template": "\ud800"})


def test_what_looks_like_a_control_token_is_one() -> None:
    record = tiny_tokenizer()
    for token in record["added_tokens"]:
        token["special"] = False
    ready = read(record)
    assert spell(ready, ("<|im_end|>", True)) == [b"<|im_end|>"]
    assert len(spell(ready, ("<|im_end|>", False))) == 10


def test_tokens_beyond_the_model_are_left_out() -> None:
    """As in Gemma's models of texts only, whose tokenizer has one more for pictures."""
    record = tiny_tokenizer()
    record["added_tokens"].append({"id": 300, "content": "<image>", **FLAGS, "special": True})
    ready = read(record)
    assert ready.tokenizer.token_to_id("<image>") is None
    assert ready.tokenizer.get_vocab_size() == 300
    with pytest.raises(ModelError, match="has the token 299, the model only 299"):
        read(record, vocab=299)


def test_a_token_over_a_space_forbids_cutting() -> None:
    record = tiny_tokenizer()
    assert read(record).settings.cut_at_spaces
    record["model"]["vocab"]["theĠin"] = record["model"]["vocab"].pop("[UNUSED0]")
    assert not read(record).settings.cut_at_spaces
    record = tiny_tokenizer()
    record["added_tokens"].append({"id": 300, "content": "the end", **FLAGS, "special": False})
    assert not read(record, vocab=301).settings.cut_at_spaces


def test_nothing_is_cut_padded_or_dropped() -> None:
    record = tiny_tokenizer()
    record["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    record["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    record["model"]["dropout"] = 1.0
    assert read(record).tokenizer.encode("the the").tokens == ["the", "Ġthe"]


def put(*place: Any, value: Any) -> Change:
    def apply(record: dict[str, Any]) -> None:
        for key in place[:-1]:
            record = record[key]
        record[place[-1]] = value

    return apply


# what is done to the record -> what the message says
HOSTILE: dict[str, tuple[Change, str]] = {
    "no model": (put("model", value=None), "has no model"),
    "another model": (put("model", "type", value="Unigram"), "tokenizer model 'Unigram'; supported: BPE"),
    "suffixes": (put("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix, which is not supported"),
    "the library panics": (put("model", "continuing_subword_prefix", value="../x"), "continuing_subword_prefix, which"),
    "no vocabulary": (put("model", "vocab", value={}), "has no vocabulary"),
    "vocabulary of a list": (put("model", "vocab", value=["a"]), "has no vocabulary"),
    "id of text": (put("model", "vocab", "A", value="x"), "gives the token 'A' the id 'x'"),
    "negative id": (put("model", "vocab", "A", value=-1), "gives the token 'A' the id -1"),
    "huge id": (put("model", "vocab", "A", value=1 << 32), "gives the token 'A' the id 4294967296"),
    "id of truth": (put("model", "vocab", "A", value=True), "gives the token 'A' the id True"),
    "id twice": (put("model", "vocab", "A", value=1), "gives two tokens the same id"),
    "merge of strangers": (put("model", "merges", 0, value=["q", "zz"]), "cannot be used as a tokenizer"),
    "merges of numbers": (put("model", "merges", value=[1, 2]), "cannot be used as a tokenizer"),
    "added tokens of text": (put("added_tokens", value="x"), "added_tokens that are no list"),
    "added tokens of numbers": (put("added_tokens", value=[3]), "added_tokens that are no list"),
    "added token without a name": (put("added_tokens", 0, "content", value=""), "has the added token ''"),
    "added token of another id": (put("added_tokens", 0, "id", value=7), r"gives the token '<\|endoftext\|>' two ids"),
    "added token far away": (
        lambda record: record["added_tokens"].append({"id": 350, "content": "far", **FLAGS, "special": True}),
        "gives the token 'far' the id 350, which is not free",
    ),
    "added token without flags": (
        put("added_tokens", 0, value={"id": 266, "content": "<|endoftext|>"}), "cannot be used",
    ),
    "unknown step": (put("pre_tokenizer", value={"type": "Exec", "command": "id"}), "cannot be used"),
    "expression that is none": (
        put("pre_tokenizer", value={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}),
        "cannot be used as a tokenizer",
    ),
    "neither kind": (
        lambda record: record.update(pre_tokenizer={"type": "Whitespace"}, decoder=None), "neither byte-level nor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer(case: str) -> None:
    change, message = HOSTILE[case]
    record = tiny_tokenizer()
    change(record)
    with pytest.raises(ModelError, match=message) as error:
        read(record, vocab=400)
    assert str(error.value).startswith("tokenizer.json ")
    assert "\n" not in str(error.value)


def test_an_unknown_token_that_nobody_knows_does_not_stop_a_text() -> None:
    record = sentencepiece(LEGACY)
    record["model"].update(unk_token="nowhere", byte_fallback=False)
    assert spell(read(record), ("a?b", False)) == [b" ab"]


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({"bos_token": "nobody"}, {}, "has no token 'nobody', the bos_token"),
        ({}, {"eos_token_id": 999}, "has no token 999, which the configs name as an end"),
        ({}, {"eos_token_id": [2, "x"]}, r"eos_token_id \[2, 'x'\], which must be whole numbers"),
        ({}, {"eos_token_id": [None]}, "which must be whole numbers"),
        ({}, {"eos_token_id": -1}, "has no token -1"),
    ],
)
def test_neighbours_that_do_not_fit(config: dict[str, Any], generation: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tiny_tokenizer(), config, generation)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"model": {"vocab": ' + b"[" * 100_000])
def test_bytes_that_are_no_tokenizer(data: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json "):
        read(data)
