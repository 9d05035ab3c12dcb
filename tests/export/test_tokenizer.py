"""Tokenizers built from GGUF metadata: tiny vocabularies against slow twins, hostile metadata, parity."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from satchel.errors import ModelError
from satchel.export.tokenizer import PRE_TOKENIZERS, TokenizerSettings, build_tokenizer

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {
    **{byte: chr(byte) for byte in PRINTABLE},
    **{byte: chr(256 + i) for i, byte in enumerate(OTHERS)},
}


def byte_level(pre: str = "gpt-2", merges: tuple[str, ...] = ("Ġ a", "a b", "1 2")) -> dict[str, Any]:
    tokens = [ALPHABET[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|im_start|>", "<|im_end|>", "<tool>", "<|odd|>"]
    types = [1] * (len(tokens) - 4) + [3, 3, 4, 4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }


def sentencepiece(prefix: bool = True) -> dict[str, Any]:
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "▁▁", "abc", "ca"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words, "\n\n"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words), 4]
    scores = [0.0] * 259 + [-float(place) for place in range(len(words))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def spell(metadata: dict[str, Any], text: str, *, special: bool = True) -> list[str]:
    tokenizer = build_tokenizer(metadata)
    tokenizer.encode_special_tokens = not special
    return [metadata["tokenizer.ggml.tokens"][index] for index in tokenizer.encode(text).ids]


def slow_sentencepiece(metadata: dict[str, Any], text: str) -> list[str]:
    """Join the neighbours whose union scores best, the leftmost first, until nothing can be joined."""
    score = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not joins:
            return symbols
        place = min(joins)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's  123\n\nx", ["it", "'s", "Ġ", "Ġ123", "Ċ", "Ċ", "x"]),
        ("default", "it's 12", ["it", "'s", "Ġ12"]),
        ("smollm", "a  123", ["a", "ĠĠ", "1", "2", "3"]),
        ("starcoder", "a 12", ["a", "Ġ", "1", "2"]),
        ("qwen2", "It'S 123.\n\nx\ty", ["It", "'S", "Ġ", "1", "2", "3", ".ĊĊ", "x", "ĉy"]),
        ("qwen35", "a\u0301b 1", ["a\u00cc\u0123b".replace("\u0123", ALPHABET[0x81]), "Ġ", "1"]),
        ("llama-bpe", "x 12345", ["x", "Ġ", "123", "45"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
        ("gpt-4o", "camelCase's 1234", ["camel", "Case's", "Ġ", "123", "4"]),
        ("deepseek-coder", "ab  cd,12\n", ["ab", "Ġ", "Ġcd", ",", "1", "2", "Ċ"]),
        ("deepseek-v3", "x(abc) 1234", ["x", "(abc", ")", "Ġ", "123", "4"]),
        ("seed-coder", "a. \n", ["a", ".", "ĠĊ"]),
        ("dbrx", "a 1234", ["a", "Ġ", "123", "4"]),
    ],
)
def test_words_of_each_pre_tokenizer(pre: str, text: str, words: list[str]) -> None:
    tokenizer = build_tokenizer(byte_level(pre))
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_no_word_crosses_from_a_letter_over_a_space(pre: str) -> None:
    """What encoding in pieces relies on."""
    tokenizer = build_tokenizer(byte_level(pre))
    rng = random.Random(5)
    for _ in range(200):
        left = "".join(rng.choices("aB1. \n'é世", k=6)) + "x"
        right = " y" + "".join(rng.choices("aB1. \n'é世", k=6))
        assert tokenizer.encode(left).ids + tokenizer.encode(right).ids == tokenizer.encode(left + right).ids


def test_whole_words_skip_merging_only_where_the_family_does() -> None:
    metadata = byte_level("llama-bpe", merges=("a b", "c d"))
    metadata["tokenizer.ggml.tokens"].append("abcd")  # no merge leads there
    metadata["tokenizer.ggml.token_type"].append(1)
    assert spell(metadata, "abcd") == ["abcd"]
    assert spell({**metadata, "tokenizer.ggml.pre": "dbrx"}, "abcd") == ["ab", "cd"]


def test_control_tokens_are_plain_text_on_demand() -> None:
    metadata = byte_level()
    assert spell(metadata, "a<|im_end|>") == ["a", "<|im_end|>"]
    assert spell(metadata, "a<|im_end|>", special=False) == ["a", *"<|im_end|>"]
    assert spell(metadata, "<tool>", special=False) == ["<tool>"]  # user-defined: ordinary text
    assert spell(metadata, "<|odd|>", special=False) == [*"<|odd|>"]  # mislabelled control token


def test_sentencepiece_equals_a_slow_twin() -> None:
    metadata, rng = sentencepiece(), random.Random(3)
    for _ in range(300):
        text = "".join(rng.choices("aabbcc  ", k=rng.randint(1, 9)))
        assert spell(metadata, text) == slow_sentencepiece(metadata, text), text


def test_sentencepiece_bytes_prefix_and_user_defined() -> None:
    assert spell(sentencepiece(), "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert spell(sentencepiece(prefix=False), "ab ab") == ["ab", "▁ab"]
    assert spell(sentencepiece(prefix=False), "a\n\nb") == ["a", "\n\n", "b"]
    assert spell(sentencepiece(prefix=False), "</s>", special=False)[0] == "<0x3C>"


def test_settings_of_a_vocabulary() -> None:
    metadata = {**byte_level(), "tokenizer.chat_template": "{{ messages }}"}
    settings = TokenizerSettings.from_metadata(metadata)
    start, end, odd = (
        metadata["tokenizer.ggml.tokens"].index(name) for name in ("<|im_start|>", "<|im_end|>", "<|odd|>")
    )
    assert (settings.bos_id, settings.eos_id, settings.eos_token) == (start, end, "<|im_end|>")
    assert settings.stop_ids == (end,)
    assert odd not in settings.stop_ids
    assert not settings.add_bos
    assert settings.cut_at_spaces
    assert settings.chat_template == "{{ messages }}"
    assert TokenizerSettings.from_json(settings.to_json()) == settings
    assert TokenizerSettings.from_metadata(sentencepiece()).add_bos
    assert TokenizerSettings.from_metadata({**byte_level("llama-bpe")}).add_bos
    assert (
        TokenizerSettings.from_metadata({**byte_level(), "tokenizer.ggml.bos_token_id": 0xFFFFFFFF}).bos_id
        is None
    )


def test_end_of_turn_tokens_stop_an_answer() -> None:
    metadata = byte_level()
    for name in ("<|eot_id|>", "<end_of_turn>", "<|endoftext|>"):
        metadata["tokenizer.ggml.tokens"].append(name)
        metadata["tokenizer.ggml.token_type"].append(3)
    assert len(TokenizerSettings.from_metadata(metadata).stop_ids) == 4


def test_html_that_looks_like_an_end_is_text() -> None:
    """Gemma has user-defined tokens for HTML, one of them spelled like the end of sequence elsewhere."""
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"].append("</s>")
    metadata["tokenizer.ggml.token_type"].append(4)
    assert spell(metadata, "</s>", special=False) == ["</s>"]
    assert len(TokenizerSettings.from_metadata(metadata).stop_ids) == 1


def test_a_token_over_a_space_forbids_cutting() -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"].append("a▁b")
    metadata["tokenizer.ggml.token_type"].append(1)
    metadata["tokenizer.ggml.scores"].append(-20.0)
    assert not TokenizerSettings.from_metadata(metadata).cut_at_spaces


def spoil(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.__setitem__(f"tokenizer.ggml.{key}", value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil("model", "t5"), "'t5' is not supported; known: gpt2, llama"),
        (spoil("model", None), "None is not supported"),
        (spoil("pre", "martian"), "'martian' is not supported; known: .*llama-bpe.*qwen2"),
        (spoil("pre", 7), "7 is not supported"),
        (spoil("tokens", None), "no vocabulary"),
        (spoil("tokens", "abc"), "not a list but str"),
        (spoil("tokens", ["a", 5]), r"tokens\[1\] is 5, expected str"),
        (spoil("token_type", [1]), "1 entries for"),
        (lambda m: m["tokenizer.ggml.token_type"].__setitem__(0, 99), "token 0 has type 99"),
        (
            lambda m: m["tokenizer.ggml.tokens"].__setitem__(3, m["tokenizer.ggml.tokens"][4]),
            "more than once",
        ),
        (spoil("merges", None), "merges is missing"),
        (spoil("merges", ["ab"]), r"merges\[0\] is 'ab'"),
        (spoil("merges", ["a b c"]), r"merges\[0\]"),
        (spoil("merges", ["a "]), r"merges\[0\]"),
        (spoil("merges", ["x y"]), "'xy', not in the vocabulary"),
        (spoil("merges", [1]), "expected str"),
        (spoil("bos_token_id", 10**6), "bos_token_id is 1000000, outside the vocabulary of 263 tokens"),
        (spoil("eos_token_id", "2"), "eos_token_id is '2'"),
        (spoil("add_bos_token", "yes"), "expected true or false"),
        (lambda m: m.__setitem__("tokenizer.chat_template", 3), "chat_template is not text"),
        (lambda m: m["tokenizer.ggml.tokens"].__setitem__(5, "\ud800"), "cannot be used"),
    ],
)
def test_damaged_metadata(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    metadata = byte_level()
    damage(metadata)
    with pytest.raises(ModelError, match=message) as caught:
        build_tokenizer(metadata)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", None, "scores is missing"),
        ("scores", [0.0], "1 entries for"),
        ("scores", [float("nan")] * 271, "not numbers"),
    ],
)
def test_damaged_sentencepiece(key: str, value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_tokenizer({**sentencepiece(), f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize(
    "values",
    [{}, {"kind": "x"}, {"kind": "byte-level", "new": 1}, {"kind": "byte-level", "bos_id": "1"}, [],
     {"kind": "byte-level", "stop_ids": ["a"]}, {"kind": "byte-level", "add_bos": 1}],
)  # fmt: skip
def test_damaged_settings(values: Any) -> None:
    with pytest.raises(ModelError):
        TokenizerSettings.from_json(values)


def multilingual_sample(seed: int = 1) -> str:
    """200 KB of many scripts, emoji, white space, numbers and code."""
    rng, pieces = random.Random(seed), []
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x3FF), (0x400, 0x4FF), (0x530, 0x6FF), (0x900, 0xDFF)]
    ranges += [(0xE00, 0xFFF), (0x1000, 0x11FF), (0x1E00, 0x206F), (0x20A0, 0x24FF), (0x3000, 0x30FF)]
    ranges += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFEF), (0x10400, 0x1044F), (0x1D400, 0x1D7FF)]
    ranges += [(0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF)]
    tails = [
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "",
        "'s ",
        "'LL ",
        " 12345 ",
        "\n\n   ",
        "   42",
        "\u00a0",
        "\u3000",
        "👩‍👩‍👧 ",
    ]
    code = Path(__file__).read_text(encoding="utf-8")
    size = 0
    while size < 200_000:
        low, high = rng.choice(ranges)
        known = [chr(c) for c in range(low, high + 1) if unicodedata.category(chr(c)) != "Cn"]
        piece = "".join(rng.choices(known, k=rng.randint(1, 9))) + rng.choice(tails)
        if rng.random() < 0.05:
            start = rng.randrange(len(code))
            piece += code[start : start + 300]
        pieces.append(piece)
        size += len(piece.encode())
    return "".join(pieces)


@pytest.mark.real
@pytest.mark.filterwarnings("default")  # theirs, not ours
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"])
def test_ids_equal_transformers(name: str, real_model: Callable[[str], Path]) -> None:
    transformers = pytest.importorskip("transformers")
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    path = real_model(name)
    reference = transformers.AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name
    ).backend_tokenizer
    metadata = real_metadata(path)
    if metadata["tokenizer.ggml.pre"] == "smollm":
        # transformers 5 knows no `smollm` in a GGUF and takes plain GPT-2; llama.cpp isolates digits first,
        # as the merges of the vocabulary (none has a digit) expect. Everything else must be equal.
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        reference.pre_tokenizer = pre_tokenizers.Sequence(steps)
    text = multilingual_sample()
    assert build_tokenizer(metadata).encode(text).ids == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"])
def test_ids_equal_llama_cpp(name: str, real_model: Callable[[str], Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = real_model(name)
    peer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    text = multilingual_sample()
    theirs = peer.tokenize(text.encode(), add_bos=False, special=False)
    tokenizer = build_tokenizer(real_metadata(path))
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode(text).ids == theirs


def real_metadata(path: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(str(path)).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
