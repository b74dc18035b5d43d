"""Cut each row of a batch in two: the untouched part, before its first edited token, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..shapes import Bool, Int, Shaped
from .groups import Turn
from .layout import NO_POSITION, Layout
from .wanted import Wanted

_LONG_PROMPT = Turn(begin=0, answer=1000, stop=1100, is_first=True)


@lru_cache(maxsize=256)
def leaves_a_beginning(layout: Layout) -> bool:
    """Whether a long prompt has a beginning that no group of `layout` takes.

    Examples:
        >>> from peft_reft import Positions
        >>> [leaves_a_beginning(Positions.parse(spec).groups) for spec in ("l7", "l7+g", "f1+l7")]
        [True, True, False]
    """
    return all(group.span(_LONG_PROMPT).lower > _LONG_PROMPT.answer // 2 for group in layout)


@dataclass(frozen=True)
class Part:
    """Some neighbouring tokens of each row, which `take` puts side by side from the left.

    ::

        column     0   1   2   3   4   5             first   last
        row 0      a   b   c   d   e                 2       5
        row 1          a   b   c   d   e             4       6

        taken      row 0   c  d  e                   width = 3
                   row 1   d  e  .                   .  filled
    """

    first: Int[Tensor, " batch"]
    """Column of each row's first token."""
    last: Int[Tensor, " batch"]
    """Column behind each row's last token."""
    width: int
    """The most tokens of a row."""
    slice_from: int | None
    """If all rows have the same columns: the first of them, known without a host read, so that a slice takes them."""

    @property
    def is_even(self) -> bool:
        """Whether all rows have the same columns."""
        return self.slice_from is not None

    def behind(self, tokens: int) -> Part:
        """The same tokens without the first `tokens` of each row."""
        slice_from = None if self.slice_from is None else self.slice_from + tokens
        return Part(self.first + tokens, self.last, self.width - tokens, slice_from)

    @cached_property
    def columns(self) -> Int[Tensor, "batch width"]:
        """Column of each token taken; behind a row's last token they go on, perhaps beyond the row."""
        return self.first.unsqueeze(1) + torch.arange(self.width, device=self.first.device)

    @cached_property
    def real(self) -> Bool[Tensor, "batch width"]:
        """False where a row has no token."""
        return self.columns < self.last.unsqueeze(1)

    def take(self, tensor: Shaped[Tensor, "batch seq *rest"], fill: float) -> Shaped[Tensor, "batch width *rest"]:
        """The tokens' entries of `tensor`, `fill` where a row has no token."""
        if self.slice_from is not None:
            return tensor[:, self.slice_from : self.slice_from + self.width]
        columns = self.columns.clamp(max=tensor.shape[1] - 1).to(tensor.device)  # (batch, width)
        taken = tensor[torch.arange(len(tensor), device=tensor.device).unsqueeze(1), columns]  # (batch, width, ...)
        real = self.real.to(tensor.device).reshape(*columns.shape, *[1] * (tensor.ndim - 2))  # (batch, width, 1 ...)
        return torch.where(real, taken, torch.full((), fill, dtype=tensor.dtype, device=tensor.device))


