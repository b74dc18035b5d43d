"""Where the positions of one forward come from: the caller, the batch, or `generate`. No hooks here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .resolve import Answers, answers_of_batch, find_answers, resolve
from .spec import NO_POSITION, Layout, slots_per_answer

POSITIONS = "intervention_positions"
SUBSPACES = "subspaces"
IGNORED = -100
"""The label of a token that is not trained on."""


class Source(Protocol):
    """Where the positions of one forward come from."""

    shape: tuple[int, int]

    def slots(self, layout: Layout) -> Tensor | None:
        """(batch, n) columns laid out by `layout`, or None if this forward edits nothing."""


@dataclass
class Unknown:
    """A forward that does not say where its prompts are."""

    reason: str
    shape: tuple[int, int] = (0, 0)

    def slots(self, layout: Layout) -> Tensor:
        raise ValueError(self.reason)


CONTINUOUS_BATCHING = Unknown(
    "LoReFT does not support continuous batching (`generate_batch`, cache_implementation='paged'): it packs pieces of "
    "several requests into one row, and the forward does not say where their prompts end. Use `generate`."
)


@dataclass
class Unread:
    """A forward that was given no text: an image, whose patches the first block that is edited will show."""

    positions: Any
    attention_mask: Any
    shape: tuple[int, int] = (0, 0)

    def read(self, hidden: Tensor) -> Source:
        """What hidden states (batch, seq, d) of the first edited block say: every one of them is a prompt's token."""
        if hidden.ndim != 3:
            raise ValueError(
                "LoReFT edits tokens, but this forward has neither `input_ids` nor `inputs_embeds` (batch, seq), and "
                f"hidden states of shape {tuple(hidden.shape)} instead of (batch, seq, d) do not say where they are."
            )
        shape = (hidden.shape[0], hidden.shape[1])
        if self.positions is not None:
            return Explicit(check_positions(self.positions, shape).to(hidden.device), shape)
        return Derived(hidden, shape, self.attention_mask, None, None, None, needs_labels=False)

    def slots(self, layout: Layout) -> Tensor:
        raise AssertionError("to be read first")


@dataclass
class Explicit:
    """Positions given by the caller or the collator."""

    positions: Tensor
    shape: tuple[int, int]

    def slots(self, layout: Layout) -> Tensor:
        return self.positions


@dataclass
class Derived:
    """Positions worked out from masks, labels and position ids."""

    tokens: Tensor
    shape: tuple[int, int]
    attention_mask: Any
    position_ids: Any
    labels: Any
    cache: Any
    needs_labels: bool
    """Whether this is a causal language model in training, whose prompts end where labels begin."""

    def slots(self, layout: Layout) -> Tensor | None:
        kinds = {group.kind for group in layout}
        if self.cache is not None and self.labels is None and _cached(self.cache):
            return self._continuation(layout)
        if self.needs_labels and self.labels is None and kinds - {"f"}:
            raise ValueError(
                "LoReFT cannot tell where the prompts end: the model is in training, and got neither `labels` nor "
                f"`{POSITIONS}`. (Label smoothing and `compute_loss_func` keep labels from the model.) Use the "
                "collator `peft_reft.DataCollatorForLoreft(collator, config)`, or pass labels. (TRL's ORPO and CPO, "
                "and the decoder of an encoder-decoder model, allow no collator: without labels, use positions of "
                "prefixes alone, such as 'f4'.)"
            )
        if self.attention_mask is not None and not is_matrix(self.attention_mask, self.shape):
            got = tuple(self.attention_mask.shape) if isinstance(self.attention_mask, Tensor) else "no tensor"
            raise ValueError(
                f"LoReFT needs an attention mask of shape {self.shape} (batch, seq) to tell prompt from padding, got "
                f"{got}. Pass `{POSITIONS}` instead."
            )
        position_ids = self.position_ids if is_matrix(self.position_ids, self.shape) else None
        answers = answers_of_batch(self.tokens, self.attention_mask, self.labels, position_ids)
        slots = resolve(layout, answers)
        if self.needs_labels and self.labels is not None:
            check_batch(layout, slots, answers, self.labels, position_ids if self.attention_mask is None else None)
        return slots

    def _continuation(self, layout: Layout) -> Tensor | None:
        """Tokens fed to a filled cache outside `generate`: they come after the prompt."""
        if any(group.kind == "g" and group.count for group in layout):
            raise ValueError(
                "LoReFT cannot count generated tokens in a decoding loop of your own: the forward does not say how "
                f"long the prompt was. Use `generate`, or pass `{POSITIONS}`."
            )
        if all(group.kind != "g" for group in layout):
            return None
        column = torch.arange(self.shape[1], device=self.tokens.device).expand(self.shape)
        none = torch.full((self.shape[0], slots_per_answer(layout)), NO_POSITION, device=self.tokens.device)
        empty = torch.full_like(column, NO_POSITION)
        regions = [column if group.kind == "g" else empty for group in layout if group.count is None]
        return torch.cat([none, *regions], 1)


