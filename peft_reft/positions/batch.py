"""`Batch.read` reads a batch as trainers, `generate` and people make it. No other module knows their quirks."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import Bool, Int
from .marks import Marks
from .resolve import IGNORED, Turns, find_turns

POSITIONS = "intervention_positions"
SUBSPACES = "subspaces"

_KNOWN = "_peft_reft_labels"

prompts_of: ContextVar[list[int] | None] = ContextVar("prompts_of", default=None)
"""Lengths of the rows' prompts, set by `peft_reft.prompt_lengths`."""


@dataclass(frozen=True)
class Batch:
    """What a batch says of its tokens."""

    real: Bool[Tensor, "batch seq"]
    """False on padding."""
    ids: Int[Tensor, "batch seq"] | None = None
    """Token ids; None if the batch has only embeddings."""
    labels: Int[Tensor, "batch seq"] | None = None
    """-100 at tokens that are not supervised; None if the batch has no label for each token."""
    position_ids: Int[Tensor, "batch seq"] | None = None
    """0 at the first token of a document; None if each row is one document."""
    packed: bool = False
    """Whether a row may hold several documents."""
    answer_tokens: int | None = None
    """How many columns at the end of each row are the answer, if TRL's `logits_to_keep` says so."""
    prompt_lengths: tuple[int, ...] | None = None
    """Number of real tokens of each row's prompt, if `peft_reft.prompt_lengths` says so."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.real.shape[0], self.real.shape[1]

    @property
    def says_where_prompts_end(self) -> bool:
        """Whether the batch says where its prompts end, without its token ids being read."""
        return any(each is not None for each in (self.labels, self.answer_tokens, self.prompt_lengths))

    @staticmethod
    def read(given: Mapping[str, Any], tokens: Tensor, has_answers: bool) -> Batch:
        """Read a model's inputs, or a collator's batch.

        Args:
            given: the inputs by name. Of these `input_ids`, `attention_mask`, `position_ids`, `labels`, and TRL's
                `completion_mask` and `logits_to_keep` are read, as far as they are given.
            tokens: `input_ids` (batch, seq) or `inputs_embeds` (batch, seq, d), which give the batch its shape.
            has_answers: whether the rows hold prompt and answer (causal language models). If not, labels say nothing
                about prompts.

        Raises:
            ValueError: the attention mask is not of shape (batch, seq), or `prompt_lengths` does not fit the batch.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        mask = given.get("attention_mask")
        if mask is not None and not is_matrix(mask, shape):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else "no tensor"
            raise ValueError(
                f"LoReFT needs an attention mask of shape {shape} (batch, seq) to tell prompt from padding, got "
                f"{got}. Pass `{POSITIONS}` instead."
            )
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or not is_matrix(ids, shape) or ids.is_floating_point():
            ids = None
        position_ids = given.get("position_ids")
        position_ids = position_ids if is_matrix(position_ids, shape) else None
        labels = _labels(given, shape, ids) if has_answers else None
        packed = mask is None and position_ids is not None
        real = torch.ones(shape, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        if position_ids is not None and packed and labels is not None:
            # TRL pads packed rows with position 0, so each padding token looks like a document of one token without
            # a label:
            #   position_ids   0  1  2  0  1  0  0
            #   begins         x        x     x  x  (x)    behind the row's end something begins, too
            #   padding                       x  x
            begins = F.pad(position_ids == 0, (0, 1), value=True)  # (batch, seq + 1)
            real = real & ~(begins[:, :-1] & begins[:, 1:] & (labels == IGNORED))
        kept = given.get("logits_to_keep") if has_answers and labels is None else None
        return Batch(
            real=real,
            ids=ids,
            labels=labels,
            position_ids=position_ids if packed or has_answers else None,
            packed=packed,
            # The logits before the answer's first token are kept, too.
            answer_tokens=kept - 1 if type(kept) is int and 1 < kept <= shape[1] else None,
            prompt_lengths=_prompt_lengths(shape[0]) if has_answers else None,
        )

    def turns(self, marks: Marks | None, answer_at: Tensor | None = None) -> Turns:
        """Find prompts and answers: by the prompts' lengths if they are known, else by marks, else by labels.

        Args:
            marks: of the chat template.
            answer_at: (batch, seq) bool, True at a token that is known to be an answer's first.
        """
        if self.prompt_lengths is not None:
            lengths = torch.tensor(self.prompt_lengths, device=self.real.device).unsqueeze(1)  # (batch, 1)
            turns = find_turns(self.real, answer_at=self.real.cumsum(1) == lengths + 1)
            goes_on = lengths > turns.rank[:, -1:]  # (batch, 1): the row is a piece of a longer prompt
            return replace(turns, end=torch.where(goes_on, lengths, turns.end))
        if self.answer_tokens is not None:
            column = torch.arange(self.shape[1], device=self.real.device)
            begins = (column == self.shape[1] - self.answer_tokens).expand(self.shape)  # (batch, seq)
            answer_at = begins if answer_at is None else answer_at | begins
        return find_turns(self.real, self.labels, self.position_ids, self.ids, marks, answer_at)

    @property
    def most_answers(self) -> int | None:
        """The most answers in a row, if no marks are looked for; None if only the data say it."""
        if self.prompt_lengths is not None or self.position_ids is None:
            return 1
        return None


def _labels(given: Mapping[str, Any], shape: tuple[int, int], ids: Tensor | None) -> Tensor | None:
    labels = given.get("labels")
    if is_matrix(labels, shape):
        return labels
    if (completion := given.get("completion_mask")) is not None and ids is not None:  # TRL's preference data
        return ids.masked_fill(completion == 0, IGNORED)
    return _remembered(ids)


def remember(batch: Batch) -> None:
    """Keep a batch's labels with its `input_ids`, for a forward of the same tensor without labels.

    Evaluation with `compute_metrics` runs such a forward. The labels live as long as the tensor.
    """
    if batch.ids is not None and batch.labels is not None:
        setattr(batch.ids, _KNOWN, (batch.ids._version, batch.labels))


def _remembered(ids: Tensor | None) -> Tensor | None:
    if torch.compiler.is_compiling() or (known := getattr(ids, _KNOWN, None)) is None:
        return None
    assert ids is not None
    version, labels = known
    return labels if version == ids._version else None


def _prompt_lengths(rows: int) -> tuple[int, ...] | None:
    lengths = None if torch.compiler.is_compiling() else prompts_of.get()
    if lengths is None:
        return None
    if len(lengths) != rows:
        raise ValueError(
            f"prompt_lengths has {len(lengths)} entries, but the forward inside it has {rows} rows. Give one a row, "
            "in the order of the rows."
        )
    return tuple(lengths)


def is_matrix(value: Any, shape: tuple[int, int]) -> bool:
    """Whether `value` is a tensor of the given shape."""
    return isinstance(value, Tensor) and tuple(value.shape) == shape


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can read values: not while a graph is traced, on the meta device, or inside `torch.func`."""
    return not (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or isinstance(tensor, torch._subclasses.FakeTensor)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
