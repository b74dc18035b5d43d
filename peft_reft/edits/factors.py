"""What a formula computes with, and the one place where an edit is computed from it. Pure torch.

There are two types, and each may have a `Gate` around it:

- `LowRankFactors`: ``edit(h) = Bᵀ z(h)``, where z is `Affine`, ``A h + b``; or `Activated`, ``f(A h + b) − C h − c``;
  or `Difference`, ``C (s − h)``.
- `ElementwiseFactors`: ``edit(h) = u ⊙ h + w``.

All tensors are float32. They have the same leading dimension G, for G edits side by side, or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

AnyPart = TypeVar("AnyPart", bound="Part")
AnyFactors = TypeVar("AnyFactors", bound="Factors")


# Metadata of a field that holds a tensor: its dimensions behind the leading one.
_RD, _R, _D, _ND, _1 = ({"dimensions": each} for each in ("rd", "r", "d", "nd", "1"))


@dataclass(frozen=True)
class Part:
    """A dataclass of tensors and of other parts, in the order of its fields."""

    def tensors(self) -> list[Tensor]:
        """All tensors, also those of parts inside."""
        return [tensor for tensor, _ in self._with_dimensions()]

    def dimensions(self) -> list[str]:
        """For each of `tensors()` its dimensions behind the leading one: "rd", "r", "d", "1" or "nd"."""
        return [dimensions for _, dimensions in self._with_dimensions()]

    def _with_dimensions(self) -> Iterator[tuple[Tensor, str]]:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Part):
                yield from value._with_dimensions()
            elif isinstance(value, Tensor):
                yield value, each.metadata["dimensions"]

    def with_tensors(self: AnyPart, tensors: Iterable[Tensor]) -> AnyPart:
        """The same with other tensors, in the order of `tensors()`."""
        following = iter(tensors)
        changed: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Part):
                changed[each.name] = value.with_tensors(following)
            elif isinstance(value, Tensor):
                changed[each.name] = next(following)
        return replace(self, **changed)

    @property
    def form(self) -> Hashable:
        """Equal for those that compute alike, whatever the shapes."""
        found: list[Any] = [type(self)]
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Part):
                found.append(value.form)
            else:
                found.append(Tensor if isinstance(value, Tensor) else value)
        return tuple(found)


@final
@dataclass(frozen=True)
class Gate(Part):
    """``tanh(v·h + c)``, by which an edit is multiplied."""

    weight: Tensor = field(metadata=_D)
    """v, (..., d)."""
    bias: Tensor = field(metadata=_1)
    """c, (..., 1)."""

    def of(self, h: Tensor) -> Tensor:
        """(..., n, 1), of h (..., n, d)."""
        # Not a product of matrix and vector, whose last bit depends on where in memory the vector lies.
        along = (h * self.weight.unsqueeze(-2)).sum(-1, keepdim=True)  # (..., n, 1)
        return torch.tanh(along + self.bias.unsqueeze(-2))


@dataclass(frozen=True)
class Coordinates(Part, ABC):
    """The r coordinates z of an edit of low rank."""

    @abstractmethod
    def of(self, h: Tensor) -> Tensor:
        """z, (..., n, r), of h (..., n, d)."""


@final
@dataclass(frozen=True)
class Affine(Coordinates):
    """``A h + b``, or b alone."""

    weight: Tensor | None = field(metadata=_RD)
    """A, (..., r, d)."""
    bias: Tensor = field(metadata=_R)
    """b, (..., r)."""

    def of(self, h: Tensor) -> Tensor:
        if self.weight is None:
            return self.bias.unsqueeze(-2).expand(*h.shape[:-1], -1)
        if h.ndim == 2:
            return torch.addmm(self.bias, h, self.weight.mT)
        return h @ self.weight.mT + self.bias.unsqueeze(-2)


@final
@dataclass(frozen=True)
class Activated(Coordinates):
    """``f(A h + b) − C h − c``, of which C, and c, may be missing."""

    inside: Affine
    """A and b."""
    function: Callable[[Tensor], Tensor]
    """f, elementwise."""
    subtracted: Tensor | None = field(default=None, metadata=_RD)
    """C, (..., r, d)."""
    subtracted_bias: Tensor | None = field(default=None, metadata=_R)
    """c, (..., r)."""

    def of(self, h: Tensor) -> Tensor:
        z = self.function(self.inside.of(h))  # (..., n, r)
        if self.subtracted is not None:
            z = z - h @ self.subtracted.mT
        return z if self.subtracted_bias is None else z - self.subtracted_bias.unsqueeze(-2)


@final
@dataclass(frozen=True)
class Difference(Coordinates):
    """``C (s − h)``, where s is another run's hidden state; 0 as long as there is no other run."""

    weight: Tensor = field(metadata=_RD)
    """C, (..., r, d)."""
    source: Tensor | None = field(default=None, metadata=_ND)
    """s, (..., n, d): one for each hidden state that is edited."""

    def of(self, h: Tensor) -> Tensor:
        if self.source is None:
            return h.new_zeros(*h.shape[:-1], self.weight.shape[-2])
        return (self.source - h) @ self.weight.mT