def check_batch(layout: Layout, slots: Tensor, answers: Answers, labels: Tensor, position_ids: Tensor | None) -> None:
    """Refuse a training batch that cannot train anything, or whose prompts were cut off.

    Args:
        layout: the groups that are edited.
        slots: (batch, n) resolved positions.
        answers: of the batch.
        labels: (batch, seq) int64.
        position_ids: (batch, seq) int64 of packed rows, else None.

    Raises:
        ValueError: no row has a position to edit, or a row starts in the middle of a document.
    """
    real = answers.real
    supervised = real & (labels != IGNORED)
    none_supervised = ~supervised.any()
    none_edited = ~(slots >= 0).any()
    first = real.long().argmax(1, keepdim=True)
    # A row that is supervised from its first token on and again after a gap has lost the prompt of its first answer.
    resumes = (supervised[:, 1:] & ~supervised[:, :-1]).any(1)
    cut = (supervised.gather(1, first).squeeze(1) & resumes).any()
    if position_ids is not None:
        cut = cut | (position_ids.gather(1, first) != 0).any()
        # TRL takes the label off the first token of every packed document. So a prompt of one token is what it leaves
        # of a document without a prompt, and of the second part of one that was split.
        answered = answers.first & (answers.document_ends > answers.ends)
        lone = answered & (answers.ends - answers.starts == 1)
        all_lone = (lone == answered).all() & lone.any()
        if all(group.kind != "g" for group in layout):
            none_edited = none_edited | all_lone
        if any(group.count is not None for group in layout):  # "all" edits every token, whatever came before it
            cut = cut | (lone.any() & ~all_lone)
    if torch.compiler.is_compiling():
        torch._assert_async(~(none_edited | cut), "LoReFT: no position to edit, or rows that start mid-document")
        return
    nothing_to_edit, starts_within, no_labels = torch.stack([none_edited, cut, none_supervised]).tolist()
    if starts_within:
        raise ValueError(
            "A row or a packed document starts in the middle of a document (it begins inside an answer, its first "
            "position id is not 0, or packing left it a prompt of one token), so its prompt is missing and LoReFT "
            "would edit the wrong tokens. Keep documents whole when packing or truncating (TRL: "
            "packing_strategy='bfd'); prompts of a single token cannot be packed."
        )
    if nothing_to_edit and not no_labels:
        raise ValueError(
            "No row of this training batch has a token for LoReFT to edit, so nothing would train: every row is "
            "supervised from its first token on. LoReFT learns at the prompt, so the data needs one: use "
            "prompt-completion data (TRL: columns `prompt` and `completion`, or `completion_only_loss=True`, or "
            "`assistant_only_loss=True` for chats), or positions that include generated tokens ('all', 'gN')."
        )


