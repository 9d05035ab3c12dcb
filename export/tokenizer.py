"""Build a tokenizer from the metadata of a GGUF file.

A GGUF file carries a vocabulary and names of rules, not a ready tokenizer. This module writes the same
thing in the form of the ``tokenizers`` library (``tokenizer.json``), in one pass over the lists and without
adding tokens one by one, which keeps a vocabulary of 150,000 entries below two seconds.

Two kinds are known: byte-level BPE (``gpt2``), where ``tokenizer.ggml.pre`` names how text is cut into
words, and SentencePiece BPE (``llama``), whose merges follow from the scores of the vocabulary.

Control tokens (``<|im_end|>``) are marked special, so that a caller can ask for a text to be read without
them: the words of a document must never act as the end of a turn. What the file calls user-defined (Gemma's
runs of newlines, ``<tool_call>``) is ordinary text with a token of its own and is always matched, except
when it has the shape of a control token, which some converters mislabel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tokenizers import Tokenizer

from ..errors import ModelError

BYTE_LEVEL = "byte-level"
SENTENCEPIECE = "sentencepiece"
_KINDS = {"gpt2": BYTE_LEVEL, "llama": SENTENCEPIECE}

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_LARGEST_TYPE = 6

# Tokens that end an answer, by their usual spelling; a file names only one of them as its end of sequence.
STOP_TOKENS = frozenset(
    [
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
        *(
            "<|end_of_turn|>",
            "<end_of_turn>",
            "</s>",
            "<|eos|>",
            "<|return|>",
            "<|call|>",
            "<EOT>",
            "<|EOT|>",
        ),
        *("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "[EOS]"),
    ]
)
# Not "</s>": Gemma has it as a user-defined token for HTML; where it ends a sequence it is marked control.
CONTROL_SHAPE = re.compile(r"<[|｜].*[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]", re.DOTALL)

# --- How byte-level vocabularies cut text into words ------------------------------------------------------

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _words(digits: str) -> str:
    """The GPT-4 family: contractions, words with one leading non-letter, digits, marks with their
    newlines."""
    return rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(suffix: str, digits: str) -> str:
    """The GPT-4o family: words are also cut where a lower-case letter is followed by an upper-case one."""
    return (
        rf"{_LEAD}{_UPPER}*{_LOWER}+{suffix}|{_LEAD}{_UPPER}+{_LOWER}*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text into words. None of the rules lets a word run on from a letter over a space:
    the runtime relies on it to encode long texts in pieces.

    ``splits`` are regular expressions applied one after the other; ``digits`` isolates every digit first;
    ``gpt2`` ends with GPT-2's own rule, which the library has built in; ``whole_words`` takes a word that
    is in the vocabulary as it is, without merging; ``bos`` is whether such files mean a BOS when they do
    not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    whole_words: bool = False
    bos: bool = False

    def to_json(self) -> dict[str, Any]:
        """The ``pre_tokenizer`` entry of a tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        for pattern in self.splits:
            steps.append(
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            )
        steps.append(
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.gpt2}
        )
        return {"type": "Sequence", "pretokenizers": steps}


