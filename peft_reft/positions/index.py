"""From the slots of a batch to the rows of hidden states that one layer edits, in the order that its weights need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import Bool, Float, Int
from .layout import NO_POSITION, Layout, mask_of

Sharing = Literal["all", "group", "position"]
"""How the positions of one layer share weights: one set for all, one for each group, one for each slot."""


def weight_sets(groups: Layout, sharing: Sharing) -> int:
    """How many sets of weights a layer has that edits `groups`."""
    if sharing == "position":
        return groups.width
    return len(groups) if sharing == "group" else 1


@dataclass(frozen=True)
class PositionIndex:
    """What a layer needs to edit a batch of hidden states flattened to (batch * seq, d).

    There is either a gather (`rows`) or a mask (`mask`), never both. If positions do not share one set of weights,
    there is a leading dimension G, with one entry for each set.
    """

    rows: Int[Tensor, "*G n"] | None
    """int64, into batch * seq. An empty slot repeats some row, and is 0 in `valid`."""
    valid: Float[Tensor, "*G n 1"]
    """float32, 1 or 0: which of `rows` are edited, or `mask` as numbers."""
    mask: Bool[Tensor, "*G tokens 1"] | None
    """Which of the batch * seq tokens are edited."""
    shape: tuple[int, int]
    """(batch, seq) of the batch."""

    @property
    def edited(self) -> Bool[Tensor, " tokens"]:
        """Which of the batch * seq tokens are edited, by any set of weights."""
        if self.mask is not None:
            return self.mask.reshape(-1, self.shape[0] * self.shape[1]).any(0)
        assert self.rows is not None
        found = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.rows.device)
        found[self.rows[self.valid.squeeze(-1) > 0]] = True
        return found

    def to(self, device: torch.device) -> PositionIndex:
        """The same on another device."""
        rows = None if self.rows is None else self.rows.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, rows=rows, valid=self.valid.to(device), mask=mask)


def make_index(
    slots: Int[Tensor, "batch n"], seq: int, layout: Layout, groups: Layout, sharing: Sharing
) -> PositionIndex:
    """Pick `groups` out of the slots of a batch, ordered by the weights that edit them.

    Args:
        slots: int64 columns, -1 = none, laid out by `layout`.
        seq: number of columns of the batch.
        layout: of `slots`.
        groups: those that the layer edits, all of them in `layout`.
        sharing: which positions share a set of weights.

    Raises:
        ValueError: the number of slots does not fit the layout, and this layer must tell groups apart.
    """
    batch = slots.shape[0]
    if not slots.shape[1]:
        slots = slots.new_full((batch, 1), NO_POSITION)  # a flat list of nothing
    if groups.open_groups:
        mask = _masks(slots, seq, layout, groups, sharing)
        return PositionIndex(None, mask.float(), mask, (batch, seq))
    # With f2+l1, two answers:         columns, sharing="all"       "group"            "position"
    #   slots      f f l  f f l        [f f l f f l]                [f f f f]          [f f]
    #                                                               [l - l -]          [f f]
    #                                                                                  [l l]
    if sharing == "all" and groups == layout:
        columns = slots.unsqueeze(0)  # (1, batch, n): a flat list of columns needs no layout, a caller may give one
    else:
        by_answer, _ = layout.split(slots, seq)
        picked = [layout.select(by_answer, group) for group in groups]  # (batch, K, count) each
        if sharing == "position":
            columns = torch.cat(picked, -1).permute(2, 0, 1)  # (G, batch, K)
        elif sharing == "group":
            widest = max(group.shape[-1] for group in picked)
            padded = [F.pad(group, (0, widest - group.shape[-1]), value=NO_POSITION) for group in picked]
            columns = torch.stack(padded).flatten(2)  # (G, batch, K * widest)
        else:
            columns = torch.cat(picked, -1).flatten(1).unsqueeze(0)  # (1, batch, K * width)
    is_filled = columns >= 0  # (G, batch, n)
    first_of_row = torch.arange(batch, device=slots.device).unsqueeze(-1) * seq  # (batch, 1)
    # An empty slot repeats a column that its row edits, so it reads a real token if the row has any.
    stand_in = columns.amax((0, 2)).clamp_min(0).unsqueeze(-1)  # (batch, 1)
    rows = (torch.where(is_filled, columns, stand_in) + first_of_row).flatten(1)  # (G, batch * n)
    valid = is_filled.flatten(1).unsqueeze(-1).float()  # (G, batch * n, 1)
    if sharing == "all":
        rows, valid = rows[0], valid[0]
    return PositionIndex(rows, valid, None, (batch, seq))


def _masks(
    slots: Int[Tensor, "batch n"], seq: int, layout: Layout, groups: Layout, sharing: Sharing
) -> Bool[Tensor, "*G tokens 1"]:
    """Which of the batch * seq tokens each set of weights edits."""
    if sharing == "all" and groups == layout:
        regions = [slots]
    else:
        of_group = dict(zip(layout, layout.columns(slots, seq)))
        regions = [of_group[group] for group in groups]
    stacked = torch.stack([mask_of(region, seq).flatten().unsqueeze(-1) for region in regions])  # (groups, tokens, 1)
    return stacked if sharing == "group" else stacked.any(0)