@dataclass
class Generation:
    """The prompts of one call of `generate`, kept until it returns.

    Capturing them at entry is what holds for every way of decoding. What a later forward shows (an empty cache, the
    number of its tokens) does not: without a cache every forward has the whole row, a chunk of a prompt has a filled
    cache, and assisted decoding's first forward has candidates behind the prompt.
    """

    real: Tensor | None
    """(rows at entry, prompt length) bool; None until the first step, for a decoder beside an encoder."""
    explicit: Tensor | None
    seen: int
    """Tokens in the cache."""
    subspaces: Tensor | None
    rolls_back: bool
    """Whether rejected candidates are taken out of the cache again (assisted decoding)."""
    _resolved: dict[Layout, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def advance(self, cache: Any, tokens: int) -> int:
        """Column at which the coming forward of `tokens` tokens starts."""
        if cache is None:
            return 0
        start = int(cache.get_seq_length()) if self.rolls_back else self.seen
        self.seen = start + tokens
        return start

    def slots(self, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """Columns to edit: the counted slots (rows, n), and a region (rows, prompt length) for each open-ended group.

        The slots of a `gN` group hold the columns that its tokens will have.
        """
        if layout in self._resolved:
            return self._resolved[layout]
        assert self.real is not None
        length, width = self.real.shape[1], slots_per_answer(layout)
        open_groups = sum(group.count is None for group in layout)
        if self.explicit is None:
            whole = resolve(layout, find_answers(self.real, count=1))
            at = 0
            for group in layout:
                if group.kind == "g" and group.count:
                    whole[:, at : at + group.count] = length + torch.arange(group.count, device=whole.device)
                at += group.count or 0
        else:
            whole = self.explicit.to(self.real.device)
        counted = whole.shape[1] - open_groups * length
        if counted >= 0 and (counted % width == 0 if width else counted == 0):
            regions = list(whole[:, counted:].split(length, 1)) if open_groups else []
        else:  # a caller's flat list of columns
            counted = whole.shape[1]
            regions = [torch.full_like(self.real, NO_POSITION, dtype=torch.long)] * open_groups
        self._resolved[layout] = whole[:, :counted], regions
        return self._resolved[layout]


@dataclass
class Step:
    """One forward within `generate`: columns `start` to `start + seq` of rows that begin with the prompt."""

    generation: Generation
    start: int
    shape: tuple[int, int]

    def slots(self, layout: Layout) -> Tensor | None:
        batch, seq = self.shape
        assert self.generation.real is not None
        length = self.generation.real.shape[1]
        decoded = [group for group in layout if group.kind == "g"]
        if self.start >= length and all(group.count and self.start >= length + group.count for group in decoded):
            return None  # every decode step of a spec without generated tokens ends here
        counted, regions = self.generation.slots(layout)
        column = torch.arange(seq, device=counted.device)
        inside = (counted >= self.start) & (counted < self.start + seq)
        pieces = [torch.where(inside, counted - self.start, NO_POSITION)]
        for group, region in zip([group for group in layout if group.count is None], regions):
            in_prompt = region[:, self.start : self.start + seq] >= 0
            edited = F.pad(in_prompt, (0, seq - in_prompt.shape[1]), value=False)
            if group.kind == "g":
                edited = edited | (column + self.start >= length)
            pieces.append(torch.where(edited, column, NO_POSITION))
        slots = torch.cat(pieces, 1)
        return slots.repeat_interleave(batch // len(slots), 0) if len(slots) != batch else slots


def check_positions(positions: Any, shape: tuple[int, int]) -> Tensor:
    """`positions`, if it can be `intervention_positions` for a batch of `shape`; else ValueError."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.is_floating_point():
        is_tensor = isinstance(positions, Tensor)
        got = f"{positions.dtype} {tuple(positions.shape)}" if is_tensor else type(positions).__name__
        raise ValueError(f"{POSITIONS} must be an integer tensor of shape (batch, n), -1 for none; got {got}.")
    if positions.shape[0] != shape[0]:
        raise ValueError(f"{POSITIONS} has {positions.shape[0]} rows for a batch of {shape[0]}.")
    looks_cost_nothing = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks_cost_nothing and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < NO_POSITION or high >= shape[1]:
            raise ValueError(
                f"{POSITIONS} has columns from {low} to {high}; allowed are 0 to {shape[1] - 1} in a batch of "
                f"{shape[1]} tokens a row, and -1 for none."
            )
    return positions.long()


def check_subspaces(subspaces: Any) -> Tensor | None:
    """`subspaces` as int64 (batch, n), or (1, n) for all rows alike; -1 = none.

    Args:
        subspaces: row indices of R: a list of ints for all rows, a list of lists (one a row, of any length), or an
            integer tensor (batch, n).

    Raises:
        ValueError: it is none of these.
    """
    if subspaces is None:
        return None
    if isinstance(subspaces, list | tuple | range):
        rows: list[Any] = [list(row) if isinstance(row, list | tuple | range) else row for row in subspaces]
        rows = rows if any(isinstance(row, list) for row in rows) else [rows]
        if all(isinstance(row, list) and all(type(index) is int for index in row) for row in rows):
            width = max(len(row) for row in rows)
            subspaces = torch.tensor([row + [NO_POSITION] * (width - len(row)) for row in rows], dtype=torch.long)
    if not isinstance(subspaces, Tensor) or subspaces.ndim != 2 or subspaces.is_floating_point():
        raise ValueError(
            f"{SUBSPACES}={subspaces!r}: expected row indices of R, as a list of ints for all rows, a list of lists "
            "with one a row, or an integer tensor of shape (batch, n) with -1 for none."
        )
    return subspaces.long()


def is_matrix(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape


def _cached(cache: Any) -> bool:
    return bool(cache.get_seq_length() > 0) if hasattr(cache, "get_seq_length") else True