_GPT2 = PreTokenizer(gpt2=True)
_DIGITS_GPT2 = PreTokenizer(digits=True, gpt2=True)
_GPT4 = PreTokenizer((_words(r"\p{N}{1,3}"),))
_LLAMA3 = PreTokenizer((_words(r"\p{N}{1,3}"),), whole_words=True, bos=True)
_QWEN2 = PreTokenizer((_words(r"\p{N}"),))
_QWEN35 = PreTokenizer(
    (
        rf"{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    )
)
_TEKKEN = PreTokenizer((_cased_words("", r"\p{N}"),), whole_words=True, bos=True)
_GPT4O = PreTokenizer((_cased_words(f"{_CONTRACTION}?", r"\p{N}{1,3}"),))
_DEEPSEEK_CODER = PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"))
_DEEPSEEK3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    )
)
_SEED = PreTokenizer((rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(["default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion"], _GPT2),
    **dict.fromkeys(["mellum", "gigachat", "a.x-4.0", "modern-bert", "granite-docling"], _GPT2),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"], _DIGITS_GPT2),
    **dict.fromkeys(["minerva-7b", "mellum2"], _DIGITS_GPT2),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"], _LLAMA3),
    **dict.fromkeys(["midm-2.0", "lfm2"], _LLAMA3),
    **dict.fromkeys(["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], _GPT4),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"], _QWEN2),
    **dict.fromkeys(["solar-open", "grok-2", "kormo", "f2llmv2"], _QWEN2),
    "qwen35": _QWEN35,
    "tekken": _TEKKEN,
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "minimax-m2"], _GPT4O),
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense", "joyai-llm"], _DEEPSEEK3),
    "seed-coder": _SEED,
}

# --- Settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerSettings:
    """What the runtime must know beside ``tokenizer.json``.

    ``kind`` is ``"byte-level"`` or ``"sentencepiece"``; ids are None when the file names none; ``stop_ids``
    are all tokens that end an answer; ``cut_at_spaces`` says that encoding may be cut before a space
    between two ASCII letters without any effect on the ids.
    """

    kind: str
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    bos_token: str = ""
    eos_token: str = ""
    add_bos: bool = False
    add_space_prefix: bool = False
    cut_at_spaces: bool = False
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> TokenizerSettings:
        """Read the settings out of GGUF metadata. Raises ModelError when they are not usable."""
        return _settings(_Vocabulary.read(metadata), metadata)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; ``from_json`` is its inverse."""
        return {**asdict(self), "stop_ids": list(self.stop_ids)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TokenizerSettings:
        """Raises ModelError for unknown keys and values of the wrong type."""
        known = {field.name: str(field.type) for field in fields(cls)}
        if not isinstance(values, Mapping):
            raise ModelError(
                f"tokenizer settings are not a mapping but {type(values).__name__}: export again"
            )
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown or values.get("kind") not in _KINDS.values():
            detail = f"unknown keys {unknown}" if unknown else f"kind {values.get('kind')!r}"
            raise ModelError(
                f"tokenizer settings have {detail}; known keys: {sorted(known)}, "
                f"kinds: {sorted(_KINDS.values())}"
            )
        for key, value in values.items():
            if not _has_type(value, known[key]):
                raise ModelError(f"tokenizer setting {key} is {value!r}, expected {known[key]}: export again")
        return cls(**{**values, "stop_ids": tuple(values.get("stop_ids", ()))})


def _has_type(value: Any, annotation: str) -> bool:
    """Whether ``value`` (from JSON) fits one of the annotations used in TokenizerSettings."""
    if annotation.startswith("tuple"):
        return isinstance(value, (list, tuple)) and all(_is_int(item) for item in value)
    if value is None:
        return annotation.endswith("None")
    if annotation.startswith("int"):
        return _is_int(value)
    return isinstance(value, bool if annotation == "bool" else str)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- Reading the metadata ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """The checked lists of one file; ``ids`` maps a token's spelling to its id."""

    kind: str
    pre: PreTokenizer
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> _Vocabulary:
        model = metadata.get("tokenizer.ggml.model")
        if not isinstance(model, str) or model not in _KINDS:
            raise ModelError(
                f"tokenizer model {model!r} is not supported; known: {', '.join(sorted(_KINDS))}"
            )
        pre = metadata.get("tokenizer.ggml.pre") or "default"
        if _KINDS[model] == SENTENCEPIECE:
            pre = "default"  # the key is meaningless there, and some files carry a name of their own
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            raise ModelError(
                f"pre-tokenizer {pre!r} is not supported; known: {', '.join(sorted(PRE_TOKENIZERS))}"
            )
        tokens = _list_of(metadata, "tokens", str)
        if not tokens:
            raise ModelError("tokenizer.ggml.tokens is missing or empty: the file has no vocabulary")
        types = _list_of(metadata, "token_type", int) or [_NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise ModelError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
        bad = next((index for index, kind in enumerate(types) if not 0 <= kind <= _LARGEST_TYPE), None)
        if bad is not None:
            raise ModelError(f"token {bad} has type {types[bad]}; known types are 0 to {_LARGEST_TYPE}")
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
            raise ModelError(
                f"token {twice[:80]!r} occurs more than once in the vocabulary: the file is damaged"
            )
        return cls(_KINDS[model], PRE_TOKENIZERS[pre], tokens, types, ids)

    def is_special(self, index: int) -> bool:
        """Whether a token must not be matched in the text of a document."""
        kind = self.types[index]
        if kind in (_CONTROL, _UNKNOWN):
            return True
        return kind == _USER_DEFINED and CONTROL_SHAPE.fullmatch(self.tokens[index]) is not None

    def added(self) -> list[dict[str, Any]]:
        """The ``added_tokens`` of a tokenizer.json, by id."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": index, "content": self.tokens[index], **flags, "special": self.is_special(index)}
            for index, kind in enumerate(self.types)
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and self.tokens[index] and not self._merged(index)
        ]

    def _merged(self, index: int) -> bool:
        """Whether a user-defined token is spelled with SentencePiece's space: no text has it in that form, so
        it has to come out of merges."""
        return self.kind == SENTENCEPIECE and "▁" in self.tokens[index] and not self.is_special(index)


def _list_of(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """The list ``tokenizer.ggml.<key>`` with every entry of ``kind``; empty when it is not there."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        return []
    if not isinstance(values, (list, tuple)):
        raise ModelError(
            f"tokenizer.ggml.{key} is not a list but {type(values).__name__}: the file is damaged"
        )
    for index, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"tokenizer.ggml.{key}[{index}] is {value!r:.80}, expected {kind.__name__}")
    return list(values)


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, (bool, int)):
        raise ModelError(f"tokenizer.ggml.{key} is {value!r:.80}, expected true or false")
    return bool(value)


