"""From the tokens of a batch to its prompts and answers, and from these to token columns.

Everything here is index arithmetic on tensors: no loops over rows, and one host read at most (to learn how many
answers a row holds), which a caller who knows that number avoids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import Int
from .groups import Turn
from .layout import NO_POSITION, Layout
from .marks import Marks, find_headers

IGNORED = -100
"""The label of a token that is not trained on."""


@dataclass(frozen=True)
class Turns:
    """The prompts and answers of a batch, told at its columns. Tensors of shape (batch, seq).

    A *rank* counts the real tokens of a row from 1; 0 means "before the first". Padding has no rank of its own, so
    nothing ever lands on it, whichever side it is on. A *document* is what a row holds, or one of several that are
    packed into it. Each of its answers has a prompt: what stands between the answer before and this one.
    """

    rank: Tensor
    """int64: rank of each real token; a padding token repeats the rank before it."""
    real: Tensor
    """bool."""
    begins: Tensor
    """bool, True at the first token of each document."""
    starts: Tensor
    """int64: rank before the first token of the token's document."""
    length: Tensor
    """int64: number of tokens of the token's document."""
    answer: Tensor
    """bool: whether the token belongs to an answer."""
    event: Tensor
    """bool, True at one column for each answer."""
    end: Tensor
    """int64, where `event`: rank of the last token before the answer."""
    answered: Tensor
    """int64, where `event`: answers' tokens of the row before this answer."""
    marked: Tensor
    """bool: whether the token's document has a response template."""
    instructs: Tensor
    """bool, True at the first token of an instruction template."""
    spans: Tensor
    """int64: how many spans of labels the token's document has."""

    def answers(self, count: int | None = None) -> Answers:
        """Gather the answers of each row side by side.

        Args:
            count: most answers in a row, if the caller knows it; else it is read from the batch: one host read.
        """
        order = self.event.cumsum(1)  # (batch, seq)
        if count is None:
            count = max(1, int(order[:, -1].amax()))
        wanted = torch.arange(1, count + 1, device=order.device).expand(order.shape[0], count)
        at = torch.searchsorted(order, wanted.contiguous())  # (batch, K): column of each answer's event
        exists = at < order.shape[1]
        at = at.clamp_max(order.shape[1] - 1)

        def take(values: Tensor) -> Tensor:
            """(batch, K) of (batch, seq)."""
            return torch.where(exists, values.gather(1, at), 0)

        # All tokens of answers between one event and the next belong to the first of the two.
        total = (self.answer & self.real).sum(1, keepdim=True)  # (batch, 1)
        answered = torch.where(exists, self.answered.gather(1, at), total)
        tokens = torch.cat([answered[:, 1:], total], 1) - answered  # (batch, K): length of each answer
        ends, starts = take(self.end), take(self.starts)
        stops = torch.where(exists, ends + tokens, 0)
        same_document = starts[:, 1:] == starts[:, :-1]
        first = exists & torch.cat([torch.ones_like(exists[:, :1]), ~same_document], 1)
        stop_before = torch.cat([starts[:, :1], stops[:, :-1]], 1)
        return Answers(
            rank=self.rank,
            real=self.real,
            answer=self.answer,
            ends=ends,
            starts=starts,
            lower=torch.where(first, starts, stop_before),
            first=first,
            stops=stops,
        )


@dataclass(frozen=True)
class Answers:
    """The answers of a batch side by side, K a row. Shapes (batch, K), ranks, if not said otherwise."""

    rank: Tensor
    """(batch, seq), as in `Turns`."""
    real: Tensor
    """(batch, seq) bool."""
    answer: Tensor
    """(batch, seq) bool: whether the token belongs to an answer."""
    ends: Tensor
    """Rank of the last token before the answer: the end of its prompt."""
    starts: Tensor
    """Rank before the first token of the answer's document."""
    lower: Tensor
    """Rank before the first token of the answer's prompt."""
    first: Tensor
    """bool: whether this is the first answer of its document."""
    stops: Tensor
    """Rank of the answer's last token; `ends` if it is empty."""


