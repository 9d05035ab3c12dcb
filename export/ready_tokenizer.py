"""A tokenizer that comes ready beside the weights (``tokenizer.json``): checked, then used as it is.

What is changed is only what the runtime does itself: beginning-of-sequence tokens are not added by a
post-processor, nothing is cut or padded, ``Metaspace`` becomes the normalizer that it is another spelling of
(so that a text can be continued without a space before it), and tokens of the shape of control tokens are marked
special, so that the words of a document never act as the end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from ..errors import ModelError
from .sources import Source, TokenizerFiles, parse_record
from .tokenizer import BYTE_LEVEL, CONTROL_SHAPE, SENTENCEPIECE, STOP_TOKENS, TokenizerSettings

MAX_TOKENS = 1 << 22
PROBE = "The tests, 12 of them:\n\tnaïve 漢字 🙂 it's"
CROSSING = re.compile("[A-Za-z][ ▁Ġ]")  # a token over a letter and the space behind it
SPACE, MARK = " ", "▁"


class ReadyTokenizer:
    """``tokenizer.json`` and its neighbours, read and checked.

    Args:
        vocab: rows of the model's embedding. Added tokens beyond it (Gemma's texts-only models have one for
            pictures) are left out.

    Raises:
        ModelError: a file is damaged, of a kind that is not supported, or does not fit the others.
    """

    def __init__(self, files: TokenizerFiles, vocab: int) -> None:
        self._files = files
        self._vocab = vocab
        self._record = parse_record(files.read(), files.path)
        self._vocabulary = self._check_model()
        self._added = self._check_added()
        steps = _steps(self._record)
        self._kind = BYTE_LEVEL if "ByteLevel" in steps else SENTENCEPIECE
        if self._kind == SENTENCEPIECE and not (MARK in steps or self._record["model"].get("byte_fallback")):
            raise self._error("is neither byte-level nor SentencePiece; use another model")
        post_processor = self._record.get("post_processor")
        self._rewrite()
        self.settings = self._settings(post_processor)
        self.tokenizer = self._load()

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._files.path} {what}")

    def _check_model(self) -> dict[str, int]:
        """Token -> id of the model in the record."""
        model = self._record.get("model")
        if not isinstance(model, dict):
            raise self._error("has no model; download it again")
        # very old files leave the type out
        if model.get("type", "BPE") != "BPE":
            raise self._error(f"has the tokenizer model {model.get('type')!r:.40}; supported: BPE; use another model")
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise self._error(f"has a {key}, which is not supported; use another model")
        vocabulary = model.get("vocab")
        if not isinstance(vocabulary, dict) or not vocabulary:
            raise self._error("has no vocabulary; download it again")
        for token, index in vocabulary.items():
            if type(index) is not int or not 0 <= index < MAX_TOKENS:
                raise self._error(f"gives the token {token!r:.80} the id {index!r:.40}; download it again")
        largest = max(vocabulary.values())
        if largest >= self._vocab:
            raise self._error(f"has the token {largest}, the model only {self._vocab}; download both again")
        if len(set(vocabulary.values())) != len(vocabulary):
            raise self._error("gives two tokens the same id; download it again")
        return vocabulary

    def _check_added(self) -> dict[str, int]:
        """Added token -> id; marks as special what has the shape of a control token."""
        added = self._record.get("added_tokens") or []
        if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
            raise self._error("has added_tokens that are no list of records; download it again")
        found: dict[str, int] = {}
        kept: list[dict[str, Any]] = []
        self._record["added_tokens"] = kept
        for token in added:
            name, index = token.get("content"), token.get("id")
            if not isinstance(name, str) or not name or type(index) is not int or not 0 <= index < MAX_TOKENS:
                raise self._error(f"has the added token {name!r:.80} with the id {index!r:.40}; download it again")
            if found.get(name, index) != index or self._vocabulary.get(name, index) != index:
                raise self._error(f"gives the token {name!r:.80} two ids; download it again")
            if index >= self._vocab:
                continue
            found[name] = index
            kept.append(token)
            if CONTROL_SHAPE.fullmatch(name):
                token["special"] = True
        return found

    def _rewrite(self) -> None:
        """See the module: into the form that the runtime expects."""
        record = self._record
        record.update(truncation=None, padding=None, post_processor=None)
        model = record["model"]
        model["dropout"] = None
        if not isinstance(model.get("unk_token"), str) or model["unk_token"] not in self._vocabulary:
            model["unk_token"] = None  # the library would fail in the middle of a text
        before = record.get("pre_tokenizer")
        if self._kind == BYTE_LEVEL or not isinstance(before, dict) or before.get("type") != "Metaspace":
            return
        if before.get("replacement", MARK) != MARK:
            raise self._error("marks spaces by another character than ▁; use another model")
        scheme = before.get("prepend_scheme", "always" if before.get("add_prefix_space", True) else "never")
        steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": MARK}]
        if scheme != "never":
            steps.insert(0, {"type": "Prepend", "prepend": MARK})
        first = record.get("normalizer")
        record["normalizer"] = {"type": "Sequence", "normalizers": ([first] if first else []) + steps}
        cut = {"type": "Split", "pattern": {"String": MARK}, "behavior": "MergedWithNext", "invert": False}
        record["pre_tokenizer"] = cut if before.get("split", True) else None

    def _settings(self, post_processor: Any) -> TokenizerSettings:
        files, ids = self._files, {**self._vocabulary, **self._added}
        config = files.tokenizer_config
        bos, eos = self._token_id("bos"), self._token_id("eos")
        special = {token["content"] for token in self._record["added_tokens"] if token.get("special") is True}
        stops = {ids[name] for name in STOP_TOKENS & special}
        stops |= set(self._end_ids()) | ({eos} if eos is not None else set())
        names = {index: name for name, index in ids.items()}
        outside = next((index for index in sorted(stops) if index not in names), None)
        if outside is not None:
            raise self._error(f"has no token {outside}, which the configs name as an end; download the whole model")
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = bos is not None and _starts_with(post_processor, names.get(bos))
        tokens = self._added if self._kind == BYTE_LEVEL else ids
        crossing = any(map(CROSSING.search, tokens)) or any(map(CROSSING.search, self._vocabulary))
        return TokenizerSettings(
            kind=self._kind,
            bos_id=bos,
            eos_id=eos,
            bos_token="" if bos is None else names[bos],
            eos_token="" if eos is None else names[eos],
            add_bos=add_bos and bos is not None,
            add_space_prefix=self._kind == SENTENCEPIECE and "Prepend" in _steps(self._record),
            cut_at_spaces=not crossing,
            stop_ids=tuple(sorted(stops)),
            chat_template=_chat_template(files),
        )

    def _token_id(self, which: str) -> int | None:
        """The id of the token that begins or ends a sequence: by its spelling in tokenizer_config.json, or by
        number in config.json where that does not say.
        """
        config, key = self._files.tokenizer_config, f"{which}_token"
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str) and value:
            index = self._added.get(value, self._vocabulary.get(value))
            if index is None:
                raise self._error(f"has no token {value!r:.80}, the {key} of tokenizer_config.json; download it again")
            return index
        known = set(self._vocabulary.values()) | set(self._added.values())
        given = self._files.model_config.get(f"{key}_id") if key not in config else None
        given = given[0] if isinstance(given, list) and given else given
        return given if type(given) is int and given in known else None

    def _end_ids(self) -> list[int]:
        """All ends of sequence that generation_config.json names, or else config.json."""
        for record in (self._files.generation_config, self._files.model_config):
            value = record.get("eos_token_id")
            if value is not None:
                values = value if isinstance(value, list) else [value]
                if not all(type(item) is int for item in values):
                    raise self._error(f"is used with the eos_token_id {value!r:.40}, which must be whole numbers")
                return values
        return []

    def _load(self) -> Tokenizer:
        """The library's object, tried on a text."""
        try:
            tokenizer = Tokenizer.from_str(json.dumps(self._record, ensure_ascii=False))
            tokenizer.encode(PROBE, add_special_tokens=False)
        except BaseException as error:  # the library raises bare Exception, or panics, which Python sees as this
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            detail = " ".join(str(error).split())[:200]
            raise self._error(f"cannot be used as a tokenizer ({detail}); download it again") from None
        # the library numbers added tokens itself where the model does not know them
        for name, index in self._added.items():
            if tokenizer.token_to_id(name) != index:
                raise self._error(f"gives the token {name!r:.80} the id {index}, which is not free; download it again")
        return tokenizer


