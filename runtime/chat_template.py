"""Conversations as the text that a model was trained on.

A model file carries its chat template as jinja2 source, that is, as a program by a stranger. It runs in
jinja's sandbox, and under limits of our own, because the sandbox alone bounds neither nested loops nor
sizes: a budget for loop steps, for the length of every value, and for time.

The runtime reads a document before any question is known. So a rendered conversation is split at the places
where system text, document and question stand, found by rendering markers in their place. Each piece is a
``Segment`` that says whether the template wrote it (its control tokens count) or a person did (they are
plain text).
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import ModelError

# For a base model without a template: it goes on with the text after "Answer:".
PLAIN_TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == 'assistant' %} {{ message.content + eos_token + '\n\n' -}}
{%- elif message.role == 'user' -%}{{- message.content + '\n\nAnswer:' -}}
{%- else -%}{{- message.content + '\n\n' -}}
{%- endif -%}
{%- endfor -%}
"""

_STEPS = 100_000  # loop steps and calls; real templates take a few dozen per message
_RANGE_LIMIT = 10_000
_NUMBER_BITS = 4_096
_PRODUCT = 64  # how many times the largest allowed value the parts of one call may multiply to
_VALUE_LIMIT = 1_000_000  # characters or items of one value, beyond what the conversation itself holds
_SECONDS = 10.0
_WIDE_FORMAT = re.compile(r"\d{5,}|\*")


class Segment(NamedTuple):
    """A piece of a prompt; control tokens count only where the template wrote it."""

    text: str
    is_template: bool


class _LimitError(Exception):
    """A template went over a limit."""


class _RaisedError(Exception):
    """A template refused the conversation with ``raise_exception``."""


# --- The sandbox ------------------------------------------------------------------------------------------


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox with a budget for each rendering: call ``start`` before it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = [loopcontrols, _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.printable)
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.globals = {name: self.globals[name] for name in ("dict", "namespace", "cycler", "joiner")}
        self.globals.update(raise_exception=_refuse, strftime_now=_now, range=self._range)
        self.start(0)

    def start(self, characters: int) -> None:
        """Give the next rendering its budget; ``characters`` is the size of the conversation."""
        self._steps = _STEPS
        self._longest = _VALUE_LIMIT + 4 * characters
        self._deadline = time.monotonic() + _SECONDS

    def prepare(self, source: str) -> jinja2.Template:
        """Compile ``source`` so that every loop and every concatenation asks for its budget."""
        tree = self.parse(source)
        loops, joins = list(tree.find_all(nodes.For)), list(tree.find_all(nodes.Concat))
        for loop in loops:
            loop.iter = self._call("loop_items", loop.iter)
        for join in joins:
            join.nodes = [self._call("printable", node) for node in join.nodes]
        replaced = {id(join): self._call("limited", join) for join in joins}
        _replace(tree, replaced)
        return jinja2.Template.from_code(self, self.compile(tree), dict(self.globals))

    @staticmethod
    def _call(name: str, argument: nodes.Node) -> nodes.Expr:
        # An attribute of the environment, since a template could give a variable the same name.
        function = nodes.EnvironmentAttribute(name, lineno=argument.lineno)
        return nodes.Call(function, [cast(nodes.Expr, argument)], [], None, None, lineno=argument.lineno)

    def loop_items(self, items: Iterable[Any]) -> list[Any]:
        """The items of a loop, paid for from the budget before it runs."""
        found = list(items)
        self._spend(len(found) + 1)
        return found

    def printable(self, value: Any) -> Any:
        """``value``, unless its printed form would be too long: lists can hold one long text many times."""
        if isinstance(value, Namespace):
            raise _LimitError("it prints a namespace")
        if _printed_length(value, self._longest) > self._longest:
            raise _LimitError(f"it prints a value of more than {self._longest} characters")
        return value

    def limited(self, value: Any) -> Any:
        """``value``, unless it is larger than a prompt can sensibly be."""
        if isinstance(value, (str, list, tuple)) and len(value) > self._longest:
            raise _LimitError(f"it makes a value of {len(value)} characters or items, limit {self._longest}")
        if isinstance(value, int) and value.bit_length() > _NUMBER_BITS:
            raise _LimitError(f"it makes a number of {value.bit_length()} bits, limit {_NUMBER_BITS}")
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make something large out of something small, checked before they do."""
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "**" and len(numbers) == 2 and left.bit_length() * abs(right) > _NUMBER_BITS:
            raise _LimitError(f"it computes a power of more than {_NUMBER_BITS} bits")
        if operator == "*" and len(numbers) == 1:
            sequences = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
            if sequences and len(sequences[0]) * numbers[0] > self._longest:
                raise _LimitError(f"it repeats a value beyond {self._longest} characters or items")
        if operator == "%" and isinstance(left, str):
            self._check_format(left)
            self._check_arguments((left, right))
        return self.limited(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes, with its arguments and its result checked."""
        self._spend(1)
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            if getattr(function, "__name__", "") in ("format", "format_map"):
                self._check_format(owner)
            self._check_arguments((owner, *args, *kwargs.values()))
        return self.limited(super().call(context, function, *args, **kwargs))

    def _guarded(self, filter_function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_function)  # also carries over what jinja notes on filters
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._spend(1)
            self._check_arguments((*args, *kwargs.values()))
            if filter_function.__name__ == "do_format" and args:
                self._check_format(str(args[0]))
            return self.limited(filter_function(*args, **kwargs))

        return guarded

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if len(numbers) > _RANGE_LIMIT:
            raise _LimitError(f"it counts over {len(numbers)} numbers, limit {_RANGE_LIMIT}")
        return numbers

    def _check_arguments(self, values: tuple[Any, ...]) -> None:
        """Refuse what could make a giant in one step: no text function makes more than the product of its
        parts (``replace`` of each character by a long text, ``join`` with a long text, a width)."""
        size = 1
        for value in values:
            if isinstance(value, int):
                size *= max(1, abs(value))
            else:
                size *= max(1, _printed_length(value, _PRODUCT * self._longest))
        if size > _PRODUCT * self._longest:
            raise _LimitError(f"it asks for a text of up to {size:.3g} characters")

    def _check_format(self, pattern: str) -> None:
        if _WIDE_FORMAT.search(pattern):
            raise _LimitError("it formats with a width of five digits or more")

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise _LimitError(f"it takes more than {_STEPS} loop steps and calls")
        if time.monotonic() > self._deadline:
            raise _LimitError(f"it runs for more than {_SECONDS:g} seconds")


