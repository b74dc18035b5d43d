"""Weights of all adapters of one module, stacked by set; and the edit of a step's tokens. Pure torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..factors import TENSORS, Factors

_SHAPES = {"a": "rd", "b": "rd", "c": "rd", "bias": "r", "c_bias": "r", "gate_bias": "1"}  # the others: "d"

Kind = tuple[Callable[[Tensor], Tensor] | None, frozenset[str]]
"""Activation, and which tensors there are: adapters alike in both are computed together, whatever their ranks."""


def kind_of(factors: Factors) -> Kind:
    return factors.act, frozenset(name for name in TENSORS if getattr(factors, name) is not None)


@dataclass(frozen=True)
class DeviceWork:
    """`schedule.Work` on the model's device."""

    sets: Tensor
    """(e,) int64."""
    rows: Tensor
    """(e, t) int64."""
    keep: Tensor
    """(e, t, 1) float32."""


LINEAR: Kind = (None, frozenset(("a", "b", "bias")))
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
            shapes = {name: [self.sizes[size] for size in _SHAPES.get(name, "d")] for name in kind[1]}
            empty = {name: torch.zeros(self.sets + 1, *shape, device=self.device) for name, shape in shapes.items()}
            self.stacks[kind] = Factors(act=kind[0], **empty)

    def write(self, first: int, factors: Factors) -> None:
        """Put factors, with or without a leading dimension, at set `first` and those behind it."""
        kind = kind_of(factors)
        self.reserve(kind)
        lead = factors.lead
        for name in kind[1]:
            stack, own = getattr(self.stacks[kind], name), getattr(factors, name)
            own = own if lead is not None else own.unsqueeze(0)
            at = (slice(first, first + len(own)), *(slice(0, size) for size in own.shape[1:]))
            stack[slice(first, first + len(own))] = 0
            stack[at] = own
        self.rank = max(self.rank, 0 if factors.b is None else factors.b.shape[-2])
        self.used = {each: self._narrow(stack) for each, stack in self.stacks.items()}

    def _narrow(self, stack: Factors) -> Factors:
        ranked = {
            name: t[:, : self.rank]
            for name in TENSORS
            if "r" in _SHAPES.get(name, "d") and (t := getattr(stack, name)) is not None
        }
        return replace(stack, **ranked)

    def edit(self, kind: Kind, work: DeviceWork, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit `hidden` (tokens, d) in place, at `work.rows`; what is edited is `hidden + residual`."""
        rows = work.rows.flatten()
        h = hidden.index_select(0, rows)
        if residual is not None:
            h = h + residual.index_select(0, rows)
        edit = _choose(self.used[kind], work.sets).edit(h.float().view(*work.rows.shape, -1), work.keep)
        hidden.index_add_(0, rows, edit.view(len(rows), -1).to(hidden.dtype))

    def edit_all(self, kind: Kind, sets: Tensor, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit every one of `hidden` (tokens, d) in place, with the set of weights that `sets` (tokens,) says.

        The same operations whatever is edited, on tensors of the same shapes: a captured graph can run them again.
        """
        h = hidden if residual is None else hidden + residual
        hidden += _choose(self.stacks[kind], sets).edit(h.float().unsqueeze(1)).squeeze(1).to(hidden.dtype)


def _choose(factors: Factors, sets: Tensor) -> Factors:
    return factors.map(lambda tensor: tensor.index_select(0, sets))
