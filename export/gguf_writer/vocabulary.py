"""A ``tokenizer.json`` in GGUF's keys.

GGUF has a vocabulary, names of rules and no code, so what the file does is to be recognised: byte-level vocabularies
cut texts into words by a rule that llama.cpp knows by name. Its converter recognises a tokenizer by the hash of
what it makes of a test text; that depends on the vocabulary and knows published ones only. Here the rule itself is
tried, on texts in which any two rules of ``PRE_TOKENIZERS`` differ. SentencePiece vocabularies need scores, which
follow from the order of the merges. At the end the keys are read back and both tokenizers must agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer as LibraryPreTokenizer

from ...errors import ModelError
from ..ready_tokenizer import ReadyTokenizer
from ..tokenizer import BYTE_LEVEL, PRE_TOKENIZERS, STOP_TOKENS, PreTokenizer, TokenizerSettings, build_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# normalizers that llama.cpp has (▁ for spaces) or leaves out without harm (Qwen's NFC)
KNOWN_NORMALIZERS = {"Sequence", "Prepend", "Replace", "NFC"}
PROBES = (
    "The tests, 12 of them:\n\tna\u00efve \u6f22\u5b57 \u3072\u3089\u304c\u306a \U0001f642 it's 1234567 12,345.67",
    "HelloWorld camelCase XMLHttp don't DON'T WE'LL we'Ve I'm  two   spaces\n\n\nlines \r\n\r\n end\n",
    "path/to/file.py //// a/b\n/c !!!\n???/ ...\n\n(x) {y} [z] #tag @me $5 \u20ac7 50% a_b __init__ =>\t\t->",
    "cafe\u0301 re\u0301sume\u0301 \u0e01\u0e33\u0e25\u0e31\u0e07 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u0430\u0431\u0432 123\u0661\u0662\u0663 \u00b2\u00bd \u4e00\u4e8c\u4e0912\u30ab\u30bf\ub9d0  \u00a0x \u3000y",
    "  leading and trailing  ",
)
DIFFERENT = "the tokenizer that llama.cpp would make of it is another one"


def tokenizer_keys(ready: ReadyTokenizer, vocab: int, where: str) -> dict[str, Any]:
    """The ``tokenizer.*`` keys.

    Args:
        vocab: rows of the embedding; ids without a token get one that no text has.
        where: path of the file, for messages.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    record, settings = json.loads(ready.tokenizer.to_str()), ready.settings
    unknown = sorted(_normalizers(record.get("normalizer")) - KNOWN_NORMALIZERS)
    if unknown:
        raise _error(where, f"normalizes texts by {unknown[0]!r:.40}, which llama.cpp does not know")
    tokens, types = _tokens(record, vocab)
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    model = record["model"]
    if settings.kind == BYTE_LEVEL:
        rule = _name_of_rule(record.get("pre_tokenizer"), bool(model.get("ignore_merges")), where)
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule}
        keys["tokenizer.ggml.merges"] = [" ".join(pair) for pair in model["merges"]]
    else:
        keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        keys["tokenizer.ggml.scores"] = _scores(tokens, model["merges"])
        keys["tokenizer.ggml.add_space_prefix"] = settings.add_space_prefix
        if model.get("unk_token") is not None:
            keys["tokenizer.ggml.unknown_token_id"] = tokens.index(model["unk_token"])
    keys |= _ends(settings, tokens, where)
    _check(ready.tokenizer, settings, keys, where)
    return keys


def _error(where: str, what: str) -> ModelError:
    return ModelError(f"{where} {what}; export the model with --format onnx, or take a .gguf of it")


def _normalizers(value: Any) -> set[str]:
    if not isinstance(value, Mapping):
        return set()
    found = {str(value.get("type"))}
    for inner in value.get("normalizers") or ():
        found |= _normalizers(inner)
    return found


