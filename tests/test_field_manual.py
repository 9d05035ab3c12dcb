"""The field manual in docs/samples: what it says of the code is true, and its questions can be answered from it.

The manual is prose with numbers in it. Whatever is cheap to compare is compared here, so that a change of the code
shows which sentence has become wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import satchel
from satchel import cli, kernels
from satchel.cache import KVUsage
from satchel.cache.archive import BLOCK_TOKENS
from satchel.cache.head_budgets import LEAST_SHARE
from satchel.cache.retrievers.channels import Channels
from satchel.cache.scorers import LayerView, find_scorer, scorer_names
from satchel.cache.scorers.actqkv import PROBES
from satchel.cache.settings import CacheSettings
from satchel.devices import machine, roofline
from satchel.devices.flash import DEFAULT_SHARE
from satchel.devices.planner import CHUNKS, WHOLE_TOKENS, Costs, Wishes, make_plan
from satchel.devices.planner.archive import RECALL_PART_TOKENS, RECALL_TOKENS
from satchel.devices.planner.plan import ARCHIVE_STEP
from satchel.export.architectures import ARCHITECTURES, read_model
from satchel.export.blocks import CARRIED, BlockFormat, BlockTensor
from satchel.export.exporter import BITS, FLAVOURS
from satchel.export.hub.registry import DEFAULT_MODEL, all_models
from satchel.export.packing import pack
from satchel.export.sources import open_source
from satchel.export.weights import plan_matrices, share_embedding
from satchel.runtime import context, model, options
from satchel.runtime.bench import DECODE_TOKENS, DEFAULT_RUNS
from satchel.runtime.documents import archive, html, source
from satchel.runtime.memory import RETRIEVERS_OF_CHOICE, page_bytes
from satchel.runtime.sampling import SamplingOptions

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "docs" / "samples"
LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 24, 14, 2, 64  # of the default model; a test marked real compares them


@cache
def manual() -> str:
    return (SAMPLES / "field-manual.md").read_text(encoding="utf-8")


@cache
def sections() -> dict[str, str]:
    """Heading -> text of each chapter."""
    pieces = re.split(r"^## (.+)$", manual(), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def section(number: int) -> str:
    return next(text for heading, text in sections().items() if heading.startswith(f"{number}. "))


def flowing(text: str) -> str:
    """Without line breaks, which fall anywhere in prose (a quotation's marks go with them)."""
    return " ".join(re.sub(r"^> ?", "", text, flags=re.MULTILINE).split())


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows, the heads and the rules below them left out."""
    found = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|") and not line.startswith("|---") and not following.startswith("|---"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def number(text: str) -> int:
    return int(text.replace(",", ""))


def says(number_of_section: int, *texts: str) -> None:
    """The chapter has these words."""
    flat = flowing(section(number_of_section))
    assert [text for text in texts if text not in flat] == []


def questions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((SAMPLES / "questions.json").read_text(encoding="utf-8"))["questions"]
    return found


# --- The document -----------------------------------------------------------------------------------------------


def test_it_is_a_long_document() -> None:
    words = [word for word in manual().split() if any(map(str.isalnum, word))]
    assert 11_000 <= len(words) <= 15_000
    assert [int(heading.partition(".")[0]) for heading in sections()] == list(range(1, 23))


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", manual())
    assert targets
    assert [target for target in targets if "//" not in target and not (SAMPLES / target).exists()] == []


def test_named_files_exist() -> None:
    """Files of the checkout that the text names by their path."""
    named = re.findall(r"`((?:cache|kernels|tests|docs)/[\w./-]+)`", manual())
    made_up = {"cache/scorers/value_norm.py"}
    assert named
    assert [name for name in named if name not in made_up and not (ROOT / name).exists()] == []


def test_field_notes_are_marked_and_spread() -> None:
    notes = re.findall(r"^> \*\*Field note\.\*\* (A convention of this manual)?", manual(), flags=re.MULTILINE)
    assert len(notes) >= 13
    assert all(notes)
    assert [heading for heading, text in sections().items() if text.count("Field note.**") > 1] == []


def test_no_measured_speeds() -> None:
    assert re.findall(r"\d\s*(?:tokens/s|tokens per second|GFLOP|GB/s|ms\b|seconds\b)", manual()) == []


# --- The questions ----------------------------------------------------------------------------------------------


def test_there_are_twelve_questions_from_all_parts() -> None:
    assert len({entry["question"] for entry in questions()}) == 12
    parts = [entry["part"] for entry in questions()]
    assert [parts.count(part) for part in ("beginning", "middle", "end")] == [4, 4, 4]


@pytest.mark.parametrize("entry", questions(), ids=lambda entry: entry["answers"][0])
def test_answers_stand_in_their_section(entry: dict[str, Any]) -> None:
    assert set(entry) == {"question", "answers", "section", "part", "kind"}
    assert entry["answers"]
    text = flowing(sections()[entry["section"]])
    assert [answer for answer in entry["answers"] if answer not in text] == []
    place = manual().index(f"\n## {entry['section']}\n") / len(manual())
    assert entry["part"] == ("beginning", "middle", "end")[int(place * 3)]


@pytest.mark.parametrize("entry", questions(), ids=lambda entry: entry["answers"][0])
def test_field_notes_can_be_known_from_one_place_only(entry: dict[str, Any]) -> None:
    assert entry["kind"] in ("fact", "field note")
    if entry["kind"] == "field note":
        notes = flowing(sections()[entry["section"]]).partition("Field note.**")[2]
        for answer in entry["answers"]:
            assert answer in notes
            assert flowing(manual()).count(answer) == notes.count(answer)


# --- What it says of the code -----------------------------------------------------------------------------------


def test_models_and_commands() -> None:
    default = next(entry for entry in all_models() if entry.name == DEFAULT_MODEL)
    says(2, f"`{DEFAULT_MODEL}`", f"{default.bytes:,} bytes", "`SATCHEL_CACHE_DIR`")
    says(4, f"up to {default.context_tokens:,}")
    says(20, f"the model reads {default.context_tokens:,}")
    commands = [re.match(r"`satchel (\w+)", row[0]) for row in rows(section(2))]
    assert [match[1] for match in commands if match] == list(cli.COMMANDS)
    planned = next(row[0] for row in rows(section(21)) if row[0].startswith("the commands"))
    assert not set(re.findall(r"`(\w+)`", planned)) & set(cli.COMMANDS)
    assert [name for name in ARCHITECTURES if f"`{name}`" not in section(2)] == []


def test_reading() -> None:
    assert (CHUNKS, context.DEFAULT_NEW_TOKENS) == ((512, 256, 128, 64), 512)
    says(3, "tries 512, 256, 128 and 64 tokens", "which is 512 unless you say otherwise", "36 runs")
    assert -(-18_000 // 512) == 36
    assert 18_000 - 35 * 512 == 80
    assert satchel.devices.sizes.parse_size("2GiB") - satchel.devices.sizes.parse_size("2GB") == 147_483_648


def test_memory_table() -> None:
    pair = 2 * LAYERS * KV_HEADS * HEAD_SIZE * 2
    page = LAYERS * KV_HEADS * page_bytes(HEAD_SIZE, "bf16")
    table = [list(map(number, row)) for row in rows(section(5)) if row[0][0].isdigit()]
    assert [row[0] for row in table] == [1 << power for power in range(10, 16)]
    for tokens, pairs, pages, size in table:
        assert (pairs, pages) == (tokens * pair, tokens // kernels.PAGE_TOKENS)
        assert size == pages * page


def test_memory_sums() -> None:
    bf16, fp32 = page_bytes(HEAD_SIZE, "bf16"), page_bytes(HEAD_SIZE, "fp32")
    says(5, f"= {bf16:,} bytes", f"48 × {bf16:,} = {48 * bf16:,}", f"= {fp32:,} bytes")
    observed = {name: find_scorer(name).observed_queries * LAYERS * HEADS * HEAD_SIZE * 4 for name in scorer_names()}
    says(5, f"= {observed['snapkv']:,} bytes", f"{observed['expected-attention']:,} bytes")
    says(5, "`keydiff`, `knorm` and `recency`")
    assert observed["keydiff"] == observed["knorm"] == observed["recency"] == 0
    says(7, f"of the last {find_scorer('actqkv').observed_queries} queries only the {PROBES} that")
    says(7, "at least a fifth")
    assert LEAST_SHARE == 1 / 5
    says(5, f"for {model.ANSWER_ROOM:,} tokens of question and answer")
    assert 2 * LAYERS * HEADS * HEAD_SIZE * 2 == 86_016
    assert 86_016 * 32_768 == 2_818_572_288
    assert 2 * 30 * 3 * 64 * 2 * 8_192 == 188_743_680
    assert 32_768 * 32_769 // 2 == 536_887_296
    assert 32_768 * 2_560 == 83_886_080


def test_worked_plan() -> None:
    costs = Costs(0, 0, 0, kernels.PAGE_TOKENS, 48 * page_bytes(HEAD_SIZE, "bf16"), 0)
    plan = make_plan(costs, 1 << 33, tokens=30_000, least_hot_tokens=320, wishes=Wishes(hot_tokens=2_048))
    assert (plan.chunk, plan.capacity_tokens) == (512, 2_560)
    says(5, f"= {plan.kv_limit_bytes:,} bytes", f"{plan.capacity_tokens:,} tokens are held")


def test_default_limit(tmp_path: Path) -> None:
    """An eighth of what is available, at least 256 MiB, never more than half."""
    says(5, "an eighth of what is available, at least 256 MiB, but never more than half of it")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    for available, margin in ((16 << 30, 2 << 30), (1 << 30, 256 << 20), (256 << 20, 128 << 20)):
        (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {available // 1024} kB\n")
        (tmp_path / "proc" / "self" / "status").write_text("RssAnon: 0 kB\nRssFile: 0 kB\n")
        assert machine.default_memory_limit(tmp_path) == available - margin


def test_cache_settings() -> None:
    settings = CacheSettings()
    table = {row[0].strip("`"): row[1].strip("`") for row in rows(section(6))}
    assert set(table) == set(CacheSettings.__dataclass_fields__)
    for key, shown in table.items():
        value = getattr(settings, key)
        assert shown == ("chosen by the planner" if value is None else str(value))
    says(6, f"each page has {kernels.PAGE_TOKENS} slots", f"64 + 256 = {settings.least_hot_tokens}")
    says(6, f"sets the budget to {options.NAMED_POLICY_HOT_TOKENS:,}")


def test_the_archive() -> None:
    says(5, f"no more than {WHOLE_TOKENS:,} tokens and fit whole")
    says(6, f"in steps of {ARCHIVE_STEP} tokens", f"blocks of {BLOCK_TOKENS} tokens")
    says(6, f"in their {Channels.channels} most important pairs of channels, in 4 bits")
    says(6, f"every {roofline.QUERIES_PER_CHOICE} of its queries", f"one for every {roofline.QUERIES_OF_SHORT_CHUNK};")
    assert CacheSettings().recall_every == 1
    says(6, "again for every token", f"{RECALL_TOKENS:,} unless you say so")
    says(6, f"are read {RECALL_PART_TOKENS:,} tokens at a time", "a tenth of the free space")
    assert (RETRIEVERS_OF_CHOICE, DEFAULT_SHARE) == (("channels", "landmark"), 10)


def test_scorers() -> None:
    table = {row[0].strip("`"): row[1:] for row in rows(section(7))}
    assert tuple(table) == scorer_names()
    for name, (_, observed, pairs) in table.items():
        scorer = find_scorer(name)
        paper = re.search(r"arXiv [\d.]+", scorer.paper)
        assert paper
        assert paper[0] in flowing(section(7))
        assert (int(observed), pairs) == (scorer.observed_queries, "yes" if scorer.needs_pairs else "no")
    says(7, "and is the default")
    assert CacheSettings().scorer == "snapkv"


def test_records_of_weights() -> None:
    tables = rows(section(8))
    records = [row for row in tables if row[0].isdigit()]
    for bits, block, has_min, header, codes, record, share in records:
        form = BlockFormat(int(bits), int(block), has_min == "yes")
        assert form.record_bytes == int(record) == int(header) + int(codes)
        assert form.record_bytes * 8 / (16 * form.block) == float(share)
    carried = {row[0]: row[1:] for row in tables if row[0].startswith("Q")}
    assert set(carried) == set(CARRIED)
    for name, (bits, block, has_min, scales) in carried.items():
        assert CARRIED[name].format == BlockFormat(int(bits), int(block), has_min == "yes")
        assert CARRIED[name].half_factors == scales.startswith("float16")
    assert BlockFormat(8, 32).packed_bytes(151_936, 896) == 144_643_072
    assert (BITS, tuple(FLAVOURS)) == ((4, 8), ("native", "portable"))


def test_the_exercise_in_the_layout() -> None:
    codes = np.zeros((16, 64), dtype=np.uint8)
    codes[3, 37] = 0b11111
    form, scales = BlockFormat(5, 32), np.ones((16, 2), dtype=np.float32)
    packed = np.frombuffer(pack(BlockTensor(form, codes, scales)), dtype=np.uint8)
    record = packed[form.record_bytes :]
    payload = record[32:]
    assert {int(place): int(payload[place]) for place in np.flatnonzero(payload)} == {71: 0b1111, 256 + 7: 0b10}


def test_instruction_sets() -> None:
    named = flowing(section(9)).partition("each instruction set:")[2].partition(" on x86")[0]
    assert set(kernels.variants()) <= set(re.findall(r"`(\w+)`", named))


def test_limits_of_documents() -> None:
    limits = [source.MAX_TEXT_BYTES, html._MAX_HTML_BYTES, source.MAX_FILE_BYTES, archive.MAX_UNPACKED_BYTES]
    assert [row[1] for row in rows(section(11))] == [f"{limit >> 20:,} MiB" for limit in limits]


def test_sampling_options() -> None:
    options = SamplingOptions()
    table = {row[0].split()[0].strip("`").lstrip("-").replace("-", "_"): row[1] for row in rows(section(13))}
    assert set(table) == set(SamplingOptions.__dataclass_fields__)
    for name, shown in table.items():
        value = getattr(options, name)
        assert shown == ("a new one each time" if value is None else f"{value:g}")


@cache
def message_sources() -> str:
    """All our Python, with the pieces of messages that stand on several lines put together."""
    folders = ("cache", "cli", "devices", "export", "runtime")
    code = "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return re.sub(r"""["']\s*\n\s*f?["']""", "", code)


@pytest.mark.parametrize("row", rows(section(14)), ids=lambda row: row[0].strip("`")[:40])
def test_quoted_messages_are_in_the_code(row: list[str]) -> None:
    assert row[0].startswith("`")
    assert row[0].strip("`") in message_sources()


def test_the_message_check_notices() -> None:
    assert "no such message in any file" not in message_sources()


def test_exit_codes() -> None:
    codes = {int(row[0]) for row in rows(section(15)) if row[0].isdigit()}
    assert codes == {0, cli.FAILED, cli.USAGE, cli.STOPPED, cli.PIPE_CLOSED}
    says(15, "128 + 2 and 128 + 13")


def test_keys_of_answers() -> None:
    named = {key for row in rows(section(15)) for key in re.findall(r"`(\w+)`", row[0])}
    usage = set(context.Usage.__dataclass_fields__)
    assert named == usage | {"question", "answer", "model"}
    says(15, *(f"`{key}`" for key in KVUsage(0, 0, 0).to_json()))


def test_errors() -> None:
    named = {row[0].strip("`") for row in rows(section(16))}
    assert named == {name for name in satchel.__all__ if name.endswith("Error")} - {"SatchelError"}
    assert len(named) == 9


def test_benchmark_defaults() -> None:
    says(18, "Three runs of each side are the default", f"decode, over {DECODE_TOKENS} tokens")
    assert DEFAULT_RUNS == 3


# --- Its Python -------------------------------------------------------------------------------------------------


def python_block(number_of_section: int) -> str:
    found = re.search(r"^```python\n(.*?)^```$", section(number_of_section), flags=re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def test_merging_is_exact() -> None:
    names: dict[str, Any] = {}
    exec(python_block(9), names)
    rng = np.random.default_rng(5)
    logits, values = rng.normal(size=20), rng.normal(size=(20, 4))

    def part(rows: slice) -> tuple[float, float, Any]:
        peak = logits[rows].max()
        weights = np.exp(logits[rows] - peak)
        return peak, weights.sum(), weights @ values[rows]

    whole = np.exp(logits) / np.exp(logits).sum() @ values
    np.testing.assert_allclose(names["merge"]([part(slice(0, 7)), part(slice(7, 20))]), whole, rtol=1e-12)
    assert round(float(np.exp(-2)) * 3 + 1.5, 4) == 1.9060
    says(9, "1.9060", "0.1353", "0.4060")


def test_the_example_scorer_works() -> None:
    names: dict[str, Any] = {"__name__": "satchel.cache.scorers.value_norm", "__package__": "satchel.cache.scorers"}
    exec(python_block(17), names)
    scorer = names["ValueNorm"]()
    rng = np.random.default_rng(6)
    keys = rng.normal(size=(2, 9, 4)).astype(np.float32)
    norms = rng.uniform(1, 2, size=(2, 9)).astype(np.float32)
    norms[:, 5] *= 100
    positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    none = np.empty(0, np.int32)
    view = LayerView(keys, norms, positions, np.empty((0, 2, 4), np.float32), none, np.ones(2, np.float32), 0.5)
    scores = scorer.score(view)
    assert (scores.shape, scores.dtype, scores.flags.writeable) == ((2, 9), np.float32, True)
    assert scores.argmax(axis=1).tolist() == [5, 5]
    assert scorer.name not in scorer_names()


# --- The default model itself -----------------------------------------------------------------------------------


@pytest.mark.real
def test_the_default_model_is_as_described(real_model: Callable[[str], Path]) -> None:
    with open_source(real_model(DEFAULT_MODEL)) as opened:
        described = share_embedding(read_model(opened), opened)
        planned = plan_matrices(described, opened, 8)
    spec = described.spec
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_size) == (LAYERS, HEADS, KV_HEADS, HEAD_SIZE)
    assert (spec.vocab, spec.hidden, spec.feed_forward) == (151_936, 896, 4_864)
    assert spec.attention_scale == 0.125
    assert spec.kv_bytes_per_token == 12_288
    assert spec.tied_embeddings
    types: dict[str, list[str]] = {}
    for matrix in planned:
        types.setdefault(matrix.weight.role.rpartition(".")[2], []).append(matrix.source.type_name)
    assert {kind: types["down"].count(kind) for kind in set(types["down"])} == {"Q6_K": 12, "Q4_K": 12}
    for role in ("query", "key", "gate", "up", "attention_output"):
        assert set(types[role]) == {"Q5_0"}
    assert planned[0].packed_bytes == 144_643_072
    assert 0 <= 397_975_552 - sum(matrix.packed_bytes for matrix in planned) < 1 << 20
