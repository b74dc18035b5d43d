"""What a layer asks a forward (`Wanted`), and the warnings for a user whose forward cannot answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..exporting import exports_to_onnx
from .batch import POSITIONS
from .layout import Layout
from .marks import Marks

WAYS_OUT = (
    "Ways to say it: `response_template` and `instruction_template` in the config, the headers of the chat template "
    "as token ids (`peft_reft.chat_marks(tokenizer)` finds them); the collator `peft_reft.DataCollatorForLoReft`; "
    f"`with peft_reft.prompt_lengths([...]):` around the forward; or `{POSITIONS}`."
)


@dataclass(frozen=True)
class Wanted:
    """What a layer asks a forward: at which columns are the tokens of these groups?"""

    layout: Layout
    """The groups of all specs of the config: how `intervention_positions` is laid out."""
    marks: Marks | None
    """Of the chat template; None if they are not known."""
    everything: bool = False
    """Whether prompt and answer are edited alike, all of both, so that no prompt's end matters."""

    @property
    def has_marks(self) -> bool:
        """Whether a header of the chat template can say where a prompt ends."""
        return self.marks is not None and bool(self.marks.response)

    @property
    def needs_end_below(self) -> int | None:
        """Prompts of fewer tokens than this are edited in a way that depends on where they end; None: all prompts.

        0 or 1: none, since no prompt is shorter than one token.
        """
        if self.everything:
            return 0
        return largest_or_none(group.needs_end_below for group in self.layout)

    @property
    def needs_end(self) -> bool:
        """Whether the end of any prompt can matter."""
        return self.needs_end_below != 0

    @property
    def needs_every_end(self) -> bool:
        """Whether the end of every prompt matters, however long it is."""
        return self.needs_end_below is None

    @property
    def edits_answers(self) -> bool:
        """Whether tokens of answers are edited."""
        return any(group.decodes for group in self.layout)

    @property
    def edits_prompts(self) -> bool:
        """Whether tokens of prompts are edited."""
        return not all(group.decodes for group in self.layout)

    @property
    def reach(self) -> int:
        """How many tokens of an answer the counted groups reach."""
        # Not `max(..., default=0)`, which torch.compile cannot follow.
        return largest_or_none(group.count or 0 for group in self.layout if group.decodes) or 0

    @property
    def counts_generated(self) -> bool:
        """Whether generated tokens are counted."""
        return self.reach > 0


def largest_or_none(values: Iterable[int | None]) -> int | None:
    """The largest of `values`; None if one is None."""
    largest = 0
    for value in values:
        if value is None:
            return None
        largest = max(largest, value)
    return largest


def warn(message: str) -> None:
    """Warn, unless a graph is traced that will run now. A graph that is exported to ONNX runs elsewhere."""
    if not torch.compiler.is_compiling() or exports_to_onnx():
        warnings.warn(message, UserWarning, stacklevel=2)


def warn_of_plain_forward(spec: str) -> None:
    """Warn that a forward is taken for a prefill, though `spec` depends on where its prompts end."""
    warn(
        f"LoReFT takes every row of this forward for a prompt, to whose end positions={spec!r} refers: it got no "
        "labels, and found no header of a chat template. That is right for a prefill. If a row holds an answer too, "
        "other tokens are edited than in training and in `generate`. " + WAYS_OUT
    )
