"""Which tokens of a step are edited, and with which set of weights. In NumPy, because a step's tokens are few numbers.

`positions/` finds the edited columns of a batch of whole rows, on the device. A server has pieces of requests instead:
some tokens of a request, whose prompts and answers are known. Both ask the same classes (`positions/groups`).

An *index* counts the tokens of a request from 0. A *row* counts those of a step, whose hidden states are (tokens, d).
A *place* is an adapter's number in the tables of weights.
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
Floats = NDArray[np.float64]

NONE = -1
"""Marks a token that is not edited, and a request without an adapter."""

_NEVER = np.iinfo(np.int64).max // 2
"""The index behind an answer that goes on."""

Spans = Sequence[tuple[int, int]]
"""The answers in what a request was given: for each the index of its first token, and the index behind its last. The
last answer goes on with what is generated."""


@dataclass(frozen=True)
class ServedPlan:
    """What one adapter does in one module: which tokens it edits, and how they share weights."""

    groups: Layout
    sharing: Sharing

    @property
    def edits_answers(self) -> bool:
        """Whether any generated token is edited."""
        return any(group.decodes for group in self.groups)

    @property
    def sets(self) -> int:
        """The number of sets of weights."""
        return weight_sets(self.groups, self.sharing)

    def set_of(self, index: Ints, begin: Ints, answer: Ints) -> Ints:
        """Find the set of weights that edits each token.

        Args:
            index: (n,) index of each token in its request.
            begin: (n,) index at which the token's turn begins, which is a prompt and the answer behind it.
            answer: (n,) index at which the turn's answer begins.

        Returns:
            (n,) numbers of sets, -1 for tokens that are not edited.
        """
        stop = np.full_like(index, _NEVER)
        turn = Turn(begin=begin, answer=answer, stop=stop, is_first=begin == 0)  # (n,) each
        in_answer = index >= answer  # (n,)
        has_answers = in_answer.any()
        has_prompts = not in_answer.all()
        found = np.full_like(index, NONE)
        sets_before = 0
        for group in self.groups:
            # Most steps decode: then the groups of the prompt have no tokens.
            may_edit = has_answers if group.decodes else has_prompts
            if may_edit:
                span = group.span(turn)
                inside = (index >= span.lower) & (index < span.upper)  # (n,)
                chosen: Ints | int = sets_before
                if self.sharing == "position":
                    chosen = sets_before + index - span.start  # (n,)
                found = np.where(inside, chosen, found)
            if self.sharing == "position":
                sets_before += group.count or 0
            elif self.sharing == "group":
                sets_before += 1
        return found


@dataclass(frozen=True)
class Work:
    """The edited tokens of a step in a grid of e lines. One set of weights edits all tokens of a line."""

    sets: Ints
    """(e,) the set of weights of each line."""
    rows: Ints
    """(e, t) the rows of the tokens; 0 if there is none."""
    valid: NDArray[np.bool_]
    """(e, t, 1) whether there is a token."""
    scale: NDArray[np.float32] | None
    """(e, t, 1) what multiplies the edit of each token; None if all are 1."""


def group_by_weights(rows: Ints, sets: Ints, scale: Floats) -> Work:
    """Group edited tokens by the set of weights that edits them.

    All lines of the grid have the same width: the average number of tokens in a set, rounded up. A set with more
    tokens takes several lines, so at least about half of the grid is filled.

        rows  3 4 5 6 7 8 9        grid      valid     sets
        sets  2 0 2 2 0 2 2   →    4 7 0 0   1 1 0 0   0
                                   3 5 6 8   1 1 1 1   2
                                   9 0 0 0   1 0 0 0   2

    Args:
        rows: (n,) the rows of the tokens, n >= 1.
        sets: (n,) the set of weights of each.
        scale: (n,) what multiplies its edit.
    """
    order = np.argsort(sets, kind="stable")  # (n,)
    distinct, counts = np.unique(sets, return_counts=True)  # (s,) each
    width = -(-len(rows) // len(distinct))  # rounded up
    heights = -(-counts // width)  # (s,) how many lines each set takes, rounded up
    first = np.cumsum(heights) - heights  # (s,) the first of them
    rank = _count_up(counts)  # (n,)
    line = np.repeat(first, counts) + rank // width  # (n,)
    column = rank % width  # (n,)
    grid = np.zeros((heights.sum(), width), dtype=np.int64)
    valid = np.zeros((*grid.shape, 1), dtype=np.bool_)
    grid[line, column] = rows[order]
    valid[line, column] = True
    scales: NDArray[np.float32] | None = None
    if (scale != 1).any():
        scales = np.ones(valid.shape, dtype=np.float32)
        scales[line, column, 0] = scale[order]
    return Work(sets=np.repeat(distinct, heights), rows=grid, valid=valid, scale=scales)


def _count_up(counts: Ints) -> Ints:
    """Count from 0 as often as each entry says: 3, 1, 2 gives 0, 1, 2, 0, 0, 1."""
    before = np.cumsum(counts) - counts
    ranks: Ints = np.arange(counts.sum()) - np.repeat(before, counts)
    return ranks


@dataclass(frozen=True)
class Pieces:
    """The requests of a step. Each has a piece in it: `count` tokens from index `computed` on.

    All arrays are (requests,), int64 but for `scale`, which is float64.
    """

    start: Ints
    """The row of the piece's first token in the step."""
    count: Ints
    """How many tokens the piece has."""
    computed: Ints
    """How many tokens of the request came in earlier steps."""
    given: Ints
    """How many tokens the request was given."""
    place: Ints
    """The place of the request's adapter, -1 for none."""
    scale: Floats
    """What multiplies the adapter's edits."""
    answers: Sequence[Spans]
    """The answers in what each request was given."""

    def __getitem__(self, which: NDArray[np.bool_]) -> Pieces:
        """The requests for which `which` (requests,) is True."""
        return Pieces(
            start=self.start[which],
            count=self.count[which],
            computed=self.computed[which],
            given=self.given[which],
            place=self.place[which],
            scale=self.scale[which],
            answers=[spans for spans, chosen in zip(self.answers, which) if chosen],
        )

    def by_turn(self) -> TurnPieces:
        """Cut the pieces where one turn ends and the next begins.

        The answers of a request are from index 4 to 6, and from 9 on. A piece with the indices 2 to 9 is cut in two:

            index  0  1  2  3  4  5  6  7  8  9
            token  u  u  u  u  a  a  a  u  u  a
            piece        1  1  1  1  1  2  2  2
        """
        found: list[tuple[int, int, int, int, int, int]] = []
        lists = [array.tolist() for array in (self.start, self.count, self.computed)]
        for request, (start, count, computed, spans) in enumerate(zip(*lists, self.answers)):
            piece_ends = computed + count
            begin = 0
            for number, (answer, end) in enumerate(spans):
                is_last = number == len(spans) - 1
                stop = piece_ends if is_last else min(end, piece_ends)
                first = max(begin, computed)
                if first < stop:
                    found.append((start + first - computed, stop - first, first, begin, answer, request))
                begin = end
        columns = np.array(found, dtype=np.int64).reshape(-1, 6).T
        return TurnPieces(
            start=columns[0],
            count=columns[1],
            first=columns[2],
            begin=columns[3],
            answer=columns[4],
            place=self.place[columns[5]],
            scale=self.scale[columns[5]],
        )


