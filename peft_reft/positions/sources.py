"""Where the positions of a forward of whole rows come from: the caller, or the batch. No hooks here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import POSITIONS, SUBSPACES, Batch, can_be_read
from .checks import Checks, refuse_or_warn
from .layout import NO_POSITION
from .resolve import Turns, resolve
from .wanted import Wanted

CONTINUOUS_BATCHING = (
    "LoReFT does not support continuous batching (`generate_batch`, cache_implementation='paged'): it packs pieces of "
    "several requests into one row, and the forward does not say where their prompts end. Use `generate`."
)


class Source(Protocol):
    """Where the positions of one forward come from."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq)."""

    def slots(self, wanted: Wanted) -> Tensor | None:
        """(batch, n) columns laid out by `wanted.layout`, or None if this forward edits nothing."""

    def check_cache(self, adapter: str, wanted: Wanted, rows: Tensor | None = None) -> None:
        """Raise ValueError if the cache of this forward does not hold the edits of `adapter` that its rows need.

        `rows`: (names given,) bool, which of the rows `adapter` edits (`adapter_names`); None for all.
        """


class _WithoutCache:
    """A forward of whole rows."""

    def check_cache(self, adapter: str, wanted: Wanted, rows: Tensor | None = None) -> None:
        """There is no cache."""


@dataclass
class Unread(_WithoutCache):
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
            return Given(check_positions(self.positions, shape).to(hidden.device), shape)
        return FromBatch(Batch.read({"attention_mask": self.attention_mask}, hidden, has_answers=False))

    def slots(self, wanted: Wanted) -> Tensor:
        raise AssertionError("to be read first")


@dataclass
class Given(_WithoutCache):
    """Positions given by the caller or the collator."""

    positions: Tensor
    shape: tuple[int, int]

    def slots(self, wanted: Wanted) -> Tensor:
        return self.positions


@dataclass
class FromBatch(_WithoutCache):
    """Positions worked out from a batch of whole documents."""

    batch: Batch
    has_answers: bool = False
    """Whether rows hold prompt and answer (causal language models)."""
    training: bool = False
    is_prompt: bool = False
    """Whether whoever made the forward knows that it holds prompts alone, so that nothing is to be warned of."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch.shape

    def slots(self, wanted: Wanted) -> Tensor:
        batch = self.batch
        unknown = self.has_answers and not batch.says_where_prompts_end
        has_marks = self.has_answers and wanted.has_marks
        if unknown and not has_marks:
            refuse_or_warn(wanted, self.training, self.is_prompt)
        turns = batch.turns(wanted.marks if self.has_answers else None)
        most = None if has_marks else batch.most_answers
        if not wanted.layout.width:
            most = 1  # each open-ended group takes one slot a column, however many answers there are
        checks = None
        if self.has_answers and wanted.needs_end:
            checks = Checks(batch, wanted, turns, training=self.training, is_prompt=self.is_prompt)
        if not can_be_read(turns.real):
            self._read_nothing(turns, most, checks)
            return resolve(wanted.layout, turns.answers(1))
        facts = [] if checks is None else checks.facts(has_marks)
        if most is None:
            facts.append(("most", turns.event.sum(1).amax()))
        if facts:  # the one host read
            found = dict(zip([name for name, _ in facts], torch.stack([fact.long() for _, fact in facts]).tolist()))
            most = most or max(1, found.pop("most"))
            if checks is not None:
                checks.act(found)
        return resolve(wanted.layout, turns.answers(most))

    @staticmethod
    def _read_nothing(turns: Turns, most: int | None, checks: Checks | None) -> None:
        """Where the host cannot read values, there is one answer a row: say so where that is not known."""
        if torch.compiler.is_compiling():
            if checks is not None:
                checks.assert_later()
            if most is None:
                torch._assert_async(
                    turns.event.sum(1).amax() <= 1,
                    "torch.compile: rows with several answers need the positions of DataCollatorForLoReft",
                )
        elif most is None and not turns.real.is_meta:
            raise ValueError(
                "Inside torch.func LoReFT cannot read how many answers the rows have: pass "
                f"`{POSITIONS}` (`peft_reft.DataCollatorForLoReft` makes them)."
            )


def check_positions(positions: Any, shape: tuple[int, int]) -> Tensor:
    """`positions`, if it can be `intervention_positions` for a batch of `shape`; else ValueError."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.is_floating_point():
        is_tensor = isinstance(positions, Tensor)
        got = f"{positions.dtype} {tuple(positions.shape)}" if is_tensor else type(positions).__name__
        raise ValueError(f"{POSITIONS} must be an integer tensor of shape (batch, n), -1 for none; got {got}.")
    if positions.shape[0] != shape[0]:
        raise ValueError(f"{POSITIONS} has {positions.shape[0]} rows for a batch of {shape[0]}.")
    looks_cost_nothing = positions.device.type == "cpu" and can_be_read(positions)
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
