"""From one number, the memory limit of the process, to how a document is read: every byte counted beforehand.

The decision, for the policy ``auto``, is by quality first and speed second:

1. **The whole cache** as floats, for texts of up to `WHOLE_TOKENS` tokens, when it fits.
2. Else a small hot tier and an **archive** of everything that leaves it. An 8-bit archive loses next to nothing and
   costs only its digests in RAM when it lies on flash, so the best codec is kept as long as there is any place for it:
   all of it in RAM (``warm``); else what fits there, the rest on disk (``mixed``, or ``cold`` when nothing does).
   Then the next smaller codec, in the same order; and where the digests alone are too much, smaller ones.
3. Else an error that names the smallest limit which would do.

The hot tier takes the roomiest rung of one ladder that fits: 64 sinks and a window of 1,024, both shrinking together
down to 16 and 112; the chunk is the largest of `CHUNKS` that the window is as long as, or half of it. Below the last
rung there is one of a window of 80 and 32 tokens at a time. Recalled tokens,
4,096, hardly cost memory and do not shrink. What a person sets stays as it is.

``budget_bytes`` bounds hot pages, warm pages, digests and recalled tokens of a conversation together, however large
the memory is. A fork shares all of it but the hot pages it comes to have of its own: the limit of the process has room
for those of one.

All this is about layers that see everything. Those with a window hold their window, whatever the text's length and the
plan, and no scorer's budget that is larger touches them: `WindowCost`. Where all layers have one there is no archive.
A scorer's name as the policy keeps a budget and forgets the rest (``pruned``): no archive. One that ranks after reading
(``compiled``) needs the memory of the whole cache until then: `compiled_plan`.

`plan` has the records, `hot` plans without an archive, `archive` those with one.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import MemoryLimitError
from ..sizes import format_size
from .archive import archive_needs, archive_plan
from .explain import why
from .hot import full_plan, hot_need, pruned_plan
from .plan import (
    CHUNKS,
    MARGIN_BYTES,
    MARGIN_SHARE,
    PIECE_TOKENS,
    WHOLE_TOKENS,
    ArchiveCost,
    Costs,
    Need,
    Placement,
    Plan,
    Prediction,
    Room,
    WindowCost,
    Wishes,
)

NEXT_TIME_BYTES = 2 << 20  # more than now: the same program does not always take the same

__all__ = [
    "CHUNKS",
    "MARGIN_BYTES",
    "MARGIN_SHARE",
    "PIECE_TOKENS",
    "WHOLE_TOKENS",
    "ArchiveCost",
    "Costs",
    "Placement",
    "Plan",
    "Prediction",
    "WindowCost",
    "Wishes",
    "compiled_plan",
    "make_plan",
    "why",
]


def make_plan(
    costs: Costs,
    limit_bytes: int,
    *,
    tokens: int,
    least_hot_tokens: int,
    wishes: Wishes = Wishes(),  # noqa: B008 (frozen)
    keep_everything: bool = False,
    longest_tokens: int = 0,
    archive: bool = False,
    disk_bytes: int = 0,
) -> Plan:
    """The best way to read ``tokens`` inside ``limit_bytes``; see the module's text for what is best.

    Args:
        tokens: of the text, and of the questions and answers that there must be room for.
        least_hot_tokens: of a budget that forgets: sinks and window.
        wishes: what a person set.
        keep_everything: policy ``full``: the whole cache or an error.
        longest_tokens: how far a conversation may grow; room for it is made as far as there is any.
        archive: whether what leaves the hot tier is kept (if any layer sees everything); else a budget forgets it.
        disk_bytes: what the archive may take on disk; 0: it stays in RAM.

    Raises:
        MemoryLimitError: not even the smallest way fits; the message and ``smallest_bytes`` have the smallest limit
            that would (of the budget, when that is what is too small).
    """
    archives = archive and costs.kv_bytes_per_page > 0
    room = Room(limit_bytes, wishes.budget_bytes)
    chunks = (wishes.chunk,) if wishes.chunk else CHUNKS
    unscored = replace(costs, scoring_bytes_per_token=0)
    whole_costs = unscored if keep_everything or archive else costs
    whole = hot_need(whole_costs, tokens, wishes)
    plan = None
    whole_fits_best = keep_everything or not archives or tokens <= WHOLE_TOKENS
    if wishes.hot_tokens is None and whole_fits_best:
        plan = full_plan(whole_costs, room, tokens, longest_tokens, chunks)
    if plan is None and not keep_everything:
        if archives:
            plan = archive_plan(costs, room, tokens, longest_tokens, wishes, disk_bytes)
        else:
            plan = pruned_plan(costs, room, least_hot_tokens, wishes, chunks)
    if plan is not None:
        return replace(plan, full_limit_bytes=whole.limit_bytes, is_long=not whole_fits_best)
    if keep_everything:
        needs = [whole]
    elif archives:
        needs = archive_needs(costs, tokens, wishes, disk_bytes)
    else:
        pruned = (wishes.hot_tokens or least_hot_tokens) + chunks[-1]
        needs = [hot_need(costs, pruned, wishes, pruned=True)]
    if not keep_everything and wishes.hot_tokens is None and whole_fits_best:
        needs.append(whole)
    remedy = _remedy(wishes, keep_everything=keep_everything, archive=archives)
    raise _refusal(room, needs, f"{tokens:,} tokens of text, questions and answers with this model", remedy)


def compiled_plan(costs: Costs, limit_bytes: int, *, tokens: int, wishes: Wishes, after: Plan) -> Plan:
    """How ``tokens`` (the text, and what is read to rank its pairs) are held, all of them hot, until the budget of the
    plan ``after`` is left of them. ``rows`` and ``kv_limit_bytes`` are of the time before that, ``hot_tokens`` is of
    that after it.

    ``budget_bytes`` bounds what is left only.

    Raises:
        MemoryLimitError: there is no room for so many tokens; the message and ``smallest_bytes`` have the limit.
    """
    windows = tuple(replace(each, marked_tokens=each.held_tokens) for each in costs.windows)
    costs, room = replace(costs, windows=windows), Room(limit_bytes)
    chunks = (wishes.chunk,) if wishes.chunk else CHUNKS
    plan = full_plan(costs, room, tokens, 0, chunks)
    if plan is None:
        task = f"{tokens:,} tokens with this model, all of which are held until they are compiled"
        need = hot_need(costs, tokens, replace(wishes, budget_bytes=None))
        raise _refusal(room, [need], task, "use another policy (what is compiled already opens in less)")
    return replace(plan, placement="compiled", hot_tokens=after.hot_tokens, full_limit_bytes=after.full_limit_bytes)


def _remedy(wishes: Wishes, *, keep_everything: bool, archive: bool) -> str:
    if keep_everything:
        return "leave out --policy full"
    if wishes.hot_tokens is not None:
        return "lower --kv hot_tokens"
    return "give --disk more, or take a smaller model" if archive else "take a smaller model"


def _refusal(room: Room, needs: list[Need], task: str, remedy: str) -> MemoryLimitError:
    """Names what is too small: the limit of the process, the budget of the KV cache within it, or both."""
    budget = room.budget_bytes
    affordable = [need.limit_bytes for need in needs if budget is None or need.kv_bytes <= budget]
    budgets = [need.kv_bytes for need in needs if need.limit_bytes <= room.limit_bytes]
    if not affordable and budgets and budget is not None:
        least = min(budgets)
        return MemoryLimitError(
            f"kv budget_bytes={format_size(budget)} is too little for {task}: "
            f"{format_size(least, round_up=True)} would do; raise it or {remedy}",
            smallest_bytes=least,
        )
    least = min(affordable or [need.limit_bytes for need in needs])
    also = ""
    if not affordable:
        kv_bytes = min(need.kv_bytes for need in needs if need.limit_bytes == least)
        also = f" (with kv budget_bytes={format_size(kv_bytes, round_up=True)})"
    return MemoryLimitError(
        f"{format_size(room.limit_bytes)} of memory is too little for {task}: "
        f"{format_size(least + NEXT_TIME_BYTES, round_up=True)} would do{also}; raise --memory or {remedy}",
        smallest_bytes=least,
    )