def _tokens(record: Mapping[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Spelling and type of every token of the embedding."""
    found: dict[int, tuple[str, int]] = {}
    model = record["model"]
    for token, index in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
        kind = UNKNOWN if token == model.get("unk_token") else BYTE if is_byte else NORMAL
        found[index] = (token, kind)
    for added in record["added_tokens"]:
        special = CONTROL if added["special"] else USER_DEFINED
        kept = found.get(added["id"], ("", NORMAL))[1] == UNKNOWN
        found[added["id"]] = (added["content"], UNKNOWN if kept else special)
    names = {token for token, _ in found.values()}
    for index in range(vocab):
        if index not in found:
            name = f"[PAD{index}]"
            while name in names:
                name += "_"
            found[index] = (name, UNUSED)
    return [found[index][0] for index in range(vocab)], [found[index][1] for index in range(vocab)]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """The earlier a merge, the better the score of its result; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _name_of_rule(step: Any, whole_words: bool, where: str) -> str:
    """llama.cpp's name of the rule that cuts the probes into the same words."""
    wanted = _words(step, where)
    tried: dict[PreTokenizer, bool] = {}
    for name, rule in PRE_TOKENIZERS.items():
        if rule.whole_words != whole_words or name == "default":
            continue
        if rule not in tried:
            tried[rule] = _words(rule.to_json(), where) == wanted
        if tried[rule]:
            return name
    raise _error(where, "cuts texts into words by a rule that llama.cpp has no name for (pre_tokenizer)")


def _words(step: Any, where: str) -> list[list[str]]:
    text = json.dumps({"version": "1.0", "pre_tokenizer": step, "model": {"type": "BPE", "vocab": {}, "merges": []}})
    try:
        found: LibraryPreTokenizer | None = Tokenizer.from_str(text).pre_tokenizer
        if found is None:
            raise _error(where, "has no rule for cutting texts into words (pre_tokenizer)")
        return [[word for word, _ in found.pre_tokenize_str(probe)] for probe in PROBES]
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception
        detail = " ".join(str(error).split())[:200]
        raise _error(where, f"has a pre_tokenizer that cannot be used ({detail})") from None


def _ends(settings: TokenizerSettings, tokens: list[str], where: str) -> dict[str, Any]:
    """Which tokens begin and end a text. llama.cpp would take token 11 for the end where a file names none."""
    stops = [index for index in (settings.eos_id, *settings.stop_ids) if index is not None]
    if not stops:
        raise _error(where, "and its neighbours name no token that ends a text (eos_token), which llama.cpp needs")
    keys: dict[str, Any] = {"tokenizer.ggml.eos_token_id": stops[0], "tokenizer.ggml.add_bos_token": settings.add_bos}
    if settings.bos_id is not None:
        keys["tokenizer.ggml.bos_token_id"] = settings.bos_id
    # the others are found by their spelling, there as here
    others = [index for index in stops[1:] if index != stops[0] and tokens[index] not in STOP_TOKENS]
    keys |= {f"tokenizer.ggml.{name}_token_id": index for name, index in zip(("eot", "eom"), others, strict=False)}
    if settings.chat_template is not None:
        keys["tokenizer.chat_template"] = settings.chat_template
    return keys


def _check(ready: Tokenizer, settings: TokenizerSettings, keys: Mapping[str, Any], where: str) -> None:
    """Refuses keys from which another tokenizer is made than the one that they were made from."""
    again, theirs = build_tokenizer(keys), TokenizerSettings.from_metadata(keys)
    names = [token for token in (settings.bos_token, settings.eos_token) if token]
    for probe in (*PROBES, f"a{' b'.join(names)}c"):
        if again.encode(probe, add_special_tokens=False).ids != ready.encode(probe, add_special_tokens=False).ids:
            raise _error(where, f"cannot be written into a GGUF file: {DIFFERENT}")
    if set(theirs.stop_ids) != set(settings.stop_ids) or theirs.add_bos != settings.add_bos:
        raise _error(where, f"has beginnings or ends of texts that a GGUF file cannot name: {DIFFERENT}")
