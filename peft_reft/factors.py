"""`Factors`: what an intervention computes with, and the one place where an edit is computed from it. Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """What an intervention computes with, ready to be multiplied: float32, all with the same leading dimensions.

    ``edit(h) = tanh(v·h + v0) · [Bᵀ(f(A h + b) − C(h − s) − c) + u ⊙ h + w]``, a term being left out where its tensor
    is None. A formula that is affine and of rank r comes as A, B and b alone.
    """

    a: Tensor | None = None
    """A, (..., r, d)."""
    b: Tensor | None = None
    """B, (..., r, d)."""
    bias: Tensor | None = None
    """b, (..., r)."""
    c: Tensor | None = None
    """C, (..., r, d)."""
    c_bias: Tensor | None = None
    """c, (..., r)."""
    source: Tensor | None = None
    """s, (..., n, d): hidden states of another run, one for each that is edited."""
    scale: Tensor | None = None
    """u, (..., d)."""
    shift: Tensor | None = None
    """w, (..., d)."""
    gate: Tensor | None = None
    """v, (..., d)."""
    gate_bias: Tensor | None = None
    """v0, (..., 1)."""
    act: Callable[[Tensor], Tensor] | None = None

    @property
    def is_affine(self) -> bool:
        """Whether the edit is a matrix times h, plus a vector."""
        return self.c is None and self.gate is None and self.act is None

    @property
    def lead(self) -> int | None:
        """The leading dimension, or None if there is none."""
        matrix = self.b if self.b is not None else self.shift.unsqueeze(-2)  # type: ignore[union-attr]
        return len(matrix) if matrix.ndim == 3 else None

    @property
    def d(self) -> int:
        """The hidden size."""
        return (self.b if self.b is not None else self.shift).shape[-1]  # type: ignore[union-attr]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for those that can be stacked."""
        return tuple(getattr(getattr(self, name), "shape", None) for name in TENSORS), self.act

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """With `function` applied to every tensor."""
        found: dict[str, Any] = {name: getattr(self, name) for name in TENSORS}
        changed: dict[str, Any] = {name: None if t is None else function(t) for name, t in found.items()}
        return replace(self, **changed)

    @staticmethod
    def stack(several: Sequence[Factors]) -> Factors:
        """Those of one `kind` side by side, with one more leading dimension."""
        found: dict[str, Any] = {name: [getattr(each, name) for each in several] for name in TENSORS}
        stacked: dict[str, Any] = {name: None if t[0] is None else torch.stack(t) for name, t in found.items()}
        return replace(several[0], **stacked)

    def inner(self, h: Tensor) -> Tensor:
        """``f(A h + b) − C(h − s) − c``, (..., n, r), of h (..., n, d) float32."""
        if self.bias is None:
            found = None
        elif self.a is None:
            found = self.bias.unsqueeze(-2).expand(*h.shape[:-1], -1)
        elif h.ndim == 2:
            found = torch.addmm(self.bias, h, self.a.mT)
        else:
            found = h @ self.a.mT + self.bias.unsqueeze(-2)
        if self.act is not None and found is not None:
            found = self.act(found)
        if self.c is not None:
            subtracted = (h if self.source is None else h - self.source) @ self.c.mT
            subtracted = subtracted if self.c_bias is None else subtracted + self.c_bias.unsqueeze(-2)
            found = -subtracted if found is None else found - subtracted
        assert found is not None
        return found

    def edit(self, h: Tensor, keep: Tensor | None = None) -> Tensor:
        """The edit of h.

        Args:
            h: (..., n, d) float32.
            keep: (..., n, 1), or (..., n, r) to keep a part of the subspace: what edits, and coordinates, count for.

        Returns:
            (..., n, d) float32.
        """
        if self.b is not None:
            inner = self.inner(h)
            change = (inner if keep is None else inner * keep) @ self.b
        else:
            assert self.shift is not None
            scaled = torch.zeros_like(h) if self.scale is None else h * self.scale.unsqueeze(-2)
            change = scaled + self.shift.unsqueeze(-2)
            change = change if keep is None else change * keep
        if self.gate is not None:
            assert self.gate_bias is not None
            # Not a product of matrix and vector, whose last bit depends on where in memory the vector lies.
            along = (h * self.gate.unsqueeze(-2)).sum(-1, keepdim=True)
            change = change * torch.tanh(along + self.gate_bias.unsqueeze(-2))
        return change


TENSORS = tuple(field.name for field in fields(Factors) if field.name != "act")