def _printed_length(value: Any, limit: int) -> int:
    """Roughly the length of ``str(value)``; stops counting beyond ``limit``."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 2 * len(item)
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            total += len(item)
            waiting += item
        else:
            total += 1
    return total


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks the model's own words for training: here, just its
    body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _replace(node: nodes.Node, replaced: Mapping[int, nodes.Expr]) -> None:
    """Put the nodes of ``replaced`` (by the id of the old node) into the tree below ``node``."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            for child in value:
                if isinstance(child, nodes.Node):
                    _replace(child, replaced)
            setattr(node, name, [replaced.get(id(child), child) for child in value])
        elif isinstance(value, nodes.Node):
            _replace(value, replaced)
            setattr(node, name, replaced.get(id(value), value))


def _refuse(message: str) -> NoReturn:
    raise _RaisedError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as models saw it in training: not escaped for HTML, unlike jinja's own filter."""
    known = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)


# --- The template -----------------------------------------------------------------------------------------

# Words that no template contains and none would change.
_SYSTEM, _DOCUMENT, _QUESTION, _ANSWER = (f"Satchelmarker{name}zq7x" for name in ("Sys", "Doc", "Que", "Ans"))
_BETWEEN = "\n\n"  # between document and question, and where a system text has to go into the user's message
_PADDING = " \n"


