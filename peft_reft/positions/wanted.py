"""What a layer asks a forward for, and what is said to a user who has to be asked in turn."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from .batch import POSITIONS
from .marks import Marks
from .spec import Layout

WAYS_OUT = (
    "Ways to say it: `response_template` and `instruction_template` in the config, the headers of the chat template "
    "as token ids (`peft_reft.chat_marks(tokenizer)` finds them); the collator `peft_reft.DataCollatorForLoReft`; "
    f"`with peft_reft.prompt_lengths([...]):` around the forward; or `{POSITIONS}`."
)


@dataclass(frozen=True)
class Wanted:
    """What a layer wants to know: where these groups are."""

    layout: Layout
    """Groups of all the config's specs: how `intervention_positions` is laid out."""
    marks: Marks | None
    """Of the chat template; None if they are not known."""
    everything: bool = False
    """Whether prompt and answer are edited alike, all of both: then no prompt's end matters."""

    @property
    def kinds(self) -> set[str]:
        """Letters of the groups for which a prompt's end matters."""
        return set() if self.everything else {group.kind for group in self.layout}


def warn(message: str) -> None:
    """Warn, but not from within a graph that is traced, which cannot hold a warning."""
    if not torch.compiler.is_compiling():
        warnings.warn(message, UserWarning, stacklevel=2)


def warn_of_plain_forward(spec: str) -> None:
    warn(
        f"LoReFT takes every row of this forward for a prompt, to whose end positions={spec!r} refers: it got no "
        "labels, and found no header of a chat template. That is right for a prefill. If a row holds an answer too, "
        "other tokens are edited than in training and in `generate`. " + WAYS_OUT
    )
