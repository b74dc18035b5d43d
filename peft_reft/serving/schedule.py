"""Which tokens of a step are edited, and with which set of weights. NumPy alone: a step's tokens are few numbers.

`positions.py` resolves a batch of whole rows to columns, on the device. A server sees pieces of requests instead: so
many tokens from such an index on, of a prompt of known length. Here the rules are the same, told token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..positions.index import Arrangement
from ..positions.spec import Group, Layout

Ints = NDArray[np.int64]

NONE = -1
"""Marks a token that is not edited, and a request without an adapter."""


@dataclass(frozen=True)
class Plan:
    """Where one adapter edits in one module, and which tokens share weights."""

    groups: Layout
    by: Arrangement

    @property
    def edits_answers(self) -> bool:
        """Whether any generated token is edited."""
        return any(group.kind == "g" for group in self.groups)

    @property
    def sets(self) -> int:
        """How many sets of weights it has."""
        if self.by == "position":
            return sum(group.count or 0 for group in self.groups)
        return len(self.groups) if self.by == "group" else 1

    def set_of(self, index: Ints, prompt: Ints) -> Ints:
        """Which of its sets of weights edits each token, -1 for none.

        Args:
            index: (n,) place of each token in its request, 0 for the prompt's first.
            prompt: (n,) length of the prompt that the token belongs to, or follows.
        """
        found = np.full_like(index, NONE)
        before = 0
        for number, group in enumerate(self.groups):
            place, inside = _place(group, index, prompt)
            chosen: Ints | int = before + place if self.by == "position" else number if self.by == "group" else 0
            found = np.where(inside, chosen, found)
            before += group.count or 0
        return found


def _place(group: Group, index: Ints, prompt: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The slot of the group that each token fills, and whether it fills one."""
    if group.kind == "p":
        return index, index < prompt
    if group.kind == "g":
        place = index - prompt
        return place, (place >= 0) & (place < (np.inf if group.count is None else group.count))
    length = np.maximum(prompt - group.skip, 0)
    short = length < group.p + group.s  # the paper's rule: half of a short prompt each, the last token always counts
    if group.kind == "f":
        return index, index < np.where(short, np.minimum(group.p, length // 2), group.p)
    kept = np.where(short, np.minimum(group.s, (length + 1) // 2), group.s)
    return index - (length - group.s), (index >= length - kept) & (index < length)


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


@dataclass(frozen=True)
class Pieces:
    """The requests of a step, of each a piece: `count` tokens from `computed` on. All (requests,) int64."""

    start: Ints
    """Which of the step's tokens is the first of the piece."""
    count: Ints
    computed: Ints
    """How many tokens of the request came before."""
    prompt: Ints
    """Length of the request's prompt."""
    slot: Ints
    """The adapter that the request chose, -1 for none."""

    def __getitem__(self, which: NDArray[np.bool_]) -> Pieces:
        return Pieces(self.start[which], self.count[which], self.computed[which], self.prompt[which], self.slot[which])


def edited(pieces: Pieces, plans: Sequence[Plan | None], sets_per_slot: int) -> tuple[Ints, Ints, Ints]:
    """The edited tokens of a step in one module.

    Args:
        pieces: the requests of the step that may be edited.
        plans: what the adapter in each slot does in the module, None for nothing.
        sets_per_slot: weights of slot n begin at set n * `sets_per_slot`.

    Returns:
        Which of the step's tokens, the set of weights for each, and its slot; all (n,).
    """
    place = np.arange(pieces.count.sum()) - np.repeat(np.cumsum(pieces.count) - pieces.count, pieces.count)
    rows, index, prompt, slot = (
        np.repeat(values, pieces.count) for values in (pieces.start, pieces.computed, pieces.prompt, pieces.slot)
    )
    rows, index = rows + place, index + place
    sets = np.full_like(rows, NONE)
    by_plan: dict[Plan, list[int]] = {}
    for chosen in np.unique(pieces.slot):
        if (plan := plans[chosen]) is not None:
            by_plan.setdefault(plan, []).append(int(chosen))
    for plan, slots in by_plan.items():
        own = np.isin(slot, slots)
        of_plan = plan.set_of(index[own], prompt[own])
        sets[own] = np.where(of_plan == NONE, NONE, of_plan + slot[own] * sets_per_slot)
    kept = sets != NONE
    return rows[kept], sets[kept], slot[kept]


def same_plans(modules: Iterable[str], plans: Sequence[dict[str, Plan]]) -> dict[tuple[Plan | None, ...], list[str]]:
    """Modules by what the adapters do there: those alike share a step's arrangement.

    Args:
        modules: names of all edited modules.
        plans: for each slot, module -> what its adapter does there; a module that is not there is not edited.
    """
    found: dict[tuple[Plan | None, ...], list[str]] = {}
    for module in modules:
        found.setdefault(tuple(of_slot.get(module) for of_slot in plans), []).append(module)
    return found