def ready_tokenizer(source: Source, vocab: int) -> ReadyTokenizer | None:
    """The tokenizer beside the weights of a folder; None where it is in the metadata.

    Raises:
        ModelError: as `ReadyTokenizer`, or a folder has none.
    """
    if source.tokenizer is not None:
        return ReadyTokenizer(source.tokenizer, vocab)
    if source.path.is_dir():
        raise ModelError(
            f"{source.path} has no tokenizer.json; AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of "
            "transformers writes one"
        )
    return None


def _steps(record: Mapping[str, Any]) -> set[str]:
    """Types of all normalizers, pre-tokenizers and decoders, and ▁ where one of them writes or reads it."""
    found: set[str] = set()
    rest = [record.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            found |= {value["type"]} if isinstance(value.get("type"), str) else set()
            rest += list(value.values())
        elif isinstance(value, list):
            rest += value
        elif value == MARK:
            found.add(MARK)
    return found


def _starts_with(post_processor: Any, token: str | None) -> bool:
    """Whether a post-processor puts ``token`` before a text."""
    rest = [post_processor]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            single = value.get("single")
            first = single[0] if isinstance(single, list) and single else None
            special = first.get("SpecialToken") if isinstance(first, Mapping) else None
            if isinstance(special, Mapping) and special.get("id") == token:
                return True
            rest.append(value.get("processors"))
        elif isinstance(value, list):
            rest += value
    return False


def _chat_template(files: TokenizerFiles) -> str | None:
    """The template in a file of its own goes before that of the config; of several, the one called default."""
    if files.chat_template is not None:
        return files.chat_template or None
    value = files.tokenizer_config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, Mapping)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ModelError(
            f"{files.path.with_name('tokenizer_config.json')} has a chat_template that is not text but "
            f"{type(value).__name__}; download it again"
        )
    try:
        (value or "").encode()
    except UnicodeEncodeError:  # JSON can hold half a character
        where = files.path.with_name("tokenizer_config.json")
        raise ModelError(f"{where} has a chat_template that is not valid Unicode; download it again") from None
    return value or None
