"""Text to token ids and back.

The ids come from the ``tokenizers`` library; the way back is our own, byte by byte, so that a whole answer
and a streamed one are the same text by construction and a step costs the same however long the answer is.

Documents and questions are encoded with ``special=False``: a ``<|im_end|>`` in them is five ordinary
tokens. Only text that the chat template wrote is encoded with ``special=True``.
"""

from __future__ import annotations

import codecs
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from ..errors import ModelError
from ..export.package import TokenizerSettings

# The library's thread pool would compete with the graph's, and it warns on every fork once it was used.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Characters per call into the library, which needs some 60 bytes of memory per character while it works.
_BLOCK_CHARACTERS = 1 << 17
_SAFE_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's vocabulary. Safe to share between threads.

    Texts survive ``decode(encode(text))`` exactly, as far as the vocabulary allows: a SentencePiece model
    cannot tell U+2581 from a space, and a few byte-level ones (SmolLM2) lack tokens for bytes that hardly
    occur.
    """

    def __init__(self, backend: Backend, settings: TokenizerSettings) -> None:
        self._backend = backend
        self._settings = settings
        # The library keeps how to read special tokens as state, not as an argument.
        self._lock = threading.Lock()
        added = backend.get_added_tokens_decoder()
        self._added = {index: token.content.encode() for index, token in added.items()}
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._with_prefix = backend.normalizer
        self._without_prefix = normalizers.Replace(" ", "▁") if settings.add_space_prefix else None
        names = sorted((added[index].content for index in self._special), key=len, reverse=True)
        self._special_names = re.compile("|".join(map(re.escape, names))) if self._without_prefix else None

    @classmethod
    def open(cls, folder: Path, settings: TokenizerSettings | Mapping[str, Any]) -> Tokenizer:
        """Read ``folder/tokenizer.json``; ``settings`` as in the package's manifest.

        Raises ModelError when the file is missing or damaged, or does not fit the settings.
        """
        path = folder / "tokenizer.json"
        if not isinstance(settings, TokenizerSettings):
            settings = TokenizerSettings.from_json(settings)
        try:
            backend = Backend.from_file(str(path))
        except BaseException as error:  # the library raises bare Exception, or panics, which Python sees as this
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelError(
                f"{path} cannot be read as a tokenizer ({error}): export the model again"
            ) from error
        count = backend.get_vocab_size(with_added_tokens=True)
        ids = [settings.bos_id, settings.eos_id, settings.eot_id, *settings.stop_ids]
        bad = next((index for index in ids if index is not None and not 0 <= index < count), None)
        if bad is not None:
            raise ModelError(
                f"{path} has {count} tokens but the settings name token {bad}: export the model again"
            )
        return cls(backend, settings)

    @property
    def settings(self) -> TokenizerSettings:
        """Ids of the special tokens, chat template and the like."""
        return self._settings

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special and unused ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without BOS. ``special``: read control tokens in it as such, not as plain text.

        Lone surrogates, which no UTF-8 can hold, become U+FFFD.
        """
        return self._encode(text, special=special, prefix=True)

    def encode_segments(self, segments: Iterable[tuple[str, bool]], *, start: bool = True) -> list[int]:
        """Ids of the segments of a chat template: ``(text, is_template)``, special tokens only in templates.

        ``start``: the segments begin a sequence, which then gets the model's BOS unless it has one already.
        Later segments continue the text before them: a space prefix is put only after a special token.
        """
        ids: list[int] = []
        for text, is_template in segments:
            prefix = ids[-1] in self._special if ids else start
            ids += self._encode(text, special=is_template, prefix=prefix)
        bos = self._settings.bos_id
        if start and self._settings.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ``ids``; control tokens are left out unless ``special``.

        Bytes that are no UTF-8 become U+FFFD; a character that is not complete at the end is left out.
        """
        stream = TextStream(self, special=special)
        pieces = [stream.push(index) for index in ids]
        return "".join(pieces) + stream.finish()

    def stream(self, *, special: bool = False) -> TextStream:
        """A decoder for ids that come one at a time."""
        return TextStream(self, special=special)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one token stands for (for a control token, its name). Raises ModelError outside the
        vocabulary."""
        known = self._bytes.get(index)
        if known is None:
            known = self._bytes[index] = self._spell(index)
        return known

    def is_special(self, index: int) -> bool:
        """Whether a token is a control token, which is no part of the text."""
        return index in self._special

    def _spell(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index]
        token = self._backend.id_to_token(index) if index >= 0 else None
        if token is None:
            raise ModelError(f"token {index} is outside the vocabulary of {self.vocab_size} tokens")
        if self._settings.kind == "byte-level":
            values = [_BYTE_OF.get(character) for character in token]
            spelled = bytes(value for value in values if value is not None)
            return spelled if len(spelled) == len(values) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    def _encode(self, text: str, *, special: bool, prefix: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if special and not prefix and self._special_names is not None:
            # The text goes on without a space prefix, but gets one after its first control token.
            first = self._special_names.search(text)
            if first is not None and first.start() > 0:
                head = self._encode(text[: first.start()], special=False, prefix=False)
                return head + self._encode(text[first.start() :], special=True, prefix=True)
        ids: list[int] = []
        for block in self._blocks(text):
            ids += self._encode_block(block, special=special, prefix=prefix)
            prefix = False
        return ids

    def _encode_block(self, text: str, *, special: bool, prefix: bool) -> list[int]:
        with self._lock:
            self._backend.encode_special_tokens = not special
            if self._without_prefix is not None:
                self._backend.normalizer = self._with_prefix if prefix else self._without_prefix
            # The "fast" form leaves offsets out: less time, and a tenth of the memory.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def _blocks(self, text: str) -> Iterator[str]:
        """``text`` in pieces, cut only where no token can reach over the cut."""
        begin = 0
        while self._settings.cut_at_spaces and len(text) - begin > _BLOCK_CHARACTERS:
            cut = _SAFE_CUT.search(text, begin + _BLOCK_CHARACTERS)
            if cut is None:
                break
            yield text[begin : cut.start()]
            begin = cut.start()
        if begin < len(text):
            yield text[begin:]


class TextStream:
    """Turns ids into text while they come: every character is given out once, when it is complete."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._keep_special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.settings.add_space_prefix

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often "" in the middle of a character."""
        data = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.is_special(token_id):
            if not self._keep_special:
                return ""
        elif self._strip:  # the space that encoding put before the text
            self._strip = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left at the end, and be ready for a new text. An incomplete character is dropped."""
        self._decoder.reset()
        self._strip = self._tokenizer.settings.add_space_prefix
        return ""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others for U+0100 and up, in
    order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
