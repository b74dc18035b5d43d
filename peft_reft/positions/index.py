"""From the slots of a batch to the rows of hidden states that one layer edits, arranged as its weights are tied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .resolve import mask_of
from .spec import NO_POSITION, Group, Layout, slots_per_answer

Arrangement = Literal["all", "group", "position"]


@dataclass(frozen=True)
class PositionIndex:
    """What a layer needs to edit a batch of hidden states flattened to (batch * seq, d).

    Either a gather (`rows`) or a mask (`mask`), never both. With an arrangement by group or position there is a
    leading dimension G, one entry for each intervention.
    """

    rows: Tensor | None
    """(n,) or (G, n) int64 into batch * seq; an empty slot repeats some row, which `keep` then drops."""
    keep: Tensor
    """float32, 1 or 0: (n, 1) or (G, n, 1) with `rows`, else as `mask`."""
    mask: Tensor | None
    """(batch * seq, 1) or (G, batch * seq, 1) bool."""
    shape: tuple[int, int]
    """(batch, seq) of the batch these belong to."""

    @property
    def edited(self) -> Tensor:
        """(batch * seq,) bool: which tokens any of the interventions edits."""
        if self.mask is not None:
            return self.mask.reshape(-1, self.shape[0] * self.shape[1]).any(0)
        assert self.rows is not None
        found = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.rows.device)
        found[self.rows[self.keep.squeeze(-1) > 0]] = True
        return found

    def to(self, device: torch.device) -> PositionIndex:
        rows, mask = (None if tensor is None else tensor.to(device) for tensor in (self.rows, self.mask))
        return replace(self, rows=rows, keep=self.keep.to(device), mask=mask)


def arrange(slots: Tensor, seq: int, layout: Layout, groups: Layout, by: Arrangement) -> PositionIndex:
    """Pick `groups` out of a slot tensor laid out by `layout` and order it the way a layer's weights are tied.

    Args:
        slots: (batch, n) int64 token columns, -1 = none, laid out as `resolve` does.
        seq: number of columns of the batch.
        layout: groups that `slots` was laid out by.
        groups: groups that this layer edits, a subset of `layout`.
        by: `"all"` one intervention for every position, `"group"` one for each group, `"position"` one for each slot.

    Raises:
        ValueError: the number of slots does not fit the layout, and this layer must tell groups apart.
    """
    batch = slots.shape[0]
    if not slots.shape[1]:
        slots = slots.new_full((batch, 1), NO_POSITION)  # a flat list of nothing
    if not all(group.count for group in groups):
        mask = _masks(slots, seq, layout, groups, by)
        return PositionIndex(None, mask.float(), mask, (batch, seq))
    if by == "all" and groups == layout:
        columns = slots.unsqueeze(0)  # a flat list needs no layout: a user's own stays valid
    else:
        by_answer = _by_answer(slots, seq, layout)
        picked = [_select(by_answer, layout, group) for group in groups]
        if by == "position":
            columns = torch.cat(picked, -1).permute(2, 0, 1).flatten(2)
        elif by == "group":
            widest = max(group.shape[-1] for group in picked)
            pad = [F.pad(g, (0, widest - g.shape[-1]), value=NO_POSITION) for g in picked]
            columns = torch.stack(pad).flatten(2)
        else:
            columns = torch.cat(picked, -1).flatten(1).unsqueeze(0)
    valid = columns >= 0
    row = torch.arange(batch, device=slots.device).unsqueeze(-1) * seq
    stand_in = columns.amax((0, 2)).clamp_min(0).unsqueeze(-1)  # a real token of the row wherever it has any
    rows = (torch.where(valid, columns, stand_in) + row).flatten(1)
    valid = valid.flatten(1).unsqueeze(-1)
    if by == "all":
        rows, valid = rows[0], valid[0]
    return PositionIndex(rows, valid.float(), None, (batch, seq))


def _by_answer(slots: Tensor, seq: int, layout: Layout) -> Tensor:
    """The counted part of `slots` as (batch, K, slots per answer)."""
    width, open_groups = slots_per_answer(layout), sum(group.count is None for group in layout)
    counted = slots.shape[1] - open_groups * seq
    if counted < 0 or (width and counted % width) or (not width and counted):
        raise ValueError(
            f"intervention_positions has {slots.shape[1]} slots a row, which does not fit the groups "
            f"{'+'.join(map(str, layout))}: expected a multiple of {width}"
            + (f" plus {open_groups} x {seq} (one slot a column for each open-ended group)" if open_groups else "")
            + ", in the order of the groups, one answer after the other, -1 where a slot is empty."
        )
    return slots[:, :counted].unflatten(1, (-1, width)) if width else slots[:, :0].unsqueeze(1)


def _select(by_answer: Tensor, layout: Layout, group: Group) -> Tensor:
    """Slots of one counted `group`: (batch, K, group.count)."""
    before = 0
    for other in layout:  # not `index`, which torch.compile cannot follow
        if other == group:
            break
        before += other.count or 0
    return by_answer[..., before : before + (group.count or 0)]


def _masks(slots: Tensor, seq: int, layout: Layout, groups: Layout, by: Arrangement) -> Tensor:
    regions = [slots] if by == "all" and groups == layout else _regions(slots, seq, layout, groups)
    stacked = torch.stack([mask_of(region, seq).flatten().unsqueeze(-1) for region in regions])
    return stacked if by == "group" else stacked.any(0)


def _regions(slots: Tensor, seq: int, layout: Layout, groups: Layout) -> list[Tensor]:
    """The columns of each of `groups`, (batch, n) a group; ValueError if `slots` do not fit the layout."""
    by_answer = _by_answer(slots, seq, layout)  # (batch, K, slots per answer)
    counted = by_answer.shape[1] * by_answer.shape[2]
    open_groups = [group for group in layout if group.count is None]
    regions = []
    for group in groups:
        if group.count is None:
            at = counted + open_groups.index(group) * seq
            regions.append(slots[:, at : at + seq])
        else:
            regions.append(_select(by_answer, layout, group).flatten(1))
    return regions


def group_bits(slots: Tensor, seq: int, layout: Layout) -> Tensor:
    """(batch, seq) int64: bit k is set at the tokens that the k-th group of `layout` edits.

    `slots` that do not fit the layout (a caller's flat list of columns) set bit 61.
    """
    try:
        regions = _regions(slots, seq, layout, layout)
    except ValueError:
        return mask_of(slots, seq).long() << 61
    bits = torch.zeros(slots.shape[0], seq, dtype=torch.long, device=slots.device)
    for number, region in enumerate(regions):
        bits = bits | (mask_of(region, seq).long() << number)
    return bits
