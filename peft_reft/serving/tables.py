"""Weights of all adapters of one module, stacked by set; and the edit of a step's tokens. Pure torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..edits.factors import Affine, Factors, LowRankFactors


@dataclass(frozen=True)
class Kind:
    """How adapters compute: those of one kind are computed together, whatever their ranks."""

    form: Hashable
    example: Factors = field(compare=False, repr=False)
    """Factors of this kind, whose tensors are empty."""


def kind_of(factors: Factors) -> Kind:
    return Kind(factors.form, factors.map(lambda tensor: tensor.new_empty(0)))


@dataclass(frozen=True)
class DeviceWork:
    """`schedule.Work` on the model's device."""

    sets: Tensor
    """(e,) int64."""
    rows: Tensor
    """(e, t) int64."""
    kept: Tensor
    """(e, t, 1) bool: False at an empty place."""


LINEAR = kind_of(LowRankFactors(torch.empty(0), Affine(torch.empty(0), torch.empty(0))))
"""What most formulas come as, LoReFT among them."""


class Table:
    """Factors of every adapter in one module, float32, `sets` of them, of rank `r` (smaller ones are filled with 0).

    A formula computes with tensors of its own, so there is a stack for each kind of adapter that is loaded. One set
    more, the last, is left at 0 and edits nothing.
    """

    def __init__(self, d: int, r: int, sets: int, device: torch.device) -> None:
        self.sizes = {"d": d, "r": r, "1": 1}
        self.sets = sets
        self.device = device
        self.stacks: dict[Kind, Factors] = {}
        self.used: dict[Kind, Factors] = {}
        """The same memory, up to the largest rank that has been written."""
        self.rank = 0

    def reserve(self, kind: Kind) -> None:
        """Have a stack for adapters of this kind."""
        if kind not in self.stacks:
            shapes = [[self.sizes[size] for size in dimensions] for dimensions in kind.example.dimensions()]
            empty = [torch.zeros(self.sets + 1, *shape, device=self.device) for shape in shapes]
            self.stacks[kind] = kind.example.with_tensors(empty)

    def write(self, first: int, factors: Factors) -> None:
        """Put factors, with or without a leading dimension, at set `first` and those behind it."""
        kind = kind_of(factors)
        self.reserve(kind)
        for stack, own in zip(self.stacks[kind].tensors(), factors.tensors()):
            own = own if factors.lead is not None else own.unsqueeze(0)
            sets = slice(first, first + len(own))
            stack[sets] = 0
            stack[(sets, *(slice(0, size) for size in own.shape[1:]))] = own
        self.rank = max(self.rank, factors.rank or 0)
        self.used = {each: self._narrow(stack) for each, stack in self.stacks.items()}

    def _narrow(self, stack: Factors) -> Factors:
        pairs = zip(stack.tensors(), stack.dimensions())
        return stack.with_tensors([t[:, : self.rank] if "r" in dimensions else t for t, dimensions in pairs])

    def edit(self, kind: Kind, work: DeviceWork, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit `hidden` (tokens, d) in place, at `work.rows`; what is edited is `hidden + residual`."""
        rows = work.rows.flatten()
        h = hidden.index_select(0, rows)
        if residual is not None:
            h = h + residual.index_select(0, rows)
        edit = _choose(self.used[kind], work.sets).edit(h.float().view(*work.rows.shape, -1))
        # An empty place repeats token 0, another request's. Not a product with 0: the edit may not be finite.
        edit = torch.where(work.kept, edit, 0)
        hidden.index_add_(0, rows, edit.view(len(rows), -1).to(hidden.dtype))

    def edit_all(self, kind: Kind, sets: Tensor, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit every one of `hidden` (tokens, d) in place, with the set of weights that `sets` (tokens,) says.

        The same operations whatever is edited, on tensors of the same shapes: a captured graph can run them again.
        """
        h = hidden if residual is None else hidden + residual
        hidden += _choose(self.stacks[kind], sets).edit(h.float().unsqueeze(1)).squeeze(1).to(hidden.dtype)


def _choose(factors: Factors, sets: Tensor) -> Factors:
    return factors.map(lambda tensor: tensor.index_select(0, sets))
