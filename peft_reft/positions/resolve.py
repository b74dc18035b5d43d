"""From prompts and answers of a batch to token columns.

Everything here is index arithmetic on tensors: no loops over rows, and one host read at most (to learn how many
answers a row holds), which a caller who knows that number avoids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import NO_POSITION, Group, Layout


@dataclass(frozen=True)
class Answers:
    """The answers of a batch: where each begins and which document it belongs to. Shapes (batch, K), all ranks.

    A *rank* counts the real tokens of a row from 1; 0 means "before the first". Padding has no rank of its own, so
    nothing below ever lands on it, whichever side it is on. An *answer* is a supervised span of labels; a document
    without one has a single answer that begins after its last token.
    """

    rank: Tensor
    """(batch, seq): rank of each real token; a padding token repeats the rank before it."""
    real: Tensor
    """(batch, seq) bool."""
    generated: Tensor
    """(batch, seq) bool: tokens from the first supervised one of their document on."""
    ends: Tensor
    """Rank of the last token before the answer."""
    starts: Tensor
    """Rank before the first token of the answer's document."""
    lower: Tensor
    """Rank that the answer's `l` slots may not reach back to: the start of the answer before it, or `starts`."""
    first: Tensor
    """bool: whether this is the first answer of its document."""
    document_ends: Tensor
    """Rank of the last token of the answer's document."""


def find_answers(
    real: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None, count: int | None = None
) -> Answers:
    """Find prompts and answers in a batch.

    Args:
        real: (batch, seq) bool, False on padding.
        labels: (batch, seq) int64, -100 where unsupervised, or None: every real token then belongs to a prompt.
        position_ids: (batch, seq) int64, or None; a real token with position 0 begins a new document (packing).
        count: most answers in a row, if the caller knows it (1 for a prompt alone); else it is read from the batch.

    Returns:
        Answers, K = `count`.
    """
    rank = real.cumsum(1)
    begins = real & (rank == 1)
    if position_ids is not None:
        begins = begins | (real & (position_ids == 0))
    document = begins.cumsum(1)  # 1-based number of the token's document; 0 before the first
    base = torch.where(begins, rank - 1, 0).cummax(1).values  # rank before the document's first token
    n_documents = real.shape[1] + 1

    def per_document(values: Tensor) -> Tensor:
        """Sum `values` (batch, seq) over each document and give every token its document's sum."""
        sums = values.new_zeros(values.shape[0], n_documents, dtype=torch.long)
        return sums.scatter_add(1, document, values.long()).gather(1, document)

    supervised = torch.zeros_like(real) if labels is None else real & (labels != -100)
    seen = supervised.cumsum(1)  # supervised tokens so far in the row
    seen_before = torch.where(begins, seen - supervised.long(), 0).cummax(1).values  # ... in earlier documents
    generated = real & (seen > seen_before)

    column = torch.arange(real.shape[1], device=real.device).expand_as(rank)
    previous = torch.where(real, column, -1).cummax(1).values.roll(1, 1)  # column of the real token before this one
    previous[:, 0] = -1
    follows_supervised = supervised.gather(1, previous.clamp_min(0)) & (previous >= 0) & ~begins
    begins_answer = supervised & ~follows_supervised
    length = per_document(real)
    unanswered = begins & (per_document(supervised) == 0)
    event = begins_answer | unanswered
    end_of_prompt = torch.where(unanswered, base + length, rank - 1)

    order = event.cumsum(1)
    if count is None:
        most = order[:, -1].amax()
        if torch.compiler.is_compiling():  # a shape that depends on data cannot be traced: one answer, and see to it
            count = 1
            torch._assert_async(most <= 1, "torch.compile: rows with several answers need DataCollatorForLoreft")
        else:
            count = max(1, int(most))  # the one host read
    wanted = torch.arange(1, count + 1, device=real.device).expand(real.shape[0], count)
    at = torch.searchsorted(order, wanted.contiguous())
    exists = at < real.shape[1]
    at = at.clamp_max(real.shape[1] - 1)

    def take(values: Tensor) -> Tensor:
        return torch.where(exists, values.gather(1, at), 0)

    ends, starts = take(end_of_prompt), take(base)
    same_document = starts[:, 1:] == starts[:, :-1]
    no_earlier = torch.ones_like(exists[:, :1])
    first = exists & torch.cat([no_earlier, ~same_document], 1)
    earlier_end = torch.cat([ends[:, :1], ends[:, :-1]], 1)
    return Answers(
        rank=rank,
        real=real,
        generated=generated,
        ends=ends,
        starts=starts,
        lower=torch.where(first, starts, torch.maximum(starts, earlier_end)),
        first=first,
        document_ends=take(base + length),
    )


