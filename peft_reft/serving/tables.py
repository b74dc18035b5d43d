"""Weights of all adapters of one module, stacked by set; and the edit of a step's tokens. Pure torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


class Table:
    """Factors of every adapter in one module, float32, `sets` of them, of rank `r` (smaller ones are filled with 0).

    A formula computes with tensors of its own, so there is a stack for each kind of adapter that is loaded.
    """

    def __init__(self, d: int, r: int, sets: int, device: torch.device) -> None:
        self.sizes = {"d": d, "r": r, "1": 1}
        self.sets = sets
        self.device = device
        self.stacks: dict[Kind, Factors] = {}

    def write(self, first: int, factors: Factors) -> None:
        """Put factors, with or without a leading dimension, at set `first` and those behind it."""
        kind = kind_of(factors)
        if kind not in self.stacks:
            empty = {
                name: torch.zeros((self.sets, *(self.sizes[s] for s in _SHAPES.get(name, "d"))), device=self.device)
                for name in kind[1]
            }
            self.stacks[kind] = Factors(act=kind[0], **empty)
        lead = factors.lead
        for name in kind[1]:
            stack, own = getattr(self.stacks[kind], name), getattr(factors, name)
            own = own if lead is not None else own.unsqueeze(0)
            at = (slice(first, first + len(own)), *(slice(0, size) for size in own.shape[1:]))
            stack[slice(first, first + len(own))] = 0
            stack[at] = own

    def edit(self, kind: Kind, work: DeviceWork, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit `hidden` (tokens, d) in place, at `work.rows`; what is edited is `hidden + residual`."""
        rows = work.rows.flatten()
        h = hidden.index_select(0, rows)
        if residual is not None:
            h = h + residual.index_select(0, rows)
        factors = self.stacks[kind].map(lambda tensor: tensor.index_select(0, work.sets))
        edit = factors.edit(h.float().view(*work.rows.shape, -1), work.keep)
        hidden.index_add_(0, rows, edit.view(len(rows), -1).to(hidden.dtype))


def to_device(work: Any, device: torch.device) -> DeviceWork:
    """A `schedule.Work` as tensors."""
    sets, rows, keep = (torch.from_numpy(array).to(device) for array in (work.sets, work.rows, work.keep))
    return DeviceWork(sets, rows, keep)
