"""The edits: one abstract class, and one final class for each formula of the paper (arXiv 2404.03592).

Every formula here is affine of rank r, ``edit(h) = Bᵀ(A h + b)``, and a class is what it puts for A and B:

===========  =====================  =========================  ==================
name         Φ(h) − h               A, B                       source
===========  =====================  =========================  ==================
loreft       Rᵀ(Wh + b − Rh)        W − R, R                   eq. 2
noreft       W2ᵀ(W1h + b − W2h)     W1 − W2, W2                table of ablations
direft       Rᵀ(Wh + b)             W, R                       table of ablations
nodireft     W2ᵀ(W1h + b)           W1, W2                     eq. 3 (DiReFT)
consreft     Rᵀ(b − Rh)             −R, R                      table of ablations
lobireft     Rᵀb                    none, R                    table of ablations
===========  =====================  =========================  ==================

R has orthonormal rows. It is stored as it is used: the parameter holds R itself, training moves it along the tangent
of the Stiefel manifold and every training forward pulls it back onto it (`orthonormal`). A saved R is thus exactly the
R that computed, and training resumed from it goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

InitWeights = bool | Literal["paper"]
Factors = tuple[Tensor | None, Tensor, Tensor]
"""A, B and b of ``edit(h) = Bᵀ(A h + b)``, float32."""

_TOLERANCE = 4e-6
"""Largest |L − I|, about half of |RRᵀ − I|, that counts as orthonormal: above what QR leaves in fp32 (4e-7), below the
promised 1e-5."""


def orthonormalise(a: Tensor) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt of the rows: ``a = L R`` with L lower triangular, positive diagonal, and R Rᵀ = I.

    An `a` that is orthonormal already comes back bit for bit (L = I). That is what makes a reloaded adapter equal the
    saved one exactly. QR with the signs fixed is this decomposition at any condition number; raw QR flips signs.

    Args:
        a: (..., r, d) float32, r <= d, of full rank.

    Returns:
        R (..., r, d) and L (..., r, r), float32.
    """
    q, upper = torch.linalg.qr(a.mT)
    sign = torch.copysign(torch.ones((), device=a.device), upper.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
    lower = (upper * sign.mT).mT
    eye = torch.eye(a.shape[-2], device=a.device)
    is_orthonormal = (lower - eye).abs().amax((-2, -1), keepdim=True) <= _TOLERANCE
    return torch.where(is_orthonormal, a, (q * sign).mT), torch.where(is_orthonormal, eye, lower)


class _Orthonormalise(torch.autograd.Function):
    """`orthonormalise` with its gradient, and the pull back onto the manifold.

    With dX = L⁻¹dA, the differential is dR = dX − Φ(dX Rᵀ + R dXᵀ)R, Φ the lower triangle with half the diagonal
    (the differential of a Cholesky factor). Written by hand because autograd through `torch.where` would take the
    gradient of the identity, not of the projection, where `a` is orthonormal.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, pull_back: bool) -> Tensor:
        r, lower = orthonormalise(a)
        if pull_back:
            # `.data`: the next forward before this one's backward (DPO, accumulation) writes the same bits again, and
            # must not look like a change to autograd. From here on L = I.
            a.data.copy_(r)
            ctx.save_for_backward(r)
        else:
            ctx.save_for_backward(r, lower)
        return r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        r, *lower = ctx.saved_tensors
        inner = grads[0] @ r.mT
        symmetric = inner.tril() + inner.tril(-1).mT
        grad = grads[0] - symmetric @ r
        if lower:
            grad = torch.linalg.solve_triangular(lower[0].mT, grad, upper=True)
        return grad, None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off for what runs inside; nothing at all where it is off already, which is nearly always."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def apply_factors(h: Tensor, a: Tensor | None, b: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``A h + b`` and ``Bᵀ(A h + b)``.

    Args:
        h: (..., n, d) float32.
        a: (..., r, d), or None for a formula without one.
        b: (..., r, d).
        bias: (..., r).

    Returns:
        (..., n, r) and (..., n, d).
    """
    inner = inner_of(h, a, bias)
    return inner, inner @ b


def inner_of(h: Tensor, a: Tensor | None, bias: Tensor) -> Tensor:
    """``A h + b``, (..., n, r), of what `apply_factors` takes."""
    if a is None:
        return bias.unsqueeze(-2).expand(*h.shape[:-1], -1)
    return torch.addmm(bias, h, a.mT) if h.ndim == 2 else h @ a.mT + bias.unsqueeze(-2)


class Intervention(nn.Module, ABC):
    """A learned edit of hidden states, ``edit(h) = Φ(h) − h``.

    Args:
        d: hidden size.
        r: rank, 1 <= r <= d.
        count: how many independent interventions to hold, or None for one. They are computed side by side: parameters
            and inputs have a leading dimension G = `count` then.
        init_weights: True: Φ is the identity at the start wherever the formula allows; `"paper"`: as the authors'
            code; False: random, for tests.

    Computation is in float32 with autocast off, whatever the type of parameters and input.

    Example:
        >>> import torch
        >>> from peft_reft.interventions import INTERVENTIONS
        >>> loreft = INTERVENTIONS["loreft"](d=16, r=2, init_weights="paper")
        >>> h = torch.randn(5, 16)
        >>> by_hand = (h @ loreft.W.T + loreft.b - h @ loreft.R.T) @ loreft.R
        >>> torch.allclose(loreft.edit(h), by_hand, atol=1e-6)
        True
    """

    R: nn.Parameter
    W: nn.Parameter
    W1: nn.Parameter
    W2: nn.Parameter
    b: nn.Parameter

    parameter_names: ClassVar[tuple[str, ...]]
    """Names, as in the formula; `R` stands for a matrix with orthonormal rows, a lower-case name for a vector."""

    def __init__(self, d: int, r: int, count: int | None = None, init_weights: InitWeights = True) -> None:
        super().__init__()
        lead = () if count is None else (count,)
        for name in self.parameter_names:
            shape = (*lead, r) if name.islower() else (*lead, r, d)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self._factors: tuple[tuple[tuple[int, int], ...], Factors] | None = None
        if not any(parameter.is_meta for parameter in self.parameters()):
            with torch.no_grad():
                self.reset_parameters(init_weights)

    @staticmethod
    @abstractmethod
    def factors(p: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """A and B of ``edit(h) = Bᵀ(A h + b)``, each (..., r, d) float32; A is None where the formula has none.

        Args:
            p: the parameters by name, in float32, `R` with orthonormal rows.
        """

    @abstractmethod
    def reset_parameters(self, init_weights: InitWeights) -> None:
        """Fill the parameters in place."""

    def edit(self, h: Tensor) -> Tensor:
        """Φ(h) − h.

        Args:
            h: (n, d), or (G, n, d) with `count`; any float type.

        Returns:
            The edit, same shape, float32.
        """
        with without_autocast(h.device.type):
            return apply_factors(h.float(), *self.current_factors())[1]

    @property
    def trains(self) -> bool:
        """Whether what is computed now is differentiated by the parameters."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def current_factors(self) -> Factors:
        """A, B and b in float32; without gradients they are computed once and kept."""
        if self.trains:
            self._factors = None
            return factors_of([self])[0]
        if torch.compiler.is_compiling():  # a key that reads pointers cannot be traced
            return self._factors[1] if self._factors else factors_of([self])[0]
        parameters = list(self.parameters())
        # Some optimisers (bitsandbytes, DeepSpeed) write through raw pointers or `.data`, unseen by `_version`. They
        # run between forwards with gradients and calls of `train()` or `eval()`; all these drop what is kept here.
        if any(parameter.is_inference() for parameter in parameters):  # made in inference mode: no version to ask for
            return factors_of([self])[0]
        key = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
        if self._factors is None or self._factors[0] != key:
            with torch.no_grad():
                self._factors = (key, factors_of([self])[0])
        return self._factors[1]

    def rotation(self) -> Tensor:
        """R, (..., r, d) float32 with orthonormal rows to 1e-5, differentiable in the parameter."""
        return _Orthonormalise.apply(self.R.float(), pulls_back(self.R))

    def train(self, mode: bool = True) -> Intervention:
        self._factors = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": None}

    def _random_rotation(self, name: str) -> None:
        parameter = getattr(self, name)
        parameter.copy_(orthonormalise(torch.randn_like(parameter))[0])

    def _linear(self, weight: str, bias: str | None = None) -> None:
        """As `nn.Linear` starts: uniform in ±1/sqrt(d) for both."""
        bound = 1 / math.sqrt(getattr(self, weight).shape[-1])
        for name in (weight, bias):
            if name is not None:
                getattr(self, name).uniform_(-bound, bound)


def pulls_back(stored: Tensor) -> bool:
    """Whether computing with the parameter `stored` of R also brings it back onto the manifold."""
    return (
        stored.requires_grad
        and torch.is_grad_enabled()
        and stored.dtype == torch.float32
        # A sharded parameter (FSDP, ZeRO-3) is a temporary copy here: writing to it would be lost, or worse, kept.
        and not torch.distributed.is_initialized()
        and not torch.compiler.is_compiling()
    )


def factors_of(interventions: Sequence[Intervention]) -> list[Factors]:
    """A, B and b of interventions of one formula, shape and type, differentiable in their parameters.

    Several are computed side by side: one stacked decomposition costs hardly more than one of a single R.
    """
    first = interventions[0]
    if len(interventions) == 1:
        p = {name: first.rotation() if name == "R" else getattr(first, name).float() for name in first.parameter_names}
        return [(*first.factors(p), p["b"])]
    p = {name: torch.stack([getattr(each, name) for each in interventions]).float() for name in first.parameter_names}
    if "R" in p:
        stored = [each.R for each in interventions]
        pull_back = pulls_back(stored[0])
        p["R"] = _Orthonormalise.apply(p["R"], pull_back)
        if pull_back:
            for parameter, r in zip(stored, p["R"].detach()):
                parameter.data.copy_(r)
    a, b = first.factors(p)
    return list(zip([None] * len(interventions) if a is None else a.unbind(), b.unbind(), p["b"].unbind()))


@final
class LoReFT(Intervention):
    """Rᵀ(Wh + b − Rh); paper, eq. 2. Parameters: 2·r·d + r."""

    parameter_names = ("R", "W", "b")

    @staticmethod
    def factors(p: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        return p["W"] - p["R"], p["R"]

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._random_rotation("R")
        self._linear("W", "b")
        if init_weights is True:
            self.W.copy_(self.R)
            self.b.zero_()


@final
class NoReFT(Intervention):
    """W2ᵀ(W1h + b − W2h): LoReFT without the constraint. Parameters: 2·r·d + r."""

    parameter_names = ("W1", "W2", "b")

    @staticmethod
    def factors(p: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        return p["W1"] - p["W2"], p["W2"]

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._linear("W2")
        self._linear("W1", "b")
        if init_weights is True:
            self.W1.copy_(self.W2)
            self.b.zero_()


@final
class DiReFT(Intervention):
    """Rᵀ(Wh + b): LoReFT without the −Rh. Parameters: 2·r·d + r."""

    parameter_names = ("R", "W", "b")

    @staticmethod
    def factors(p: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        return p["W"], p["R"]

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._random_rotation("R")
        self._linear("W", "b")
        if init_weights is True:
            self.W.zero_()
            self.b.zero_()


@final
class NoDiReFT(Intervention):
    """W2ᵀ(W1h + b); paper, eq. 3, where it is called DiReFT. Parameters: 2·r·d + r."""

    parameter_names = ("W1", "W2", "b")

    @staticmethod
    def factors(p: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        return p["W1"], p["W2"]

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._linear("W2")
        self._linear("W1", "b")
        if init_weights is True:
            self.W1.zero_()
            self.b.zero_()


@final
class ConsReFT(Intervention):
    """Rᵀ(b − Rh): the subspace is set to a constant. Parameters: r·d + r. No b makes this the identity."""

    parameter_names = ("R", "b")

    @staticmethod
    def factors(p: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        return -p["R"], p["R"]

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._random_rotation("R")
        self.b.uniform_()
        if init_weights is True:
            self.b.zero_()


@final
class LobiReFT(Intervention):
    """Rᵀb: a learned vector of r coordinates. Parameters: r·d + r."""

    parameter_names = ("R", "b")

    @staticmethod
    def factors(p: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        return None, p["R"]

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._random_rotation("R")
        self.b.uniform_()
        if init_weights is True:
            self.b.zero_()


INTERVENTIONS: dict[str, type[Intervention]] = {
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direft": DiReFT,
    "nodireft": NoDiReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
}
