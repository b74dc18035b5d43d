"""The position source of a forward of whole rows: the caller (`Given`) or the batch (`FromBatch`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..exporting import exports_to_onnx
from ..shapes import Bool, Int
from .batch import POSITIONS, SUBSPACES, Batch, can_be_read
from .checks import Checks, refuse_or_warn
from .layout import NO_POSITION
from .resolve import Turns, resolve
from .wanted import Wanted

CONTINUOUS_BATCHING = (
    "This forward holds pieces of several requests (paged attention), and does not say where their prompts end. "
    "LoReFT knows it in `generate_batch` and `init_continuous_batching`, called on a model that has its adapters."
)


@runtime_checkable
class PositionSource(Protocol):
    """Says which tokens one forward edits."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq) of the forward."""

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"] | None:
        """The slots, laid out by `wanted.layout`; None if this forward edits nothing."""

    def check_cache(self, adapter: str, wanted: Wanted, rows: Bool[Tensor, " names"] | None = None) -> None:
        """Raise ValueError if the cache of this forward does not hold the edits of `adapter` that its rows need.

        Args:
            adapter: name of the adapter.
            wanted: what its layers ask.
            rows: which rows `adapter` edits, one entry for each of the caller's `adapter_names`; None: all rows.
        """


class WithoutCache:
    """The part of a position source that has nothing to check: its forward was given no cache."""

    def check_cache(self, adapter: str, wanted: Wanted, rows: Bool[Tensor, " names"] | None = None) -> None:
        """Do nothing."""


@dataclass
class Unread(WithoutCache):
    """The source of a forward without text, such as one of an image. The first edited block shows its tokens."""

    positions: Any
    attention_mask: Any
    shape: tuple[int, int] = (0, 0)

    def read(self, hidden: Tensor) -> PositionSource:
        """Make the source for the hidden states (batch, seq, d) of the first edited block: all are a prompt's tokens.

        Raises:
            ValueError: `hidden` has another number of dimensions.
        """
        if hidden.ndim != 3:
            raise ValueError(
                "LoReFT edits tokens, but this forward has neither `input_ids` nor `inputs_embeds` (batch, seq), and "
                f"hidden states of shape {tuple(hidden.shape)} instead of (batch, seq, d) do not say where they are."
            )
        shape = (hidden.shape[0], hidden.shape[1])
        if self.positions is not None:
            return Given(check_positions(self.positions, shape).to(hidden.device), shape)
        return FromBatch(Batch.read({"attention_mask": self.attention_mask}, hidden, has_answers=False))

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"]:
        """Not to be called before `read`."""
        raise AssertionError("Unread.read was not called")


@dataclass
class Given(WithoutCache):
    """The source of a forward that was given `intervention_positions`, by the caller or the collator."""

    positions: Int[Tensor, "batch n"]
    shape: tuple[int, int]

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"]:
        """See `PositionSource`."""
        return self.positions


@dataclass
class FromBatch(WithoutCache):
    """The source of a forward that was given a batch of whole documents."""

    batch: Batch
    has_answers: bool = False
    """Whether rows hold prompt and answer (causal language models)."""
    training: bool = False
    is_prompt: bool = False
    """Whether the forward is known to hold prompts alone, so that there is nothing to warn of."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq) of the forward."""
        return self.batch.shape

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"]:
        """See `PositionSource`.

        Raises:
            ValueError: the batch does not say where its prompts end, or something else is wrong with it (`checks`).
        """
        batch = self.batch
        unknown = self.has_answers and not batch.says_where_prompts_end
        has_marks = self.has_answers and wanted.has_marks
        if unknown and not has_marks:
            refuse_or_warn(wanted, self.training, self.is_prompt)
        turns = batch.turns(wanted.marks if self.has_answers else None)
        most = None if has_marks else batch.most_answers  # answers in a row
        if not wanted.layout.width:
            most = 1  # an open-ended group takes one slot a column, however many answers there are
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
            names = [name for name, _ in facts]
            values = torch.stack([fact.long() for _, fact in facts]).tolist()
            found = dict(zip(names, values))
            most = most or max(1, found.pop("most"))
            if checks is not None:
                checks.act(found)
        return resolve(wanted.layout, turns.answers(most))

    @staticmethod
    def _read_nothing(turns: Turns, most: int | None, checks: Checks | None) -> None:
        """Make sure that there is one answer a row, which is assumed if the host cannot read values.

        Raises:
            ValueError: nothing can look at the values, now or later.
        """
        if exports_to_onnx() and (most is None or (checks is not None and checks.labelled)):
            what = "how many answers a row of a chat holds" if most is None else "whether labels mark one prompt a row"
            raise ValueError(
                f"torch.onnx.export cannot record {what}: its graph holds no checks. Make `{POSITIONS}` an input, and "
                "leave labels out."
            )
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


def check_positions(positions: Any, shape: tuple[int, int]) -> Int[Tensor, "batch n"]:
    """Check `intervention_positions` for a batch of `shape`, and make them int64.

    Raises:
        ValueError: `positions` is no integer tensor (batch, n), or has a column that the batch does not have.
    """
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


def check_subspaces(subspaces: Any) -> Int[Tensor, "rows n"] | None:
    """Check `subspaces`, and make them int64: (batch, n), or (1, n) for all rows alike; -1 = none.

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
        if not any(isinstance(row, list) for row in rows):
            rows = [rows]  # one list for all rows
        if all(isinstance(row, list) and all(type(index) is int for index in row) for row in rows):
            width = max(len(row) for row in rows)
            subspaces = torch.tensor([row + [NO_POSITION] * (width - len(row)) for row in rows], dtype=torch.long)
    if not isinstance(subspaces, Tensor) or subspaces.ndim != 2 or subspaces.is_floating_point():
        raise ValueError(
            f"{SUBSPACES}={subspaces!r}: expected row indices of R, as a list of ints for all rows, a list of lists "
            "with one a row, or an integer tensor of shape (batch, n) with -1 for none."
        )
    return subspaces.long()