def _token_id(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    """The id ``tokenizer.ggml.<key>``, checked against the size of the vocabulary; None when not given."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    # Older converters wrote -1 (as uint32: 2^32 - 1) for "there is none".
    if value is None or value in (-1, 0xFFFFFFFF):
        return None
    if not _is_int(value) or not 0 <= value < count:
        raise ModelError(f"tokenizer.ggml.{key} is {value!r:.80}, outside the vocabulary of {count} tokens")
    return int(value)


def _settings(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> TokenizerSettings:
    tokens, count = vocabulary.tokens, len(vocabulary.tokens)
    bos, eos, eot, eom = (
        _token_id(metadata, f"{name}_token_id", count) for name in ("bos", "eos", "eot", "eom")
    )
    stops = {index for index in (eos, eot, eom) if index is not None}
    stops |= {
        vocabulary.ids[name]
        for name in STOP_TOKENS & vocabulary.ids.keys()
        if vocabulary.is_special(vocabulary.ids[name])
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"tokenizer.chat_template is not text but {type(template).__name__}")
    sentencepiece = vocabulary.kind == SENTENCEPIECE
    return TokenizerSettings(
        kind=vocabulary.kind,
        bos_id=bos,
        eos_id=eos,
        eot_id=eot,
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
        add_bos=_flag(metadata, "add_bos_token", sentencepiece or vocabulary.pre.bos) and bos is not None,
        add_space_prefix=sentencepiece and _flag(metadata, "add_space_prefix", True),
        cut_at_spaces=_cuts_at_spaces(vocabulary),
        stop_ids=tuple(sorted(stops)),
        chat_template=template or None,
    )


def _cuts_at_spaces(vocabulary: _Vocabulary) -> bool:
    """Whether no token can reach over the border between an ASCII letter and a following space."""
    crossing = re.compile("[A-Za-z][ ▁]")
    if vocabulary.kind == SENTENCEPIECE:
        return not any(crossing.search(token) for token in vocabulary.tokens)
    return not any(crossing.search(token["content"]) for token in vocabulary.added())


# --- Building ---------------------------------------------------------------------------------------------


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    ``metadata`` has plain Python values under the GGUF keys (``tokenizer.ggml.tokens``, ...). Control
    tokens in a text are matched unless ``encode_special_tokens`` is set on the result; no BOS is added by
    itself. Raises ModelError when the metadata is incomplete, inconsistent, or of a kind that is not
    supported.
    """
    vocabulary = _Vocabulary.read(metadata)
    settings = _settings(vocabulary, metadata)
    if vocabulary.kind == BYTE_LEVEL:
        parts = _byte_level(vocabulary, _merges(metadata, vocabulary, required=True))
    else:
        parts = _sentencepiece(vocabulary, metadata, prefix=settings.add_space_prefix)
    model = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    text = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": vocabulary.added(),
            **parts,
            "post_processor": None,
            "model": {**model, **parts["model"], "vocab": vocabulary.ids},
        },
        ensure_ascii=False,
    )
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for anything it does not like
        raise ModelError(f"the vocabulary cannot be used: {error}") from error


