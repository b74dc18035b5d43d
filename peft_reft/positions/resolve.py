"""From the tokens of a batch to its prompts and answers (`find_turns`), and from these to slots (`resolve`).

All of it is index arithmetic on tensors. There are no loops over rows. There is at most one host read, which learns
how many answers a row holds; a caller who knows that number avoids it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import Bool, Int, Shaped
from .groups import Turn
from .layout import NO_POSITION, Layout
from .marks import Marks, find_headers
from .scans import first_column, running_max

IGNORED = -100
"""The label of a token that is not trained on."""


@dataclass(frozen=True)
class Turns:
    """The prompts and answers of a batch, one entry for each column.

    A *rank* counts the real tokens of a row from 1; 0 means "before the first". A padding token repeats the rank of
    the token before it, and no search for a rank finds it. So nothing lands on padding, whichever side it is on.
    Each answer of a document has a prompt: the tokens between the answer before and this one.

        column      0    1    2    3    4    5    6    7       a padded row: u user, a answer
        token       pad  u    u    a    a    u    a    a
        real             x    x    x    x    x    x    x
        rank        0    1    2    3    4    5    6    7
        begins           x
        answer                     x    x         x    x
        event                      x              x
        end                        2              5            rank of the last token before the answer
        answered                   0              2            answers' tokens before this answer
    """

    rank: Int[Tensor, "batch seq"]
    """Rank of each real token; a padding token repeats the rank before it."""
    real: Bool[Tensor, "batch seq"]
    """False on padding."""
    begins: Bool[Tensor, "batch seq"]
    """True at the first token of each document."""
    starts: Int[Tensor, "batch seq"]
    """Rank before the first token of the token's document."""
    length: Int[Tensor, "batch seq"]
    """Number of tokens of the token's document."""
    answer: Bool[Tensor, "batch seq"]
    """Whether the token belongs to an answer."""
    event: Bool[Tensor, "batch seq"]
    """True at one column for each answer."""
    end: Int[Tensor, "batch seq"]
    """If `event`: rank of the last token before the answer."""
    answered: Int[Tensor, "batch seq"]
    """If `event`: number of the row's answer tokens before this answer."""
    marked: Bool[Tensor, "batch seq"]
    """Whether the token's document has a response template."""
    instructs: Bool[Tensor, "batch seq"]
    """True at the first token of an instruction template."""
    spans: Int[Tensor, "batch seq"]
    """Number of spans of supervised labels in the token's document."""

    def answers(self, count: int | None = None) -> Answers:
        """Gather the answers of each row side by side.

        Args:
            count: the most answers in a row, if the caller knows it. None reads it from the batch: one host read.
        """
        order = self.event.cumsum(1)  # (batch, seq): number of answers up to each column
        if count is None:
            count = max(1, int(order[:, -1].amax()))
        numbers = torch.arange(1, count + 1, device=order.device).expand(order.shape[0], count)  # (batch, K)
        at = first_column(order, numbers)  # (batch, K): column of each answer's event
        exists = at < order.shape[1]  # (batch, K): a row may have fewer answers than another
        at = at.clamp_max(order.shape[1] - 1)

        def take(values: Tensor) -> Tensor:
            """`values` (batch, seq) at each answer's event: (batch, K), 0 if there is no such answer."""
            return torch.where(exists, values.gather(1, at), 0)

        # The answer tokens between one event and the next belong to the first of the two.
        total = (self.answer & self.real).sum(1, keepdim=True)  # (batch, 1)
        answered = torch.where(exists, self.answered.gather(1, at), total)  # (batch, K)
        tokens = torch.cat([answered[:, 1:], total], 1) - answered  # (batch, K): length of each answer
        ends, starts = take(self.end), take(self.starts)  # (batch, K) each
        stops = torch.where(exists, ends + tokens, 0)  # (batch, K)
        same_document = starts[:, 1:] == starts[:, :-1]  # (batch, K - 1): as the answer before
        first = exists & torch.cat([torch.ones_like(exists[:, :1]), ~same_document], 1)  # (batch, K)
        stop_before = torch.cat([starts[:, :1], stops[:, :-1]], 1)  # (batch, K): where the answer before stops
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
    """The answers of a batch side by side, `answers` a row; all numbers are ranks.

    If a row has fewer answers than another, the last ones are empty and have no prompt: `ends` and `stops` are 0.
    """

    rank: Int[Tensor, "batch seq"]
    """As in `Turns`."""
    real: Bool[Tensor, "batch seq"]
    """As in `Turns`."""
    answer: Bool[Tensor, "batch seq"]
    """As in `Turns`."""
    ends: Int[Tensor, "batch answers"]
    """Rank of the last token before the answer: the end of its prompt."""
    starts: Int[Tensor, "batch answers"]
    """Rank before the first token of the answer's document."""
    lower: Int[Tensor, "batch answers"]
    """Rank before the first token of the answer's prompt."""
    first: Bool[Tensor, "batch answers"]
    """Whether this is the first answer of its document."""
    stops: Int[Tensor, "batch answers"]
    """Rank of the answer's last token; `ends` if it is empty."""