class ChatTemplate:
    """Renders conversations, whole or in the pieces in which the runtime reads them.

    ``prefix`` + ``rest`` is exactly ``render`` of system text and "document, blank line, question";
    ``next_turn`` goes on from the end of an answer. Templates that strip messages are followed: surrounding
    white space of the document and the question is then left out here, too.
    """

    def __init__(self, source: str | None, *, bos_token: str = "", eos_token: str = "") -> None:
        """``source`` None stands for a model without a template. Raises ModelError when it cannot be
        compiled."""
        self._variables = {"bos_token": bos_token, "eos_token": eos_token, "tools": None, "documents": None}
        self._sandbox = _Sandbox()
        self._lock = threading.Lock()  # the budget belongs to one rendering at a time
        self._splits: dict[bool, _Split] = {}
        self._between_turns: tuple[str, str, bool] | None = None
        try:
            self._template = self._sandbox.prepare(PLAIN_TEMPLATE if source is None else source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template of the model cannot be read: {_line(error)}") from error
        except (RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise ModelError(f"the chat template of the model is too complex: {_line(error)}") from error

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of ``messages`` (each with ``role`` and ``content``).

        Raises ModelError when the template fails, refuses the conversation or goes over its limits.
        """
        size = sum(len(text) for message in messages for text in message.values())
        copies = [dict(message) for message in messages]
        with self._lock:
            self._sandbox.start(size)
            pieces, length = [], 0
            try:
                values = {**self._variables, "add_generation_prompt": add_generation_prompt}
                for piece in self._template.generate(messages=copies, **values):
                    pieces.append(piece)
                    length += len(piece)
                    if length > _VALUE_LIMIT + 4 * size:
                        raise _LimitError(
                            f"it writes more than {length} characters for {size} of conversation"
                        )
            except _LimitError as error:
                raise ModelError(f"the chat template of the model was stopped: {error}") from error
            except _RaisedError as error:
                raise ModelError(f"the chat template refuses this conversation: {_line(error)}") from error
            except Exception as error:  # whatever a foreign program can run into
                raise ModelError(f"the chat template of the model fails: {_line(error)}") from error
        return "".join(pieces)

    def prefix(self, system: str | None, document: str | None) -> list[Segment]:
        """What can be read before a question is known: up to the end of the document (None: there is none).

        Raises ModelError when the template changes the text of a message or does not write it once, in order.
        """
        split = self._split(system is not None)
        segments = [Segment(split.head, True)]
        begun = False  # whether the user's message has text already, so that stripping does not reach further
        if system is not None:
            begun = not split.supports_system
            stripped = system.lstrip() if begun else system.strip()
            shown = stripped if split.strips else system
            segments += [Segment(shown, False), Segment(split.middle, split.supports_system)]
        if document is not None:
            shown = document.lstrip() if split.strips and not begun else document
            segments.append(Segment(shown, False))
            self._check_prefix(split, system, document, _text(segments))
        return _joined(segments)

    def rest(self, question: str, *, system: bool = False, document: bool = True) -> list[Segment]:
        """What follows ``prefix``: the question and everything up to where the answer begins.

        ``system`` and ``document``: whether the prefix has them.
        """
        split = self._split(system)
        if split.strips:
            question = question.rstrip() if document else question.strip()
        return _joined([Segment((_BETWEEN if document else "") + question, False), Segment(split.tail, True)])

    def next_turn(self, question: str) -> list[Segment]:
        """What follows the last word of an answer: its end-of-turn token, the next question and everything
        up to where the next answer begins. The token that ended the answer must not be kept before it."""
        if self._between_turns is None:
            self._between_turns = self._find_between_turns()
        before, after, strips = self._between_turns
        question = question.strip() if strips else question
        return _joined([Segment(before, True), Segment(question, False), Segment(after, True)])

    def _check_prefix(self, split: _Split, system: str | None, document: str, text: str) -> None:
        """Render the very document, since a template may change what the markers could not show."""
        messages = split.messages(system, document + _BETWEEN + _QUESTION)
        if self.render(messages) != text + _BETWEEN + _QUESTION + split.tail:
            raise ModelError(
                "the chat template changes the text of the document, which cannot be read ahead then"
            )

    def _split(self, with_system: bool) -> _Split:
        known = self._splits.get(with_system)
        if known is None:
            known = self._splits[with_system] = self._find_split(with_system)
        return known

    def _find_split(self, with_system: bool) -> _Split:
        system = _SYSTEM if with_system else None
        content = _DOCUMENT + _BETWEEN + _QUESTION
        marks = [_SYSTEM, content] if with_system else [content]
        supports_system = True
        try:
            pieces = _cut(self.render(_messages(system, content)), marks)
        except ModelError:
            if not with_system:
                raise
            # Gemma and others know no system role: its text goes before the document then.
            supports_system = False
            pieces = [*_cut(self.render(_messages(None, content)), [content])]
            pieces.insert(1, _BETWEEN)
        middle = pieces[1] if with_system else ""
        padded = _messages(system if supports_system else None, _PADDING + content + _PADDING)
        strips = _PADDING + content + _PADDING not in self.render(padded)
        return _Split(pieces[0], middle, pieces[-1], supports_system, strips)

    def _find_between_turns(self) -> tuple[str, str, bool]:
        def cut(question: str) -> list[str]:
            turns = [("user", _DOCUMENT), ("assistant", _ANSWER), ("user", question)]
            text = self.render([{"role": role, "content": content} for role, content in turns])
            return _cut(text, [_DOCUMENT, _ANSWER, _QUESTION])

        _, _, before, after = cut(_QUESTION)
        padded = cut(_PADDING + _QUESTION + _PADDING)
        return before, after, padded[2:] != [before + _PADDING, _PADDING + after]


class _Split(NamedTuple):
    """A rendered first turn without its texts: head [system middle] document ... question tail."""

    head: str
    middle: str
    tail: str
    supports_system: bool
    strips: bool

    def messages(self, system: str | None, content: str) -> list[dict[str, str]]:
        """The conversation as this template can take it."""
        if system is not None and not self.supports_system:
            return _messages(None, system + _BETWEEN + content)
        return _messages(system, content)


def _messages(system: str | None, content: str) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": content}]


def _cut(text: str, marks: list[str]) -> list[str]:
    """The pieces of ``text`` around ``marks``, which must each occur once and in this order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ModelError("the chat template does not write each message once, unchanged and in order")
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]


def _text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Without empty segments, and with neighbours of the same kind as one, as a tokenizer should see them."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].is_template == segment.is_template:
            joined[-1] = Segment(joined[-1].text + segment.text, segment.is_template)
        elif segment.text:
            joined.append(segment)
    return joined


def _line(error: BaseException) -> str:
    """The first line of an error, short enough for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