def _byte_level(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "normalizer": None,
        "pre_tokenizer": vocabulary.pre.to_json(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.pre.whole_words,
            "merges": merges,
        },
    }


def _sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, Any], *, prefix: bool) -> dict[str, Any]:
    scores = _list_of(metadata, "scores", float)
    if scores and len(scores) != len(vocabulary.tokens):
        raise ModelError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary.tokens)} tokens"
        )
    merges = (
        _merges_from_scores(vocabulary, scores) if scores else _merges(metadata, vocabulary, required=False)
    )
    if not scores and not merges:
        raise ModelError(
            "tokenizer.ggml.scores is missing: a SentencePiece vocabulary cannot be used without it"
        )
    unknown = _token_id(metadata, "unknown_token_id", len(vocabulary.tokens))
    if unknown is None and _UNKNOWN in vocabulary.types:
        unknown = vocabulary.types.index(_UNKNOWN)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    restore = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    before = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": merges,
        },
    }


def _merges(metadata: Mapping[str, Any], vocabulary: _Vocabulary, *, required: bool) -> list[tuple[str, str]]:
    """The merges that the file lists, best first, each checked against the vocabulary."""
    lines = _list_of(metadata, "merges", str)
    if required and not lines:
        raise ModelError(
            "tokenizer.ggml.merges is missing: a byte-level vocabulary cannot be used without it"
        )
    pairs: list[tuple[str, str]] = []
    for index, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ModelError(
                f"tokenizer.ggml.merges[{index}] is {line!r:.80}, expected two tokens and one space"
            )
        for token in (left, right, left + right):
            if token not in vocabulary.ids:
                raise ModelError(f"tokenizer.ggml.merges[{index}] uses {token!r:.80}, not in the vocabulary")
        pairs.append((left, right))
    return pairs


def _merges_from_scores(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's rule implies: join the pair whose result has the best score.

    A token can come out of several pairs; the one with the longer left half goes first, as in `transformers`.
    """
    if any(score != score for score in scores):
        raise ModelError("tokenizer.ggml.scores has values that are not numbers: the file is damaged")
    tokens, ids = vocabulary.tokens, vocabulary.ids
    pairs: list[tuple[str, str]] = []
    for index in sorted(range(len(tokens)), key=lambda index: -scores[index]):
        token = tokens[index]
        if vocabulary.types[index] not in (_NORMAL, _USER_DEFINED) or len(token) < 2:
            continue
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                pairs.append((left, right))
    return pairs
