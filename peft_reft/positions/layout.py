"""How the slots of `intervention_positions` are laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import Bool, Int
from .groups import Group

NO_POSITION = -1
"""Marks an empty slot. Columns start at 0; PEFT and transformers use -100 for labels."""


@dataclass(frozen=True)
class Layout:
    """Groups in order, and how `intervention_positions` has their slots: each slot holds a column of its row, or -1.

    The counted groups come first, answer by answer, in the order of `groups`. Each open-ended group follows with one
    slot for each column of the row, which holds that column or -1. With ``f2+l1+g``, two answers, five columns:

        slot     0   1   2   3   4   5   6 ... 10
        group    f2  f2  l1  f2  f2  l1  g ... g
                 answer 0    answer 1    columns 0 to 4

    Examples:
        >>> from peft_reft import Positions
        >>> layout = Positions.parse("f2+g").groups
        >>> layout.width, len(layout.open_groups)
        (2, 1)
    """

    groups: tuple[Group, ...]

    @property
    def width(self) -> int:
        """Number of slots that the counted groups take for each answer."""
        return sum(group.count or 0 for group in self.groups)

    @property
    def open_groups(self) -> list[Group]:
        """The open-ended groups, which take one slot for each column."""
        return [group for group in self.groups if group.is_open]

    @property
    def edits_every_token(self) -> bool:
        """Whether whole prompts and whole answers are edited (``all``)."""
        return len({group.decodes for group in self.open_groups}) == 2

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> Group:
        return self.groups[number]

    def __str__(self) -> str:
        return "+".join(map(str, self.groups))

    def offset(self, group: Group) -> int:
        """Slots before those of a counted `group`, among the slots of one answer."""
        before = 0
        for other in self.groups:  # not `index`, which torch.compile cannot follow
            if other == group:
                break
            before += other.count or 0
        return before

    def fits(self, slots: Int[Tensor, "batch n"], seq: int) -> bool:
        """Whether a row of `slots` can be read by this layout, in a batch of `seq` columns."""
        counted = slots.shape[1] - len(self.open_groups) * seq
        if counted < 0:
            return False
        return counted % self.width == 0 if self.width else counted == 0

    def split(
        self, slots: Int[Tensor, "batch n"], seq: int
    ) -> tuple[Int[Tensor, "batch answers width"], list[Int[Tensor, "batch seq"]]]:
        """The counted slots answer by answer, and the slots of each open-ended group.

        Raises:
            ValueError: the number of slots does not fit.
        """
        if not self.fits(slots, seq):
            open_groups = len(self.open_groups)
            plus = f" plus {open_groups} x {seq} (one slot a column for each open-ended group)" if open_groups else ""
            raise ValueError(
                f"intervention_positions has {slots.shape[1]} slots a row, which does not fit the groups {self}: "
                f"expected a multiple of {self.width}{plus}, in the order of the groups, one answer after the other, "
                "-1 where a slot is empty."
            )
        counted = slots.shape[1] - len(self.open_groups) * seq
        if self.width:
            by_answer = slots[:, :counted].unflatten(1, (-1, self.width))  # (batch, answers, width)
        else:
            by_answer = slots[:, :0].unsqueeze(1)  # (batch, 1, 0)
        starts = [counted + number * seq for number in range(len(self.open_groups))]
        return by_answer, [slots[:, at : at + seq] for at in starts]

    def columns(self, slots: Int[Tensor, "batch n"], seq: int) -> list[Int[Tensor, "batch m"]]:
        """The slots of each group, in the order of `groups`: (batch, answers * count), or (batch, seq) if open-ended.

        Raises:
            ValueError: the number of slots does not fit.
        """
        by_answer, regions = self.split(slots, seq)
        left = iter(regions)
        return [next(left) if group.is_open else self.select(by_answer, group).flatten(1) for group in self.groups]

    def select(
        self, by_answer: Int[Tensor, "batch answers width"], group: Group
    ) -> Int[Tensor, "batch answers count"]:
        """Of the counted slots answer by answer, those of one counted `group`."""
        offset = self.offset(group)
        return by_answer[..., offset : offset + (group.count or 0)]

    def join(
        self, counted: Sequence[Int[Tensor, "batch answers _"]], regions: Sequence[Int[Tensor, "batch seq"]]
    ) -> Int[Tensor, "batch n"]:
        """Lay out the slots of the counted groups, and of the open-ended ones, each in the order of `groups`."""
        flat = [torch.cat([*counted], -1).flatten(1)] if counted else []
        return torch.cat([*flat, *regions], 1)

    def bits(self, slots: Int[Tensor, "batch n"], seq: int) -> Int[Tensor, "batch seq"]:
        """int64: bit k is set at the tokens that the k-th group edits.

        Slots that do not fit the layout (a flat list of columns, which a caller may give) set bit 61.
        """
        if not self.fits(slots, seq):
            return mask_of(slots, seq).long() << 61
        bits = torch.zeros(slots.shape[0], seq, dtype=torch.long, device=slots.device)  # (batch, seq)
        for number, columns in enumerate(self.columns(slots, seq)):
            bits = bits | (mask_of(columns, seq).long() << number)
        return bits

    def part(self, slots: Int[Tensor, "batch n"], seq: int, start: int, stop: int) -> Int[Tensor, "batch m"]:
        """The slots of columns `start` to `stop` of a row of `seq` columns, counted from `start`.

        Returns:
            Slots of the same layout over `stop - start` columns.
        """
        counted = slots.shape[1] - len(self.open_groups) * seq
        pieces = [slots[:, :counted]]
        for number in range(len(self.open_groups)):
            at = counted + number * seq
            pieces.append(slots[:, at + start : at + stop])
        joined = torch.cat(pieces, 1)
        return torch.where((joined >= start) & (joined < stop), joined - start, NO_POSITION)


def mask_of(columns: Int[Tensor, "batch n"], seq: int) -> Bool[Tensor, "batch seq"]:
    """True at the `columns` of a row that are not -1."""
    hit = torch.zeros(columns.shape[0], seq + 1, dtype=torch.bool, device=columns.device)
    return hit.scatter(1, torch.where(columns >= 0, columns, seq), True)[:, :seq]  # column `seq` takes the empty slots
