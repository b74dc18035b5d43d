"""Which tokens of a step are edited, and with which set of weights. NumPy alone: a step's tokens are few numbers.

`positions/` resolves a batch of whole rows to columns, on the device. A server sees pieces of requests instead: some
tokens from an index on, of a request whose prompts and answers are known. The rules are the same, told token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..positions.groups import Turn
from ..positions.index import Sharing, weight_sets
from ..positions.layout import Layout

Ints = NDArray[np.int64]

NONE = -1
"""Marks a token that is not edited, and a request without an adapter."""


_NEVER = np.iinfo(np.int64).max // 2
"""Place behind the last token of an answer that goes on."""


@dataclass(frozen=True)
class ServedPlan:
    """Where one adapter edits in one module, and which tokens share weights."""

    groups: Layout
    sharing: Sharing

    @property
    def edits_answers(self) -> bool:
        """Whether any generated token is edited."""
        return any(group.decodes for group in self.groups)

    @property
    def sets(self) -> int:
        """How many sets of weights it has."""
        return weight_sets(self.groups, self.sharing)

    def set_of(self, index: Ints, begin: Ints, answer: Ints) -> Ints:
        """Which of its sets of weights edits each token, -1 for none.

        Args:
            index: (n,) place of each token in its request, 0 for the first.
            begin: (n,) place where the turn that the token belongs to begins: a prompt, and the answer behind it.
            answer: (n,) place where the turn's answer begins.
        """
        turn = Turn(begin=begin, answer=answer, stop=np.full_like(index, _NEVER), is_first=begin == 0)  # (n,) each
        found = np.full_like(index, NONE)  # (n,)
        sets_before = 0
        for group in self.groups:
            span = group.span(turn)
            inside = (index >= span.lower) & (index < span.upper)  # (n,)
            chosen = sets_before + (index - span.start if self.sharing == "position" else np.zeros_like(index))
            found = np.where(inside, chosen, found)
            if self.sharing != "all":
                sets_before += weight_sets(Layout((group,)), self.sharing)
        return found


@dataclass(frozen=True)
class Work:
    """Edited tokens arranged so that each row of `rows` is computed with one set of weights."""

    sets: Ints
    """(e,) which set of weights."""
    rows: Ints
    """(e, t) which of the step's tokens; an empty place repeats token 0."""
    kept: NDArray[np.bool_]
    """(e, t, 1): False at an empty place."""


def arrange(rows: Ints, sets: Ints) -> Work:
    """Tokens by their sets of weights.

    Rows of one width t waste places where sets have different numbers of tokens. A set with more than the average
    takes several rows instead, so that no more than half of all places are empty.

    Args:
        rows: (n,) which of the step's tokens, n >= 1.
        sets: (n,) the set that edits each.
    """
    order = np.argsort(sets, kind="stable")
    distinct, counts = np.unique(sets, return_counts=True)
    width = -(-len(rows) // len(distinct))
    pieces = -(-counts // width)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    row = np.repeat(np.cumsum(pieces) - pieces, counts) + within // width
    grid = np.zeros((pieces.sum(), width), dtype=np.int64)
    kept = np.zeros((*grid.shape, 1), dtype=np.bool_)
    grid[row, within % width] = rows[order]
    kept[row, within % width] = True
    return Work(np.repeat(distinct, pieces), grid, kept)


Spans = Sequence[tuple[int, int]]
"""The answers in what a request was given, each from its first token to behind its last; the last one goes on."""


@dataclass(frozen=True)
class Pieces:
    """The requests of a step, of each a piece: `count` tokens from `computed` on. Arrays are (requests,) int64."""

    start: Ints
    """Which of the step's tokens is the first of the piece."""
    count: Ints
    computed: Ints
    """How many tokens of the request came before."""
    prompt: Ints
    """How many tokens the request was given."""
    slot: Ints
    """The adapter that the request chose, -1 for none."""
    answers: Sequence[Spans]

    def __getitem__(self, which: NDArray[np.bool_]) -> Pieces:
        return Pieces(
            start=self.start[which],
            count=self.count[which],
            computed=self.computed[which],
            prompt=self.prompt[which],
            slot=self.slot[which],
            answers=[spans for spans, chosen in zip(self.answers, which) if chosen],
        )

    def by_turn(self) -> Turns:
        """The pieces cut where one turn ends and the next begins."""
        found: list[tuple[int, ...]] = []
        columns = (self.start.tolist(), self.count.tolist(), self.computed.tolist(), self.slot.tolist(), self.answers)
        for start, count, computed, slot, spans in zip(*columns):
            stop = computed + count
            begin = 0
            for number, (answer, end) in enumerate(spans):
                turn_ends = stop if number == len(spans) - 1 else min(end, stop)
                first = max(begin, computed)
                if first < turn_ends:
                    found.append((start + first - computed, turn_ends - first, first, begin, answer, slot))
                begin = end
        return Turns(*np.array(found, dtype=np.int64).reshape(-1, 6).T)


@dataclass(frozen=True)
class Turns:
    """Pieces of a step, none with tokens of two turns. All (pieces,) int64."""

    start: Ints
    """Which of the step's tokens is the first of the piece."""
    count: Ints
    computed: Ints
    """How many tokens of the request came before."""
    begin: Ints
    """Place in the request where the turn begins, 0 for the first."""
    answer: Ints
    """Place in the request where the turn's answer begins."""
    slot: Ints


def edited(turns: Turns, plans: Sequence[ServedPlan | None], sets_per_slot: int) -> tuple[Ints, Ints, Ints]:
    """The edited tokens of a step in one module.

    Args:
        turns: those of the step that may be edited.
        plans: what the adapter in each slot does in the module, None for nothing.
        sets_per_slot: weights of slot n begin at set n * `sets_per_slot`.

    Returns:
        Which of the step's tokens, the set of weights for each, and its slot; all (n,).
    """
    place = np.arange(turns.count.sum()) - np.repeat(np.cumsum(turns.count) - turns.count, turns.count)
    rows, index, begin, answer, slot = (
        np.repeat(values, turns.count)
        for values in (turns.start, turns.computed, turns.begin, turns.answer, turns.slot)
    )
    rows, index = rows + place, index + place
    sets = np.full_like(rows, NONE)
    by_plan: dict[ServedPlan, list[int]] = {}
    for chosen in np.unique(turns.slot):
        if (plan := plans[chosen]) is not None:
            by_plan.setdefault(plan, []).append(int(chosen))
    for plan, slots in by_plan.items():
        own = np.isin(slot, slots)
        of_plan = plan.set_of(index[own], begin[own], answer[own])
        sets[own] = np.where(of_plan == NONE, NONE, of_plan + slot[own] * sets_per_slot)
    kept = sets != NONE
    return rows[kept], sets[kept], slot[kept]


def same_plans(
    modules: Iterable[str], plans: Sequence[dict[str, ServedPlan]]
) -> dict[tuple[ServedPlan | None, ...], list[str]]:
    """Modules by what the adapters do there: those alike share a step's arrangement.

    Args:
        modules: names of all edited modules.
        plans: for each slot, module -> what its adapter does there; a module that is not there is not edited.
    """
    found: dict[tuple[ServedPlan | None, ...], list[str]] = {}
    for module in modules:
        found.setdefault(tuple(of_slot.get(module) for of_slot in plans), []).append(module)
    return found
