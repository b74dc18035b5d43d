"""What a formula computes with, and the one place where an edit is computed from it. Pure torch.

There are two types, and either may have a `Gate` around it:

- `LowRankFactors`: ``edit(h) = Bᵀ z(h)``, where z is `Affine`, ``A h + b``; or `Activated`, ``f(A h + b) − C h − c``;
  or `Difference`, ``C (s − h)``.
- `ElementwiseFactors`: ``edit(h) = u ⊙ h + w``; or one of the two terms.

All tensors are float32. Either all of them have the same leading dimension G, which holds G edits side by side, or
none has one. In shapes r is the rank, d the hidden size, n the number of hidden states, and ``...`` is G or nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from ..shapes import Float

AnyPart = TypeVar("AnyPart", bound="Part")
AnyFactors = TypeVar("AnyFactors", bound="Factors")


# Metadata of a field that holds a tensor: its dimensions behind the leading one, a letter for each.
_R_D = {"dimensions": "rd"}
_R = {"dimensions": "r"}
_D = {"dimensions": "d"}
_N_D = {"dimensions": "nd"}
_1 = {"dimensions": "1"}


@dataclass(frozen=True)
class Part:
    """A dataclass whose fields are tensors, other parts, or settings.

    Its methods read and replace all tensors at once, whichever formula they belong to. The order of the tensors is the
    order of the fields; a part stands for the tensors inside it, and a field that is None for no tensor.
    """

    def tensors(self) -> list[Tensor]:
        """Return all tensors, those of parts inside included."""
        return [tensor for tensor, _ in self._with_dimensions()]

    def dimensions(self) -> list[str]:
        """Return the dimensions of each of `tensors()` behind the leading one: "rd", "r", "d", "1" or "nd"."""
        return [dimensions for _, dimensions in self._with_dimensions()]

    def _with_dimensions(self) -> Iterator[tuple[Tensor, str]]:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Part):
                yield from value._with_dimensions()
            elif isinstance(value, Tensor):
                yield value, each.metadata["dimensions"]

    def with_tensors(self: AnyPart, tensors: Iterable[Tensor]) -> AnyPart:
        """Return the same part with other tensors, given in the order of `tensors()`."""
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
        """Equal for parts that compute the same expression, whatever their shapes."""
        found: list[Any] = [type(self)]
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Part):
                found.append(value.form)
            elif isinstance(value, Tensor):
                found.append(Tensor)
            else:
                found.append(value)
        return tuple(found)


@final
@dataclass(frozen=True)
class Gate(Part):
    """``tanh(v·h + c)``: a number for each hidden state, which multiplies its edit."""

    weight: Float[Tensor, "... d"] = field(metadata=_D)
    """v."""
    bias: Float[Tensor, "... 1"] = field(metadata=_1)
    """c."""

    def compute(self, h: Float[Tensor, "... n d"]) -> Float[Tensor, "... n 1"]:
        """Return the gate of each hidden state."""
        # Not a product of matrix and vector: the last bit of that depends on where in memory the vector lies.
        along = (h * self.weight.unsqueeze(-2)).sum(-1, keepdim=True)  # (..., n, 1)
        return torch.tanh(along + self.bias.unsqueeze(-2))  # (..., n, 1)


@dataclass(frozen=True)
class Coordinates(Part, ABC):
    """The r coordinates z of a low-rank edit."""

    @abstractmethod
    def compute(self, h: Float[Tensor, "... n d"]) -> Float[Tensor, "... n r"]:
        """Return z of each hidden state."""


@final
@dataclass(frozen=True)
class Affine(Coordinates):
    """``A h + b``; or b alone, if there is no A."""

    weight: Float[Tensor, "... r d"] | None = field(metadata=_R_D)
    """A."""
    bias: Float[Tensor, "... r"] = field(metadata=_R)
    """b."""

    def compute(self, h: Float[Tensor, "... n d"]) -> Float[Tensor, "... n r"]:
        if self.weight is None:
            return self.bias.unsqueeze(-2).expand(*h.shape[:-1], -1)
        if h.ndim == 2:
            return torch.addmm(self.bias, h, self.weight.mT)  # one kernel, not two
        return h @ self.weight.mT + self.bias.unsqueeze(-2)


@final
@dataclass(frozen=True)
class Activated(Coordinates):
    """``f(A h + b) − C h − c``; a term is left out if its C, or its c, is None."""

    inside: Affine
    """A and b."""
    function: Callable[[Tensor], Tensor]
    """f, elementwise."""
    subtracted: Float[Tensor, "... r d"] | None = field(default=None, metadata=_R_D)
    """C."""
    subtracted_bias: Float[Tensor, "... r"] | None = field(default=None, metadata=_R)
    """c."""

    def compute(self, h: Float[Tensor, "... n d"]) -> Float[Tensor, "... n r"]:
        z = self.function(self.inside.compute(h))  # (..., n, r)
        if self.subtracted is not None:
            z = z - h @ self.subtracted.mT
        if self.subtracted_bias is not None:
            z = z - self.subtracted_bias.unsqueeze(-2)
        return z


@final
@dataclass(frozen=True)
class Difference(Coordinates):
    """``C (s − h)``, where s is the hidden state of a source run; 0, if there is no source run."""

    weight: Float[Tensor, "... r d"] = field(metadata=_R_D)
    """C."""
    source_hidden: Float[Tensor, "... n d"] | None = field(default=None, metadata=_N_D)
    """s: one for each hidden state that is edited."""

    def compute(self, h: Float[Tensor, "... n d"]) -> Float[Tensor, "... n r"]:
        if self.source_hidden is None:
            return h.new_zeros(*h.shape[:-1], self.weight.shape[-2])
        return (self.source_hidden - h) @ self.weight.mT


@dataclass(frozen=True)
class Factors(Part, ABC):
    """What an edit is computed from: either `LowRankFactors` or `ElementwiseFactors`.

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
    """Multiplies the edit, if there is one."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The number of coordinates; None for an elementwise edit, which has none."""

    @property
    @abstractmethod
    def lead(self) -> int | None:
        """The leading dimension G; None if the tensors have none."""

    @property
    @abstractmethod
    def d(self) -> int:
        """The hidden size."""

    @property
    @abstractmethod
    def is_affine(self) -> bool:
        """Whether the edit is a matrix times h, plus a vector."""

    @property
    def signature(self) -> Hashable:
        """Equal for factors that can be stacked: same expression, same shapes."""
        return self.form, tuple([tensor.shape for tensor in self.tensors()])

    def map(self: AnyFactors, function: Callable[[Tensor], Tensor]) -> AnyFactors:
        """Return the factors with `function` applied to every tensor."""
        return self.with_tensors([function(tensor) for tensor in self.tensors()])

    @staticmethod
    def stack(several: Sequence[AnyFactors]) -> AnyFactors:
        """Stack factors of one `signature` along a new leading dimension."""
        tensors = zip(*(factors.tensors() for factors in several), strict=True)
        return several[0].with_tensors([torch.stack(same) for same in tensors])

    def unstack(self: AnyFactors) -> list[AnyFactors]:
        """Undo `stack`."""
        # `unbind`, not an index for each: the gradient of an index is as large as the whole stack.
        unbound = [tensor.unbind() for tensor in self.tensors()]
        return [self.with_tensors(each) for each in zip(*unbound, strict=True)]

    def join_heads(self: AnyFactors) -> AnyFactors:
        """Return one edit of hidden states of size H·d that edits each of H slices by factors of its own.

        The tensors have H in front, behind a leading dimension G if there is one. The edit of rank r of each slice
        makes one of rank H·r, whose matrices are block-diagonal::

            B of 2 heads, r = 1, d = 2      [1 2]   [3 4]        [1 2 0 0]
                                                           ->    [0 0 3 4]

        Raises:
            TypeError: there is a gate, which would multiply the edits of all slices.
        """
        if self.gate is not None:
            raise TypeError("A gate multiplies the whole edit of a hidden state: heads cannot have one each.")
        joined = []
        for tensor, dimensions in self._with_dimensions():
            if dimensions == "rd":
                eye = torch.eye(tensor.shape[-3], device=tensor.device)  # (H, H)
                blocks = tensor.unsqueeze(-2) * eye.unsqueeze(-2).unsqueeze(-1)  # (..., H, r, H, d)
                joined.append(blocks.flatten(-4, -3).flatten(-2, -1))  # (..., H·r, H·d)
            else:  # "r" or "d"
                joined.append(tensor.flatten(-2, -1))
        return self.with_tensors(joined)

    def with_source_hidden(self, source_hidden: Float[Tensor, "... n d"]) -> Factors:
        """Return the factors with the hidden states s of a source run put into them.

        Raises:
            TypeError: the coordinates are no `Difference`, the only ones that compute with s.
        """
        raise TypeError(f"{type(self).__name__} takes no hidden states of a source run.")

    def edit(
        self, h: Float[Tensor, "... n d"], keep: Float[Tensor, "... n _"] | None = None
    ) -> Float[Tensor, "... n d"]:
        """Compute the edit of each hidden state.

        Args:
            h: (..., n, d) float32.
            keep: (..., n, 1), which multiplies each edit, or (..., n, r), which multiplies each of its coordinates;
                None multiplies nothing.

        Returns:
            (..., n, d) float32.
        """
        change = self._ungated(h, keep)
        return change if self.gate is None else change * self.gate.compute(h)

    @abstractmethod
    def _ungated(self, h: Tensor, keep: Tensor | None) -> Tensor:
        """Compute `edit` without the gate."""