@dataclass(frozen=True)
class TurnPieces:
    """Pieces of a step that have tokens of one turn each. All arrays are (pieces,), int64 but for `scale`."""

    start: Ints
    """The row of the piece's first token in the step."""
    count: Ints
    """How many tokens the piece has."""
    first: Ints
    """The index of its first token in the request."""
    begin: Ints
    """The index at which the turn begins, 0 for the first."""
    answer: Ints
    """The index at which the turn's answer begins."""
    place: Ints
    """The place of the request's adapter."""
    scale: Floats
    """What multiplies the adapter's edits."""


def edited(turns: TurnPieces, plans: Sequence[ServedPlan | None], sets_per_place: int) -> tuple[Ints, Ints, Ints]:
    """Find the edited tokens of a step in one module.

    Args:
        turns: the pieces that may be edited.
        plans: for each place what its adapter does in the module, None for nothing.
        sets_per_place: the adapter at place n has the sets of weights from `n * sets_per_place` on.

    Returns:
        The rows of the edited tokens in the step, the set of weights of each, and the index of its piece; (n,) each.
    """
    rank = _count_up(turns.count)  # (tokens,) of each token in its piece
    rows = np.repeat(turns.start, turns.count) + rank
    index = np.repeat(turns.first, turns.count) + rank
    begin = np.repeat(turns.begin, turns.count)
    answer = np.repeat(turns.answer, turns.count)
    piece = np.repeat(np.arange(len(turns.count)), turns.count)
    place = turns.place[piece]

    # Adapters that do the same are looked at together.
    places_of: dict[ServedPlan, list[int]] = {}
    for each in np.unique(turns.place).tolist():
        plan = plans[each]
        if plan is not None:
            places_of.setdefault(plan, []).append(each)

    sets = np.full_like(rows, NONE)
    for plan, places in places_of.items():
        own = np.isin(place, places)  # (tokens,)
        of_adapter = plan.set_of(index=index[own], begin=begin[own], answer=answer[own])
        of_table = of_adapter + place[own] * sets_per_place
        sets[own] = np.where(of_adapter == NONE, NONE, of_table)
    is_edited = sets != NONE
    return rows[is_edited], sets[is_edited], piece[is_edited]


def same_plans(
    modules: Iterable[str], plans: Sequence[dict[str, ServedPlan]]
) -> dict[tuple[ServedPlan | None, ...], list[str]]:
    """Group modules in which every adapter does the same: a step is prepared once for all of them.

    Args:
        modules: the names of all edited modules.
        plans: for each place, from a module's name to what the adapter does there. A module that is missing is not
            edited.

    Returns:
        From what the adapters do, place by place, to the names of the modules.
    """
    found: dict[tuple[ServedPlan | None, ...], list[str]] = {}
    for module in modules:
        of_places = tuple(of_place.get(module) for of_place in plans)
        found.setdefault(of_places, []).append(module)
    return found