def find_turns(
    real: Bool[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    ids: Int[Tensor, "batch seq"] | None = None,
    marks: Marks | None = None,
    answer_at: Bool[Tensor, "batch seq"] | None = None,
) -> Turns:
    """Find the prompts and answers of a batch.

    Each document is read by the first of these that says something of it:

    - `answer_at` and the marks of the chat template, together;
    - the labels: the answer begins at the first supervised token and runs to the document's end;
    - nothing: the document is a prompt, and its answer begins behind it.

    An answer begins behind a response template, or at `answer_at`, and ends where an instruction template begins. A
    response template inside an answer changes nothing.

    Args:
        real: False on padding.
        labels: -100 at tokens that are not supervised.
        position_ids: a real token with position 0 begins a new document (packing).
        ids: token ids, needed with `marks`.
        marks: of the chat template.
        answer_at: True at a token that is known to be an answer's first.
    """
    # All tensors below are (batch, seq) unless a comment says otherwise.
    rank = real.cumsum(1)
    begins = real & (rank == 1)
    if position_ids is not None:
        begins = begins | (real & (position_ids == 0))
    document = begins.cumsum(1)  # number of the token's document, from 1; 0 before the first
    starts = running_max(torch.where(begins, rank - 1, 0), lowest=0)

    begins_answer = torch.zeros_like(real) if answer_at is None else real & answer_at
    ended = begun = marked = torch.zeros_like(real)
    if marks is not None and marks.response and ids is not None:
        ended, begun = find_headers(ids, real, document, marks)
        marked = _sum_per_document(ended, document) > 0
    spans = torch.zeros_like(rank)
    if labels is not None:
        spans, first_supervised = _read_labels(real, labels, begins, document)
        is_known = marked if answer_at is None else marked | (_sum_per_document(begins_answer, document) > 0)
        begins_answer = begins_answer | (first_supervised & ~is_known)

    # Before token i an answer can end (time 3i) or begin (time 3i + 1); behind token i one can begin (time 3i + 2).
    # A token belongs to an answer if the last event up to the token is a beginning, not an end:
    #
    #   token           u   u   A   a   a   u   A      A: the last token of a response template
    #   begun           0                   15         u: an instruction template begins here
    #   ended                   8               20
    #   last event      0   0   0   8   8   15  15
    #   answer                      x   x
    time = 3 * torch.arange(real.shape[1], device=real.device)  # (seq,)
    opened_at = torch.where(begins_answer, time + 1, -1)
    opened_behind = torch.where(ended, time + 2, -1)
    opened = torch.maximum(opened_at, opened_behind)
    opened_before = running_max(_shift_right(opened), lowest=-1)  # the last before the token
    closed = running_max(torch.where((begun & marked) | begins, time, -1), lowest=-1)  # the last up to the token
    was_open = opened_before > closed
    answer = real & (torch.maximum(opened_before, opened_at) > closed)

    length = _sum_per_document(real, document)
    starts_at = begins_answer & ~was_open  # an answer begins with this token
    starts_behind = ended & ~answer  # an answer begins behind this token
    unanswered = begins & (_sum_per_document(starts_at | starts_behind, document) == 0)
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


def _sum_per_document(
    values: Shaped[Tensor, "batch seq"], document: Int[Tensor, "batch seq"]
) -> Int[Tensor, "batch seq"]:
    """Sum `values` over each document, and give every token its document's sum."""
    sums = torch.zeros(values.shape[0], values.shape[1] + 1, dtype=torch.long, device=values.device)
    sums = sums.scatter_add(1, document, values.long())  # (batch, documents + 1)
    return sums.gather(1, document)


def _shift_right(values: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Give every column the value of the column before; -1 to the first."""
    return torch.cat([torch.full_like(values[:, :1], -1), values[:, :-1]], 1)


def _read_labels(
    real: Bool[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    begins: Bool[Tensor, "batch seq"],
    document: Int[Tensor, "batch seq"],
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Read what labels say of each document.

    Returns:
        The number of supervised spans of the token's document (padding inside a span does not cut it); True at the
        first supervised token of each document.
    """
    supervised = real & (labels != IGNORED)
    column = torch.arange(real.shape[1], device=real.device).expand_as(labels)
    previous = _shift_right(running_max(torch.where(real, column, -1), lowest=-1))  # of the real token before, or -1
    goes_on = supervised.gather(1, previous.clamp_min(0)) & (previous >= 0) & ~begins
    spans = _sum_per_document(supervised & ~goes_on, document)
    seen = supervised.cumsum(1)  # supervised tokens of the row so far
    seen_before = running_max(torch.where(begins, seen - supervised.long(), 0), lowest=0)  # of earlier documents
    return spans, supervised & (seen == seen_before + 1)


def find_answers(
    real: Bool[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    count: int | None = None,
) -> Answers:
    """The answers of `find_turns` without marks: at most one for each document."""
    return find_turns(real, labels, position_ids).answers(count)


def resolve(layout: Layout, answers: Answers) -> Int[Tensor, "batch n"]:
    """The slots of a batch: token columns, int64, laid out by `layout`; -1 where a slot is empty.

    Args:
        layout: the groups. Each says by its `span` which tokens it takes.
        answers: the turns of the batch.
    """
    # An index counts a row's tokens from 0, a rank from 1. So the rank before a token is the token's index.
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
        index = span.start.unsqueeze(-1) + slot  # (batch, K, N)
        filled = (index >= span.lower.unsqueeze(-1)) & (index < span.upper.unsqueeze(-1))  # (batch, K, N)
        counted.append(_columns(answers, index + 1, filled))
    return layout.join(counted, regions)


def _columns(
    answers: Answers, ranks: Int[Tensor, "batch answers n"], filled: Bool[Tensor, "batch answers n"]
) -> Int[Tensor, "batch answers n"]:
    """Columns of the tokens with these ranks; -1 at a slot that is not `filled`."""
    # A padding token repeats the rank before it, so the first column with a rank is the real token.
    columns = first_column(answers.rank, ranks.flatten(1))  # (batch, K * N)
    # A prompt may go on behind this piece of it, and tokens before the piece are not there.
    last = answers.rank.shape[1] - 1
    exists = answers.rank.gather(1, columns.clamp_max(last)) == ranks.flatten(1)  # (batch, K * N)
    return torch.where(filled & exists.view_as(ranks), columns.view_as(ranks), NO_POSITION)