@final
@dataclass(frozen=True)
class LowRankFactors(Factors):
    """``edit(h) = Bᵀ z(h)``."""

    basis: Float[Tensor, "... r d"] = field(metadata=_R_D)
    """B."""
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

    def with_source_hidden(self, source_hidden: Float[Tensor, "... n d"]) -> Factors:
        if not isinstance(self.coordinates, Difference):
            return super().with_source_hidden(source_hidden)  # raises
        return replace(self, coordinates=replace(self.coordinates, source_hidden=source_hidden))

    def _ungated(self, h: Tensor, keep: Tensor | None) -> Tensor:
        z = self.coordinates.compute(h)  # (..., n, r)
        if keep is not None:
            z = z * keep
        return z @ self.basis  # (..., n, d)


@final
@dataclass(frozen=True)
class ElementwiseFactors(Factors):
    """``edit(h) = u ⊙ h + w``; a term is left out if its u, or its w, is None.

    Raises:
        ValueError: both are None.
    """

    scale: Float[Tensor, "... d"] | None = field(metadata=_D)
    """u."""
    shift: Float[Tensor, "... d"] | None = field(metadata=_D)
    """w."""

    def __post_init__(self) -> None:
        if self.scale is None and self.shift is None:
            raise ValueError("scale=None, shift=None: an elementwise edit needs a scale, a shift, or both.")

    @property
    def rank(self) -> None:
        return None

    @property
    def lead(self) -> int | None:
        one = self._one_of_them()  # ([G,] d)
        return len(one) if one.ndim == 2 else None

    @property
    def d(self) -> int:
        return self._one_of_them().shape[-1]

    @property
    def is_affine(self) -> bool:
        return self.gate is None

    def _one_of_them(self) -> Tensor:
        """Return u; or w, if there is no u. Both have the shape ([G,] d)."""
        one = self.shift if self.scale is None else self.scale
        assert one is not None
        return one

    def _ungated(self, h: Tensor, keep: Tensor | None) -> Tensor:
        change = torch.zeros_like(h) if self.scale is None else h * self.scale.unsqueeze(-2)  # (..., n, d)
        if self.shift is not None:
            change = change + self.shift.unsqueeze(-2)
        return change if keep is None else change * keep