def find_turns(
    real: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    ids: Tensor | None = None,
    marks: Marks | None = None,
    answer_at: Tensor | None = None,
) -> Turns:
    """Find the prompts and answers of a batch.

    Each document is read by the first of these that says something of it:

    - `answer_at`, and the marks of the chat template together with it;
    - the labels: the answer begins at the first supervised token and runs to the document's end;
    - nothing: the document is a prompt, and its answer begins behind it.

    An answer begins behind a response template, or at `answer_at`, and ends where an instruction template begins. A
    response template inside an answer changes nothing.

    Args:
        real: (batch, seq) bool, False on padding.
        labels: (batch, seq) int64, -100 where unsupervised, or None.
        position_ids: (batch, seq) int64, or None; a real token with position 0 begins a new document (packing).
        ids: (batch, seq) int64 token ids, needed with `marks`.
        marks: of the chat template, or None.
        answer_at: (batch, seq) bool, True at a token that is known to be an answer's first, or None.
    """
    rank = real.cumsum(1)
    begins = real & (rank == 1)
    if position_ids is not None:
        begins = begins | (real & (position_ids == 0))
    document = begins.cumsum(1)  # 1-based number of the token's document; 0 before the first
    starts = torch.where(begins, rank - 1, 0).cummax(1).values
    n_documents = real.shape[1] + 1

    def per_document(values: Tensor) -> Tensor:
        """Sum `values` (batch, seq) over each document and give every token its document's sum."""
        sums = torch.zeros(values.shape[0], n_documents, dtype=torch.long, device=values.device)
        return sums.scatter_add(1, document, values.long()).gather(1, document)

    begins_answer = torch.zeros_like(real) if answer_at is None else real & answer_at
    spans = torch.zeros_like(rank)
    if labels is not None:
        supervised = real & (labels != IGNORED)
        column = torch.arange(real.shape[1], device=real.device).expand_as(rank)
        previous = torch.where(real, column, -1).cummax(1).values.roll(1, 1)  # column of the real token before
        previous[:, 0] = -1
        follows = supervised.gather(1, previous.clamp_min(0)) & (previous >= 0) & ~begins
        spans = per_document(supervised & ~follows)
        seen = supervised.cumsum(1)  # supervised tokens so far in the row
        seen_before = torch.where(begins, seen - supervised.long(), 0).cummax(1).values  # ... in earlier documents
        first_supervised = supervised & (seen == seen_before + 1)
    ended = begun = torch.zeros_like(real)
    marked = torch.zeros_like(real)
    if marks is not None and marks.response and ids is not None:
        ended, begun = find_headers(ids, real, document, marks)
        marked = per_document(ended) > 0
    known = marked if answer_at is None else marked | (per_document(begins_answer) > 0)
    if labels is not None:
        begins_answer = begins_answer | (first_supervised & ~known)

    # Before token i an answer may end (time 3i) or begin (3i + 1), behind it one may begin (3i + 2). A token belongs
    # to an answer if, of what happened up to it, a beginning came last:
    #   begun         u           .  .
    #   begins_answer       x
    #   answer              1  1  .  .     (u: an instruction template begins; x: an answer begins)
    time = 3 * torch.arange(real.shape[1], device=real.device)  # (seq,)
    opened_at = torch.where(begins_answer, time + 1, -1)
    opened_behind = torch.where(ended, time + 2, -1)
    behind_the_last = torch.cat([torch.full_like(opened_behind[:, :1], -1), opened_behind[:, :-1]], 1)
    opened_before = torch.maximum(behind_the_last, opened_at.roll(1, 1).index_fill(1, time.new_zeros(1), -1))
    opened_before = opened_before.cummax(1).values  # (batch, seq): the last beginning before the token
    closed = torch.where((begun & marked) | begins, time, -1).cummax(1).values  # the last end up to the token
    was_open = opened_before > closed
    answer = real & (torch.maximum(opened_before, opened_at) > closed)

    length = per_document(real)
    starts_at = begins_answer & ~was_open  # an answer that begins with this token
    starts_behind = ended & ~answer  # one that begins behind it
    unanswered = begins & (per_document(starts_at | starts_behind) == 0)
    written = answer.cumsum(1)
    end = torch.where(starts_behind, rank, rank - 1)
    return Turns(
        rank=rank,
        real=real,
        begins=begins,
        starts=starts,
        length=length,
        answer=answer,
        event=starts_at | starts_behind | unanswered,
        end=torch.where(unanswered, starts + length, end),
        answered=torch.where(starts_at, written - 1, written),
        marked=marked,
        instructs=begun,
        spans=spans,
    )


def find_answers(
    real: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None, count: int | None = None
) -> Answers:
    """`find_turns` without marks, gathered: at most one answer a document."""
    return find_turns(real, labels, position_ids).answers(count)


def resolve(layout: Layout, answers: Answers) -> Int[Tensor, "batch n"]:
    """The slots of a batch: token columns, int64, laid out by `layout`; -1 where a slot is empty.

    Args:
        layout: the groups. Each says by its `span` which tokens it takes.
        answers: the turns of the batch.
    """
    # A place counts a row's tokens from 0, a rank from 1. So "rank before" is the place of the token behind it.
    # All (batch, K):
    turn = Turn(begin=answers.lower, answer=answers.ends, stop=answers.stops, is_first=answers.first)
    column = torch.arange(answers.real.shape[1], device=answers.real.device)  # (seq,)
    counted, regions = [], []
    for group in layout:
        if group.count is None:
            taken = answers.answer if group.decodes else answers.real & ~answers.answer  # (batch, seq)
            regions.append(torch.where(taken, column, NO_POSITION))
            continue
        span = group.span(turn)
        slot = torch.arange(group.count, device=column.device)  # (N,)
        place = span.start.unsqueeze(-1) + slot  # (batch, K, N)
        filled = (place >= span.lower.unsqueeze(-1)) & (place < span.upper.unsqueeze(-1))  # (batch, K, N)
        counted.append(_columns(answers, place + 1, filled))
    return layout.join(counted, regions)


def _columns(answers: Answers, ranks: Tensor, valid: Tensor) -> Tensor:
    """Columns of the tokens with these ranks, -1 where not `valid`; all (batch, K, N)."""
    columns = torch.searchsorted(answers.rank, ranks.flatten(1).contiguous())  # the first of a rank is the real token
    there = ranks <= answers.rank[:, -1:].unsqueeze(-1)  # a prompt may go on behind this piece of it
    return torch.where(valid & there, columns.view_as(ranks), NO_POSITION)
