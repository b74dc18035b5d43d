"""The weights of all adapters of one module, stacked, and the edit of a step's tokens with them. Pure torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..edits.factors import Affine, Factors, LowRankFactors


@dataclass(frozen=True)
class FormulaKey:
    """Equal for adapters whose edits can be computed together, whatever their ranks."""

    form: Hashable
    example: Factors = field(compare=False, repr=False)
    """Factors of this formula with empty tensors."""


def formula_key(factors: Factors) -> FormulaKey:
    """The key of the table that these factors belong to."""
    return FormulaKey(form=factors.form, example=factors.map(lambda tensor: tensor.new_empty([0] * tensor.ndim)))


LINEAR = formula_key(LowRankFactors(torch.empty(0, 0), Affine(torch.empty(0, 0), torch.empty(0))))
"""The key of most formulas, LoReFT's among them."""


@dataclass(frozen=True)
class DeviceWork:
    """`schedule.Work` on the model's device: a grid of e lines of t tokens."""

    sets: Tensor
    """(e,) int64: the set of weights of each line."""
    rows: Tensor
    """(e, t) int64: the rows of the tokens in the step; 0 if there is none."""
    valid: Tensor
    """(e, t, 1) bool: whether there is a token."""
    scale: Tensor | None
    """(e, t, 1) float32: what multiplies the edit of each token; None if all are 1."""


class Table:
    """The factors of all adapters in one module, float32: `sets` sets of weights of rank `r`.

    Each formula has tensors of its own, so the table has one stack for each formula among the adapters. In a stack,
    each tensor has a leading dimension of `sets + 1`. The last set is 0 and edits nothing. Smaller ranks are filled
    with 0.
    """

    def __init__(self, d: int, r: int, sets: int, device: torch.device) -> None:
        self.sizes = {"d": d, "r": r, "1": 1}
        self.sets = sets
        self.device = device
        self.stacks: dict[FormulaKey, Factors] = {}
        self.used: dict[FormulaKey, Factors] = {}
        """The same memory, up to the largest rank that has been written."""
        self.rank = 0

    def reserve(self, key: FormulaKey) -> None:
        """Make a stack for adapters of this formula, unless there is one."""
        if key in self.stacks:
            return
        empty: list[Tensor] = []
        for dimensions in key.example.dimensions():  # such as "rd"
            shape = [self.sizes[size] for size in dimensions]
            empty.append(torch.zeros(self.sets + 1, *shape, device=self.device))  # such as (sets + 1, r, d)
        self.stacks[key] = key.example.with_tensors(empty)

    def write(self, first: int, factors: Factors) -> None:
        """Write factors into the sets from `first` on.

        Args:
            first: the first set that is written.
            factors: one set of weights; or several, with a leading dimension.
        """
        key = formula_key(factors)
        self.reserve(key)
        for stack, own in zip(self.stacks[key].tensors(), factors.tensors()):
            if factors.lead is None:
                own = own.unsqueeze(0)  # (1, ...)
            sets = slice(first, first + len(own))
            corner = [slice(0, size) for size in own.shape[1:]]  # the adapter's rank may be smaller than the stack's
            stack[sets] = 0
            stack[(sets, *corner)] = own
        rank = max(self.rank, factors.rank or 0)
        if rank > self.rank or key not in self.used:
            self.rank = rank
            self.used = {each: self._narrow(stack) for each, stack in self.stacks.items()}

    def _narrow(self, stack: Factors) -> Factors:
        """Cut a stack to the largest rank in use, which is the dimension behind the sets."""
        narrowed: list[Tensor] = []
        for tensor, dimensions in zip(stack.tensors(), stack.dimensions()):
            narrowed.append(tensor[:, : self.rank] if "r" in dimensions else tensor)
        return stack.with_tensors(narrowed)

    def edit(self, key: FormulaKey, work: DeviceWork, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the tokens of `work` in place.

        Args:
            key: the formula.
            work: the tokens, and the sets of weights that edit them.
            hidden: (tokens, d), changed in place.
            residual: (tokens, d), or None. The formula sees `hidden + residual`.
        """
        rows = work.rows.flatten()  # (e * t,)
        h = hidden.index_select(0, rows)  # (e * t, d)
        if residual is not None:
            h = h + residual.index_select(0, rows)
        h = h.float().view(*work.rows.shape, -1)  # (e, t, d)
        edit = _choose(self.used[key], work.sets).edit(h)  # (e, t, d)
        if work.scale is not None:
            edit = edit * work.scale
        # An empty entry has row 0, which is another request's. Do not multiply by 0: the edit may be inf or NaN.
        edit = torch.where(work.valid, edit, 0)
        hidden.index_add_(0, rows, edit.view(len(rows), -1).to(hidden.dtype))

    def edit_all(self, key: FormulaKey, sets: Tensor, scale: Tensor, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit every token in place, each with its own set of weights.

        The operations and their shapes are the same whatever is edited, so that a captured graph can run them again.

        Args:
            key: the formula.
            sets: (tokens,) int64, the set of weights of each token.
            scale: (tokens, 1) float32, what multiplies the edit of each token.
            hidden: (tokens, d), changed in place.
            residual: (tokens, d), or None. The formula sees `hidden + residual`.
        """
        h = hidden if residual is None else hidden + residual
        h = h.float().unsqueeze(1)  # (tokens, 1, d)
        edit = _choose(self.stacks[key], sets).edit(h)  # (tokens, 1, d)
        hidden += (scale * edit.squeeze(1)).to(hidden.dtype)


def _choose(factors: Factors, sets: Tensor) -> Factors:
    """Factors with a leading dimension of `len(sets)`, one for each entry of `sets`."""
    return factors.map(lambda tensor: tensor.index_select(0, sets))
