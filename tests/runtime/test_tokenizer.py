"""Text to ids and back: round trips, special tokens, pieces, streaming."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from satchel.errors import ModelError
from satchel.export.tokenizer import TokenizerSettings, build_tokenizer
from satchel.runtime.tokenizer import TextStream, Tokenizer

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ALPHABET = [chr(byte) if byte in PRINTABLE else "" for byte in range(256)]
for _place, _byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE):
    ALPHABET[_byte] = chr(256 + _place)


def byte_level(**extra: Any) -> Tokenizer:
    merges = ["Ġ t", "h e", "Ġt he", "Ã ©", "ð Ł"]
    names = ["<|start|>", "<|im_end|>", "naïve tool"]
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in merges), *names]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        **extra,
    }
    return Tokenizer(build_tokenizer(metadata), TokenizerSettings.from_metadata(metadata))


def sentencepiece(*, prefix: bool = True) -> Tokenizer:
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "[", "]"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(place) for place in range(len(words))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return Tokenizer(build_tokenizer(metadata), TokenizerSettings.from_metadata(metadata))


KINDS = [byte_level, sentencepiece, lambda: sentencepiece(prefix=False)]
TEXTS = [
    "",
    " ",
    "  a",
    "a ",
    "\n\n",
    "\ta\r\n",
    "héllo wörld",
    "e\u0301",
    "日本語",
    "👩‍👩‍👧",
    "\U0010ffff",
    "\x00\x7f\x80",
    "the ab",
]


@pytest.fixture(params=KINDS, ids=["byte-level", "sentencepiece", "gemma-like"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


def random_text(rng: random.Random) -> str:
    characters = [
        chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        for _ in range(40)
    ]
    return "".join(characters).replace("▁", "")


def test_any_unicode_survives(tokenizer: Tokenizer) -> None:
    rng = random.Random(11)
    for text in [*TEXTS, *(random_text(rng) for _ in range(100))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc80")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


def test_streaming_gives_the_same_text_whole_characters_only(tokenizer: Tokenizer) -> None:
    text = "".join(TEXTS) + " the é👩‍👩‍👧 naïve tool"
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 30


def test_an_unfinished_character_is_never_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")
    stream = TextStream(tokenizer)
    shown = "".join(stream.push(index) for index in ids[:-1]) + stream.finish()
    assert shown == "a"
    assert tokenizer.decode(ids[:-1]) == "a"
    assert "".join(stream.push(index) for index in ids) + stream.finish() == "a😀"  # ready for a new text


def test_malformed_bytes_are_marked() -> None:
    tokenizer = byte_level()
    assert tokenizer.decode([0xFF, ord("a"), 0xC3, ord("b")]) == "\ufffda\ufffdb"


def test_a_step_costs_the_same_however_long_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = byte_level(), 0
    original = Tokenizer.token_bytes

    def counted(self: Tokenizer, index: int) -> bytes:
        nonlocal calls
        calls += 1
        return original(self, index)

    monkeypatch.setattr(Tokenizer, "token_bytes", counted)
    stream = tokenizer.stream()
    for _ in range(1000):
        stream.push(ord("a"))
    assert calls == 1000


def test_control_tokens_count_only_on_demand() -> None:
    tokenizer = byte_level()
    end = tokenizer.settings.eos_id
    assert end not in tokenizer.encode("x<|im_end|>")
    assert tokenizer.encode("x<|im_end|>", special=True) == [ord("x"), end]
    assert end not in tokenizer.encode("x<|im_end|>")  # the switch does not stick
    assert tokenizer.decode([ord("x"), end]) == "x"
    assert tokenizer.decode([ord("x"), end], special=True) == "x<|im_end|>"


def test_user_defined_tokens_are_text() -> None:
    tokenizer = byte_level()
    assert tokenizer.encode("naïve tool") == [tokenizer.vocab_size - 1]
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == "naïve tool"


@pytest.mark.parametrize("index", [-1, 10**6])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, index: int) -> None:
    with pytest.raises(
        ModelError, match=f"token {index} is outside the vocabulary of {tokenizer.vocab_size}"
    ):
        tokenizer.decode([index])


def test_pieces_do_not_change_ids(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    words = [
        "the",
        "ab",
        "a  b",
        "the the",
        "日本 a",
        "\n",
        " <|im_end|> ",
        "naïve tool",
        "12 3",
        "a. b",
        "x\u00a0y",
    ]
    text = " ".join(rng.choices(words, k=500))
    whole = [tokenizer.encode(text, special=special) for special in (False, True)]
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr("satchel.runtime.tokenizer._BLOCK_CHARACTERS", size)
        assert [tokenizer.encode(text, special=special) for special in (False, True)] == whole


def test_segments_of_a_template() -> None:
    tokenizer = byte_level()
    start, end = tokenizer.settings.bos_id, tokenizer.settings.eos_id
    ids = tokenizer.encode_segments([("<|start|>", True), ("<|im_end|>", False), ("<|im_end|>", True)])
    assert ids == [start, *b"<|im_end|>", end]


def test_bos_is_put_once() -> None:
    tokenizer = byte_level(**{"tokenizer.ggml.add_bos_token": True})
    bos = tokenizer.settings.bos_id
    assert tokenizer.encode_segments([("x", True)]) == [bos, ord("x")]
    assert tokenizer.encode_segments([("<|start|>x", True)]) == [bos, ord("x")]
    assert tokenizer.encode_segments([("x", True)], start=False) == [ord("x")]
    assert tokenizer.encode_segments([]) == [bos]


def test_the_space_prefix_comes_only_where_a_text_begins() -> None:
    tokenizer = sentencepiece()
    spelled = {index: tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)}

    def spell(*segments: tuple[str, bool], start: bool = True) -> list[bytes]:
        return [spelled[index] for index in tokenizer.encode_segments(segments, start=start)]

    assert spell(("a", False)) == [b"<s>", b" a"]
    assert spell(("[", True), ("a", False)) == [b"<s>", b" ", b"[", b"a"]
    assert spell(("[", True), ("a", False), ("]</s>b", True)) == [
        b"<s>",
        b" ",
        b"[",
        b"a",
        b"]",
        b"</s>",
        b" ",
        b"b",
    ]
    assert spell(("</s>", True), ("ab", False), start=False) == [b"</s>", b" ab"]
    assert spell(("ab", False), start=False) == [b"ab"]


def test_open_reads_a_folder(tmp_path: Path) -> None:
    made = byte_level()
    made._backend.save(str(tmp_path / "tokenizer.json"))
    opened = Tokenizer.open(tmp_path, made.settings.to_json())
    assert opened.encode("the é") == made.encode("the é")
    assert opened.settings == made.settings
    assert Tokenizer.open(tmp_path, made.settings).vocab_size == made.vocab_size
    with pytest.raises(ModelError, match="settings name token 9999"):
        Tokenizer.open(tmp_path, {**made.settings.to_json(), "stop_ids": [9999]})


# The library panics on this one (found by benchmarks/fuzz_files.py), which Python sees as a BaseException.
PANIC = (
    '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "continuing_subword_prefix": "../x", '
    '"vocab": {"t": 0, "h": 1, "th": 2}, "merges": [["t", "h"]]}}'
)


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}', "\x00", PANIC])
def test_open_refuses_damaged_files(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"tokenizer.json cannot be read as a tokenizer .*export the model again"
    ):
        Tokenizer.open(tmp_path, TokenizerSettings(kind="byte-level"))


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"])
def test_a_real_document_survives(
    name: str,
    real_model: Callable[[str], Path],
    real_document: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(str(real_model(name))).fields
    metadata = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    tokenizer = Tokenizer(build_tokenizer(metadata), TokenizerSettings.from_metadata(metadata))
    text = real_document("policy.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    monkeypatch.setattr("satchel.runtime.tokenizer._BLOCK_CHARACTERS", 1000)
    assert tokenizer.encode(text) == ids