def answers_of_batch(
    tokens: Tensor, attention_mask: Tensor | None, labels: Tensor | None, position_ids: Tensor | None
) -> Answers:
    """`find_answers` for a batch as trainers make it, so that model and collator read it alike.

    Args:
        tokens: (batch, seq, ...), `input_ids` or `inputs_embeds`; only their shape and device matter.
        attention_mask: (batch, seq), 0 on padding, or None: no padding, or rows packed with `position_ids`.
        labels: (batch, seq) int64 or None.
        position_ids: (batch, seq) int64 or None.
    """
    packed = attention_mask is None and position_ids is not None
    if attention_mask is not None:
        real = attention_mask.bool()
    else:
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if position_ids is not None and packed and labels is not None:
        # TRL pads packed rows with position 0: a document of one token without a label.
        begins = F.pad(position_ids == 0, (0, 1), value=True)  # something begins behind the row's end, too
        real = real & ~(begins[:, :-1] & begins[:, 1:] & (labels == -100))
    documents = position_ids if packed or labels is not None else None
    return find_answers(real, labels, documents, 1 if labels is None and documents is None else None)


def resolve(layout: Layout, answers: Answers) -> Tensor:
    """Token columns for `layout`: (batch, K * slots + open * seq) int64, -1 where a slot is empty.

    The counted groups come first, answer by answer, each answer's slots in the order of `layout`. Every open-ended
    group follows with one slot per column of the row, holding that column or -1.

    A prompt of L < p + s tokens has p cut to min(p, L // 2) and s to min(s, (L + 1) // 2), the paper's rule
    (arXiv 2404.03592, section 3): prefix and suffix never meet and the last token always counts. With ``lN~K`` the
    prompt is taken without its last K tokens. ``lN`` slots are filled from the right, so that the last slot is always
    the last token. From a document's second answer on there is no prefix, and the suffix stops where the answer before
    it begins: a token is edited once.
    """
    slots, regions = [], []
    column = torch.arange(answers.real.shape[1], device=answers.real.device)
    for group in layout:
        if group.kind == "f":
            slots.append(_prefix(group, answers))
        elif group.kind == "l":
            slots.append(_suffix(group, answers))
        elif group.kind == "p":
            regions.append(torch.where(answers.real & ~answers.generated, column, NO_POSITION))
        else:
            # In a chat, the suffix before a later answer lies behind the first one. It belongs to the prompt.
            generated = answers.generated
            if group.s:
                generated = generated & ~mask_of(_suffix(group, answers).flatten(1), generated.shape[1])
            if group.count is None:
                regions.append(torch.where(generated, column, NO_POSITION))
            else:
                slots.append(_first_generated(group, answers, generated))
    if slots:
        regions.insert(0, torch.cat(slots, -1).flatten(1))
    return torch.cat(regions, 1)


def _kept(count: int, extra: int, group: Group, answers: Answers) -> Tensor:
    """(batch, K, 1): how many of `count` a prompt keeps; a short one has half its tokens, `extra` 1 rounding up."""
    length = (answers.ends - answers.starts - group.skip).clamp_min(0)
    half = (length + extra).div(2, rounding_mode="floor")
    return torch.where(length < group.p + group.s, half, count).clamp_max(count).unsqueeze(-1)


def _prefix(group: Group, answers: Answers) -> Tensor:
    """Columns of an ``fN`` group, (batch, K, N)."""
    slot = torch.arange(group.p, device=answers.ends.device)
    valid = (slot < _kept(group.p, 0, group, answers)) & answers.first.unsqueeze(-1)
    return _columns(answers, answers.starts.unsqueeze(-1) + 1 + slot, valid)


def _suffix(group: Group, answers: Answers) -> Tensor:
    """Columns of the ``lN`` group of the spec, (batch, K, N)."""
    slot = torch.arange(group.s, device=answers.ends.device)
    rank = answers.ends.unsqueeze(-1) - group.skip - (group.s - 1) + slot
    valid = (slot >= group.s - _kept(group.s, 1, group, answers)) & (rank > answers.lower.unsqueeze(-1))
    return _columns(answers, rank, valid)


def _first_generated(group: Group, answers: Answers, generated: Tensor) -> Tensor:
    """Columns of a ``gN`` group, (batch, K, N)."""
    slot = torch.arange(group.count or 0, device=answers.ends.device)
    rank = answers.ends.unsqueeze(-1) + 1 + slot
    valid = (rank <= answers.document_ends.unsqueeze(-1)) & answers.first.unsqueeze(-1)
    columns = _columns(answers, rank, valid)
    edited = generated.gather(1, columns.clamp_min(0).flatten(1)).view_as(columns)
    return torch.where(edited, columns, NO_POSITION)


def _columns(answers: Answers, ranks: Tensor, valid: Tensor) -> Tensor:
    """Columns of the tokens with these ranks, -1 where not `valid`; all (batch, K, N)."""
    columns = torch.searchsorted(answers.rank, ranks.flatten(1).contiguous())  # the first of a rank is the real token
    return torch.where(valid, columns.view_as(ranks), NO_POSITION)


def mask_of(columns: Tensor, seq: int) -> Tensor:
    """(batch, seq) bool, True at the `columns` (batch, n) of a row that are not -1."""
    hit = torch.zeros(columns.shape[0], seq + 1, dtype=torch.bool, device=columns.device)
    return hit.scatter(1, torch.where(columns >= 0, columns, seq), True)[:, :seq]  # column `seq` takes the empty ones
