"""Which tokens of a step are edited, and with which set of weights. In NumPy, because a step's tokens are few numbers.

`positions/` finds the edited columns of a batch of whole rows, on the device. A server has pieces of requests instead:
some tokens of a request, whose prompts and answers are known. Both ask the same classes (`positions/groups`).

An *index* counts the tokens of a request from 0. A *row* counts those of a step, whose hidden states are (tokens, d).
A *place* is an adapter's number in the tables of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..positions.groups import Group, Turn
from ..positions.index import Sharing, weight_sets
from ..positions.layout import Layout

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NONE = -1
"""Marks a token that is not edited, and a request without an adapter."""

_NEVER = np.iinfo(np.int64).max // 2
"""The index behind an answer that goes on."""

_EMPTY = np.empty(0, dtype=np.int64)

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

    @cached_property
    def numbered(self) -> list[tuple[Group, int]]:
        """The groups, and for each the set of weights of its first slot."""
        found = []
        sets_before = 0
        for group in self.groups:
            found.append((group, sets_before))
            if self.sharing == "position":
                sets_before += group.count or 0
            elif self.sharing == "group":
                sets_before += 1
        return found

    def sets_in(self, spans: Spans, start: int, stop: int) -> Ints:
        """The set of weights that edits each of the tokens `start` to `stop` of a request, -1 for none.

        Args:
            spans: the answers in what the request was given.
            start: index of the first token.
            stop: index behind the last token.
        """
        found = np.full(stop - start, NONE, dtype=np.int64)
        for begin, answer, end in turns_of(spans).T.tolist():
            if begin < stop and end > start:
                turn = Turn(begin=begin, answer=answer, stop=_NEVER, is_first=begin == 0)
                for group, first_set in self.numbered:
                    span = group.span(turn)
                    lower = max(span.lower, begin, start)
                    upper = max(min(span.upper, end, stop), lower)
                    inside = slice(lower - start, upper - start)
                    found[inside] = first_set
                    if self.sharing == "position":
                        found[inside] += np.arange(lower, upper) - span.start
        return found


@dataclass(frozen=True)
class Plans:
    """What the adapters of all places do in one module."""

    distinct: Sequence[ServedPlan]
    """What there is to do. Most adapters do the same as others."""
    of_place: Ints
    """(places,) for each place an index in `distinct`, -1 if its adapter does nothing here."""


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
    ordered = sets[order]  # (n,)
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])  # (n,) whether another set begins
    begins = np.flatnonzero(is_first)  # (s,)
    distinct = ordered[begins]  # (s,)
    counts = np.diff(begins, append=len(sets))  # (s,)
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
class Turns:
    """The turns of several requests, one behind the other. All arrays are (turns,) int64."""

    request: Ints
    """Which of the requests the turn belongs to."""
    begin: Ints
    """The index at which the turn begins, 0 for the first."""
    answer: Ints
    """The index at which the turn's answer begins."""
    end: Ints
    """The index behind the answer."""

    @staticmethod
    def of(turns: Sequence[Ints]) -> Turns:
        """Join what `turns_of` found for each request."""
        counts = [each.shape[1] for each in turns]
        return Turns(np.repeat(np.arange(len(counts)), counts), *np.concatenate([NO_TURNS, *turns], axis=1))


NO_TURNS = np.empty((3, 0), dtype=np.int64)
"""Of a request without an adapter."""


def turns_of(spans: Spans) -> Ints:
    """Read the answers in what a request was given.

    Returns:
        (3, turns): for each turn the index at which it begins, at which its answer begins, and behind the answer. The
        last is one that no request reaches, because that answer goes on with what is generated.
    """
    answers, ends = zip(*spans)
    return np.array([[0, *ends[:-1]], answers, [*ends[:-1], _NEVER]], dtype=np.int64)


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
    turns: Turns
    """The turns of all requests."""

    def by_turn(self, which: NDArray[np.bool_]) -> TurnPieces:
        """Cut pieces where one turn ends and the next begins.

        The answers of a request are from index 4 to 6, and from 9 on. A piece with the indices 2 to 9 is cut in two:

            index  0  1  2  3  4  5  6  7  8  9
            token  u  u  u  u  a  a  a  u  u  a
            piece        1  1  1  1  1  2  2  2

        Args:
            which: (requests,) the requests whose pieces count.
        """
        turns, request = self.turns, self.turns.request
        computed = self.computed[request]  # (turns,)
        first = np.maximum(turns.begin, computed)
        stop = np.minimum(turns.end, computed + self.count[request])
        kept = (first < stop) & which[request]
        request, first = request[kept], first[kept]  # (pieces,) each
        return TurnPieces(
            start=self.start[request] + first - computed[kept],
            count=stop[kept] - first,
            first=first,
            begin=turns.begin[kept],
            answer=turns.answer[kept],
            place=self.place[request],
            scale=self.scale[request],
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


def edited(turns: TurnPieces, plans: Plans, sets_per_place: int) -> tuple[Ints, Ints, Ints]:
    """Find the edited tokens of a step in one module. What is not edited costs nothing.

    Args:
        turns: the pieces that may be edited.
        plans: what the adapters do in the module.
        sets_per_place: the adapter at place n has the sets of weights from `n * sets_per_place` on.

    Returns:
        The rows of the edited tokens in the step, the set of weights of each, and the index of its piece; (n,) each.
    """
    ends = turns.first + turns.count  # (pieces,)
    of_piece = plans.of_place[turns.place]  # (pieces,)
    rows, sets, pieces = [_EMPTY], [_EMPTY], [_EMPTY]
    for number in np.unique(of_piece[of_piece != NONE]).tolist():  # adapters that do the same are looked at together
        plan = plans.distinct[number]
        own = np.flatnonzero(of_piece == number)  # (own,)
        first, stop, begin, answer = (each[own] for each in (turns.first, ends, turns.begin, turns.answer))
        has_answers = (stop > answer).any()
        has_prompts = (first < answer).any()
        turn = Turn(begin=begin, answer=answer, stop=np.full_like(first, _NEVER), is_first=begin == 0)
        for group, first_set in plan.numbered:
            may_edit = has_answers if group.decodes else has_prompts
            if not may_edit:
                continue
            span = group.span(turn)  # (own,) each
            lower = np.maximum(span.lower, first)
            counts = np.maximum(np.minimum(span.upper, stop) - lower, 0)
            inside = np.repeat(np.arange(len(own)), counts)  # (n,) of each edited token
            index = lower[inside] + _count_up(counts)
            piece = own[inside]
            rows.append(turns.start[piece] + index - first[inside])
            of_adapter: Ints | int = first_set
            if plan.sharing == "position":
                of_adapter = first_set + index - np.broadcast_to(span.start, len(own))[inside]
            sets.append(turns.place[piece] * sets_per_place + of_adapter)
            pieces.append(piece)
    return np.concatenate(rows), np.concatenate(sets), np.concatenate(pieces)
