"""Chat templates: rendering, splitting at the document, hostile sources."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from satchel.errors import ModelError
from satchel.runtime.chat_template import ChatTemplate, Segment

CHATML = """{% for m in messages %}
{%- if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nDefault<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{%- for m in messages %}
    {%- set head = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' %}
    {%- set content = head + m['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if m.role == 'user' %}
{%- if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
SILENT = """{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "silent": SILENT,
    "none": None,
}
DOCUMENTS = ["Text.", "  Text <|im_end|>\n\n", "\n", "", "{{ 7 * 7 }} {% for %}", "日本語\r\n", "a & <b> 'c'"]


def chat(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")


def text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def messages(system: str | None, content: str) -> list[dict[str, str]]:
    return [
        *([{"role": "system", "content": system}] if system is not None else []),
        {"role": "user", "content": content},
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief. "])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_prefix_and_rest_are_the_rendered_conversation(name: str, system: str | None, document: str) -> None:
    template, question = chat(name), " Why <|im_end|>?\n"
    content = document + "\n\n" + question
    if system is not None and name in ("gemma", "silent"):  # no system role: it goes before the document
        whole = template.render(messages(None, system + "\n\n" + content))
    else:
        whole = template.render(messages(system, content))
    if not document.strip() and name in ("llama3", "gemma") and (system is None or name == "llama3"):
        with pytest.raises(
            ModelError, match="changes the text"
        ):  # they strip the blank line before the question
            template.prefix(system, document)
        return
    prefix, rest = template.prefix(system, document), template.rest(question, system=system is not None)
    assert text(prefix) + text(rest) == whole


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_without_document(name: str, system: str | None) -> None:
    template = chat(name)
    folded = system is not None and name in ("gemma", "silent")
    whole = template.render(messages(None, f"{system}\n\n Why? ") if folded else messages(system, " Why? "))
    said = text(template.prefix(system, None)) + text(
        template.rest(" Why? ", system=system is not None, document=False)
    )
    assert (
        said == whole if not (folded and name == "gemma") else said.replace(" ", "") == whole.replace(" ", "")
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_people_wrote_is_never_template(name: str) -> None:
    template = chat(name)
    segments = template.prefix("SYS", "DOC") + template.rest("QUE", system=True) + template.next_turn("NEXT")
    for word in ("SYS", "DOC", "QUE", "NEXT"):
        (found,) = [segment for segment in segments if word in segment.text]
        assert not found.is_template
    for mark in ("<|im_start|>", "<|eot_id|>", "<start_of_turn>", "[INST]"):
        assert all(segment.is_template for segment in segments if mark in segment.text)
    assert all(segment.text for segment in segments)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_next_turn_continues_the_conversation(name: str) -> None:
    template, answer = chat(name), "Because."
    first = text(template.prefix(None, "Doc")) + text(template.rest("Why?"))
    turns = [
        *messages(None, "Doc\n\nWhy?"),
        {"role": "assistant", "content": answer},
        *messages(None, "And?"),
    ]
    whole = template.render(turns)
    continued = first + answer + text(template.next_turn("And?"))
    assert continued.replace(" ", "") == whole.replace(" ", "")  # some put a space before the answer
    if name not in ("mistral", "none"):
        assert continued == whole


def test_segments_of_chatml() -> None:
    template = chat("chatml")
    assert template.prefix("S", "D") == [
        Segment("<|im_start|>system\n", True),
        Segment("S", False),
        Segment("<|im_end|>\n<|im_start|>user\n", True),
        Segment("D", False),
    ]
    assert template.rest("Q") == [
        Segment("\n\nQ", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    ]
    assert template.next_turn("Q") == [
        Segment("<|im_end|>\n<|im_start|>user\n", True),
        Segment("Q", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    ]


def test_a_model_without_template() -> None:
    template = ChatTemplate(None, eos_token="</s>")
    assert template.render(messages("S", "D")) == "S\n\nD\n\nAnswer:"
    turns = [*messages(None, "D"), {"role": "assistant", "content": "A"}, *messages(None, "E")]
    assert template.render(turns) == "D\n\nAnswer: A</s>\n\nE\n\nAnswer:"


@pytest.mark.parametrize(
    "source",
    [
        "fixed",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}{{ messages[0].content }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content[:20] }}",
    ],
)
def test_templates_that_cannot_be_split(source: str) -> None:
    with pytest.raises(ModelError, match="does not write each message once, unchanged and in order"):
        ChatTemplate(source).prefix(None, "Some document.")


@pytest.mark.parametrize(
    "change", ["replace('foo', 'bar')", "escape", "replace('\n\n', '\n')", "truncate(500)"]
)
def test_templates_that_change_this_document(change: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content | " + change + " }}{% endfor %}")
    with pytest.raises(ModelError, match="chat template"):
        template.prefix(None, "foo & <b>\n\n" + "long " * 200)


def test_helpers() -> None:
    def render(source: str) -> str:
        rendered: str = ChatTemplate(source).render([{"role": "user", "content": "x"}])
        return rendered

    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}") in (time.strftime("%Y"), str(int(time.strftime("%Y")) - 1))
    assert render("{% generation %}g{% endgeneration %}") == "g"
    assert (
        render(
            "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{{ loop.last }}{% endfor %}"
        )
        == "0False1False"
    )
    assert render("a\n    {% if true %}\nb\n    {% endif %}\n") == "a\nb\n"
    assert (
        render(
            "{% set ns = namespace(n=1) %}{% for i in [3] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
        )
        == "4"
    )
    assert render("{{ missing }}{% if tools %}t{% endif %}") == ""


def test_the_conversation_itself_is_not_limited() -> None:
    long = "word\n" * 300_000
    assert chat("llama3").render(messages(None, long)).count("word") == 300_000
    assert text(chat("gemma").prefix(None, long)).count("word") == 300_000
    assert (
        len(
            ChatTemplate("{{ messages[0].content.replace('word', 'w').split('\n') | length }}").render(
                messages(None, long)
            )
        )
        == 6
    )


def test_messages_are_not_changed() -> None:
    given = messages("S", "D")
    with pytest.raises(ModelError):
        ChatTemplate("{{ messages.append(1) }}").render(given)
    assert given == messages("S", "D")


HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "{% set loop_items = 1 %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'x' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**(10**10) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' | format(10**9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ ('x' * 1000000).replace('x', 'x' * 1000000) }}",
    "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "{{ (['x' * 100000] * 100000) | join }}",
    "{{ (['x' * 100000] * 100000) | tojson }}",
    "{% set a = ['x' * 100000] * 100000 %}{{ a }}",
    "{% set a = ['x' * 1000] * 1000 %}{% set b = [a] * 1000 %}{{ 1 ~ b }}",
    "{% set ns = namespace(x=['x' * 100000] * 100000) %}{{ ns }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ([ns.x] * 2) | join %}{% endfor %}",
    "{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{% include 'x' %}",
    "{{ lipsum(n=10000) }}",
    "{{ 1 / 0 }}",
    "{{ messages[9].content.x }}",
    "{{ raise_exception('no\nway') }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_stopped(source: str) -> None:
    template = ChatTemplate(source)
    began = time.process_time()
    with pytest.raises(ModelError) as caught:
        template.render([{"role": "user", "content": "x"}])
    assert time.process_time() - began < 8
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_refusal_of_a_template_is_told() -> None:
    with pytest.raises(ModelError, match="refuses this conversation: System role not supported"):
        chat("gemma").render(messages("S", "D"))


@pytest.mark.parametrize(
    "source",
    [
        "{% for",
        "{{ x(",
        "{% for x in y %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% nosuch %}",
        "{{ 1 | nosuch }}",
    ],
)
def test_sources_that_cannot_be_compiled(source: str) -> None:
    with pytest.raises(ModelError, match="the chat template of the model"):
        ChatTemplate(source)


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_real_templates(name: str, system: str | None, real_model: Callable[[str], Path]) -> None:
    gguf = pytest.importorskip("gguf")
    source = gguf.GGUFReader(str(real_model(name))).fields["tokenizer.chat_template"].contents()
    template = ChatTemplate(source, eos_token="<|im_end|>")
    whole = template.render(messages(system, "Doc.\n\nWhy?"))
    assert (
        text(template.prefix(system, "Doc.")) + text(template.rest("Why?", system=system is not None))
        == whole
    )
    turns = [
        *messages(system, "Doc.\n\nWhy?"),
        {"role": "assistant", "content": "So."},
        *messages(None, "And?"),
    ]
    assert template.render(turns) == whole + "So." + text(template.next_turn("And?"))