@dataclass(frozen=True)
class Factors(Part, ABC):
    """What an edit is computed from: `LowRankFactors` or `ElementwiseFactors`.

    Examples:
        >>> import torch
        >>> from peft_reft.edits.factors import Affine, LowRankFactors
        >>> basis, weight, bias, h = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2), torch.randn(5, 6)
        >>> factors = LowRankFactors(basis, Affine(weight, bias))
        >>> torch.allclose(factors.edit(h), (h @ weight.T + bias) @ basis, atol=1e-5)
        True
        >>> factors.rank, factors.d, factors.lead, factors.is_affine
        (2, 6, None, True)
    """

    gate: Gate | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The number of coordinates, or None for an edit without them."""

    @property
    @abstractmethod
    def lead(self) -> int | None:
        """The leading dimension G, or None if there is none."""

    @property
    @abstractmethod
    def d(self) -> int:
        """The hidden size."""

    @property
    @abstractmethod
    def is_affine(self) -> bool:
        """Whether the edit is a matrix times h, plus a vector."""

    @property
    def kind(self) -> Hashable:
        """Equal for those that can be stacked."""
        return self.form, tuple([tensor.shape for tensor in self.tensors()])

    def map(self: AnyFactors, function: Callable[[Tensor], Tensor]) -> AnyFactors:
        """With `function` applied to every tensor."""
        return self.with_tensors([function(tensor) for tensor in self.tensors()])

    @staticmethod
    def stack(several: Sequence[AnyFactors]) -> AnyFactors:
        """Those of one `kind` side by side, with one more leading dimension."""
        tensors = zip(*(factors.tensors() for factors in several), strict=True)
        return several[0].with_tensors([torch.stack(same) for same in tensors])

    def unstack(self: AnyFactors) -> list[AnyFactors]:
        """The inverse of `stack`."""
        # `unbind`, not an index for each: the gradient of an index is as large as the whole stack.
        return [self.with_tensors(each) for each in zip(*(tensor.unbind() for tensor in self.tensors()), strict=True)]

    def with_source(self, source: Tensor) -> Factors:
        """With the hidden states s of another run, (..., n, d) float32; for those of `Difference` alone."""
        raise TypeError(f"{type(self).__name__} takes no hidden states of another run.")

    def edit(self, h: Tensor, keep: Tensor | None = None) -> Tensor:
        """The edit of h.

        Args:
            h: (..., n, d) float32.
            keep: (..., n, 1), or (..., n, r) to keep a part of the subspace: what edits, and coordinates, count for.

        Returns:
            (..., n, d) float32.
        """
        change = self._ungated(h, keep)
        return change if self.gate is None else change * self.gate.of(h)

    @abstractmethod
    def _ungated(self, h: Tensor, keep: Tensor | None) -> Tensor:
        """`edit` without the gate."""


@final
@dataclass(frozen=True)
class LowRankFactors(Factors):
    """``edit(h) = Bᵀ z(h)``."""

    basis: Tensor = field(metadata=_RD)
    """B, (..., r, d)."""
    coordinates: Affine | Activated | Difference
    """z."""

    @property
    def rank(self) -> int:
        return self.basis.shape[-2]

    @property
    def lead(self) -> int | None:
        return len(self.basis) if self.basis.ndim == 3 else None

    @property
    def d(self) -> int:
        return self.basis.shape[-1]

    @property
    def is_affine(self) -> bool:
        return self.gate is None and isinstance(self.coordinates, Affine)

    def with_source(self, source: Tensor) -> LowRankFactors:
        if not isinstance(self.coordinates, Difference):
            return super().with_source(source)  # type: ignore[return-value]  # raises
        return replace(self, coordinates=replace(self.coordinates, source=source))

    def _ungated(self, h: Tensor, keep: Tensor | None) -> Tensor:
        z = self.coordinates.of(h)  # (..., n, r)
        return (z if keep is None else z * keep) @ self.basis


@final
@dataclass(frozen=True)
class ElementwiseFactors(Factors):
    """``edit(h) = u ⊙ h + w``, or w alone."""

    scale: Tensor | None = field(metadata=_D)
    """u, (..., d)."""
    shift: Tensor = field(metadata=_D)
    """w, (..., d)."""

    @property
    def rank(self) -> None:
        return None

    @property
    def lead(self) -> int | None:
        return len(self.shift) if self.shift.ndim == 2 else None

    @property
    def d(self) -> int:
        return self.shift.shape[-1]

    @property
    def is_affine(self) -> bool:
        return self.gate is None

    def _ungated(self, h: Tensor, keep: Tensor | None) -> Tensor:
        shift = self.shift.unsqueeze(-2)
        change = shift.expand_as(h) if self.scale is None else h * self.scale.unsqueeze(-2) + shift
        return change.clone() if keep is None else change * keep  # never the memory of w itself