@dataclass(frozen=True)
class Split:
    """The untouched part and the rest of each row.

    Every token before the cut has the states that the base model gives it, whichever adapter is active.
    """

    untouched: Part
    rest: Part
    seq: int
    """Number of the batch's columns."""

    @staticmethod
    def at(
        start: Int[Tensor, " batch"],
        cut: Int[Tensor, " batch"],
        stop: Int[Tensor, " batch"],
        seq: int,
        least: int = 0,
    ) -> Split:
        """Cut each row at a column. All four are on the CPU.

        Args:
            start: column of the row's first token.
            cut: column of the first token of its rest.
            stop: column behind its last token.
            seq: number of the batch's columns.
            least: fewest columns of a part, even if no row has a token for them.
        """
        parts = []
        for first, last in ((start, cut), (cut, stop)):
            lengths = last - first
            width = max(least, int(lengths.max()))
            is_even = bool((lengths == width).all()) and bool((first == first[0]).all())
            parts.append(Part(first, last, width, int(first[0]) if is_even else None))
        return Split(parts[0], parts[1], seq)

    @property
    def is_even(self) -> bool:
        """Whether the two parts, one behind the other, are the batch."""
        parts = (self.untouched, self.rest)
        return all(part.is_even for part in parts) and sum(part.width for part in parts) == self.seq

    def to(self, device: torch.device) -> Split:
        """The same on another device, by one copy for which the host does not wait."""
        columns = torch.stack([self.untouched.first, self.rest.first, self.rest.last])  # (3, batch)
        first, cut, stop = columns.to(device, non_blocking=True)
        untouched = Part(first, cut, self.untouched.width, self.untouched.slice_from)
        return Split(untouched, Part(cut, stop, self.rest.width, self.rest.slice_from), self.seq)

    @cached_property
    def _origin(self) -> Int[Tensor, "batch seq"]:
        """Where each column of the batch is among the columns of both parts; 0 for padding."""
        column = torch.arange(self.seq, device=self.rest.first.device)  # (seq,)
        found = torch.zeros(len(self.rest.first), self.seq, dtype=torch.long, device=column.device)  # (batch, seq)
        for part, before in ((self.untouched, 0), (self.rest, self.untouched.width)):
            first, last = part.first.unsqueeze(1), part.last.unsqueeze(1)  # (batch, 1)
            found = torch.where((column >= first) & (column < last), column - first + before, found)
        return found

    def join(
        self, untouched: Shaped[Tensor, "batch width *rest"], rest: Shaped[Tensor, "batch more *rest"]
    ) -> Shaped[Tensor, "batch seq *rest"]:
        """Put what was computed of both parts back into the columns of the batch. Padding gets any token's value."""
        joined = torch.cat([untouched, rest], 1)  # (batch, untouched.width + rest.width, ...)
        if self.is_even:
            return joined
        origin = self._origin.to(joined.device)
        return joined[torch.arange(len(joined), device=joined.device).unsqueeze(1), origin]

    def slots_of_rest(self, slots: Int[Tensor, "batch n"], layout: Layout) -> Int[Tensor, "batch m"]:
        """The slots of the batch, none of which lies before the cut, as columns of the rest."""
        if not (layout.open_groups and layout.fits(slots, self.seq)):
            return self._shift(slots)
        counted = slots[:, : slots.shape[1] - len(layout.open_groups) * self.seq]
        _, regions = layout.split(slots, self.seq)
        taken = [self.rest.take(region, NO_POSITION) for region in regions]  # (batch, rest.width) each
        return self._shift(torch.cat([counted, *taken], 1))

    def _shift(self, slots: Tensor) -> Tensor:
        first = self.rest.first.unsqueeze(1).to(slots.device)  # (batch, 1)
        return torch.where(slots == NO_POSITION, NO_POSITION, slots - first)


def common_beginning(ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, *others = ids
    for number, token in enumerate(first):
        if any(len(row) <= number or row[number] != token for row in others):
            return number
    return len(first)


@dataclass
class OfRest:
    """The source of a forward that was given the rest of each row."""

    whole: dict[Wanted, Tensor | None]
    """The slots of the whole batch."""
    split: Split

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq) of the rest."""
        return len(self.split.rest.first), self.split.rest.width

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"] | None:
        """See `PositionSource`."""
        slots = self.whole[wanted]
        return None if slots is None else self.split.slots_of_rest(slots, wanted.layout)

    def check_cache(self, adapter: str, wanted: Wanted, rows: Bool[Tensor, " names"] | None = None) -> None:
        """The cache holds the untouched part, in which nothing is edited."""


@dataclass
class Untouched:
    """The source of a forward in which nothing is edited."""

    shape: tuple[int, int]
    """(batch, seq)"""

    def slots(self, wanted: Wanted) -> None:
        """See `PositionSource`."""

    def check_cache(self, adapter: str, wanted: Wanted, rows: Bool[Tensor, " names"] | None = None) -> None:
        """See `PositionSource`."""


def first_edited(slots: Sequence[Int[Tensor, "batch _"]], stop: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Column of each row's first edited token; `stop` in a row without one."""
    first = stop
    for each in slots:
        if each.shape[1]:
            lowest = torch.where(each == NO_POSITION, stop.unsqueeze(1), each).amin(1)  # (batch,)
            first = torch.minimum(first, lowest)
    return first
