"""The edits: one abstract class, and one final class for each formula.

A formula of rank r is ``edit(h) = Bᵀ z``, and a class is what it puts for z and B, f being `act_fn` (none: f(x) = x):

===========  =======================  =========================
name         Φ(h) − h                 source
===========  =======================  =========================
loreft       Rᵀ(f(Wh + b) − Rh)       arXiv 2404.03592, eq. 2
noreft       W2ᵀ(f(W1h + b) − W2h)    its table of ablations
direft       Rᵀf(Wh + b)              its table of ablations
nodireft     W2ᵀf(W1h + b)            its eq. 3 (DiReFT)
consreft     Rᵀ(b − Rh)               its table of ablations
lobireft     Rᵀb                      its table of ablations
interchange  Rᵀ(Rs − Rh)              its eq. 1 (DII, DAS)
===========  =======================  =========================

Two have no rank: `red`, h ⊙ s + b − h (arXiv 2402.15179), and `bias`, a learned vector b. Any of them can be gated,
``tanh(v·h + c) · edit(h)``. R has orthonormal rows, see `rotation.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN

from .factors import TENSORS, Factors
from .rotation import on_manifold, orthonormalise, pulls_back, without_autocast

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: ACT2FN[name]
    for name in ACT2CLS
    if name not in ("prelu", "xielu")  # which have parameters of their own
}

InitWeights = bool | Literal["paper"]


class Intervention(nn.Module, ABC):
    """A learned edit of hidden states, ``edit(h) = Φ(h) − h``.

    Args:
        d: hidden size.
        r: rank, 1 <= r <= d; None for a formula without one.
        count: how many independent interventions to hold, or None for one. They are computed side by side: parameters
            and inputs have a leading dimension G = `count` then.
        init_weights: True: Φ is the identity at the start wherever the formula allows; `"paper"`: as the authors'
            code; False: random, for tests.
        act_fn: name of the activation f, one of `ACTIVATIONS` (transformers' `ACT2FN`).
        gate: whether the edit is multiplied by tanh(v·h + c): d + 1 parameters more, and the identity at the start for
            every formula, since v and c begin at 0 (and what is multiplied by them as in `"paper"`).

    Computation is in float32 with autocast off, whatever the type of parameters and input.

    Examples:
        >>> import torch
        >>> from peft_reft.interventions import INTERVENTIONS
        >>> loreft = INTERVENTIONS["loreft"](d=16, r=2, init_weights="paper")
        >>> h = torch.randn(5, 16)
        >>> by_hand = (h @ loreft.W.T + loreft.b - h @ loreft.R.T) @ loreft.R
        >>> torch.allclose(loreft.edit(h), by_hand, atol=1e-6)
        True
    """

    R: nn.Parameter
    b: nn.Parameter
    v: nn.Parameter
    c: nn.Parameter

    parameter_shapes: ClassVar[dict[str, str]]
    """Names, as in the formula, and the dimensions of each; `R` stands for a matrix with orthonormal rows."""
    shapes_with_act_fn: ClassVar[dict[str, str]] = {}
    """Parameters that come with `act_fn`."""
    has_rank: ClassVar[bool] = True
    takes_act_fn: ClassVar[bool] = False

    def __init__(
        self,
        d: int,
        r: int | None,
        count: int | None = None,
        init_weights: InitWeights = True,
        act_fn: str | None = None,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.gated = gate
        lead = () if count is None else (count,)
        sizes: dict[str, Any] = {"d": d, "r": r, "1": 1}
        self.shapes = self.shapes_of(act_fn, gate)
        for name, dimensions in self.shapes.items():
            shape = (*lead, *(sizes[dimension] for dimension in dimensions))
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self._kept: Factors | None = None
        self._kept_at: tuple[tuple[int, int], ...] = ()
        if not any(parameter.is_meta for parameter in self.parameters()):
            with torch.no_grad():
                self.reset_parameters("paper" if gate and init_weights is True else init_weights)
                if gate and init_weights is not False:
                    self.v.zero_()
                    self.c.zero_()
                elif gate:
                    self.v.normal_(std=1 / math.sqrt(d))
                    self.c.normal_()

    @classmethod
    def shapes_of(cls, act_fn: str | None, gate: bool) -> dict[str, str]:
        """All its parameters, and the dimensions of each."""
        with_act_fn = cls.shapes_with_act_fn if act_fn is not None else {}
        return {**cls.parameter_shapes, **with_act_fn, **({"v": "d", "c": "1"} if gate else {})}

    @abstractmethod
    def factors(self, p: Mapping[str, Tensor]) -> Factors:
        """What the formula computes with, but for the gate.

        Args:
            p: the parameters by name, in float32, `R` with orthonormal rows.
        """

    @abstractmethod
    def reset_parameters(self, init_weights: InitWeights) -> None:
        """Fill the parameters of the formula in place."""

    def edit(self, h: Tensor) -> Tensor:
        """Φ(h) − h.

        Args:
            h: (n, d), or (G, n, d) with `count`; any float type.

        Returns:
            The edit, same shape, float32.
        """
        with without_autocast(h.device.type):
            return self.current_factors().edit(h.float())

    @property
    def trains(self) -> bool:
        """Whether what is computed now is differentiated by the parameters."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def current_factors(self) -> Factors:
        """What it computes with, in float32; without gradients computed once and kept."""
        if self.trains:
            self._kept = None
            return factors_of([self])[0]
        if torch.compiler.is_compiling():  # a key that reads pointers cannot be traced
            return self._kept or factors_of([self])[0]
        # Some optimisers (bitsandbytes, DeepSpeed) write through raw pointers or `.data`, unseen by `_version`. They
        # run between forwards with gradients and calls of `train()` or `eval()`; all these drop what is kept here.
        if any(parameter.is_inference() for parameter in self._own()):  # no version to ask for
            return factors_of([self])[0]
        kept, key = self._kept, self._key()  # read once: another thread may drop it
        if kept is None or self._kept_at != key:
            with torch.no_grad():
                kept = factors_of([self])[0]
            self._kept, self._kept_at = kept, key
        return kept

    def rotation(self) -> Tensor:
        """R, (..., r, d) float32 with orthonormal rows to 1e-5, differentiable in the parameter."""
        return on_manifold(self.R.float(), pulls_back(self.R))

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for those that `factors_of` can compute together."""
        parameters = ((p.shape, p.dtype, p.device, p.requires_grad) for p in self.parameters())
        return type(self), self.act_fn, *parameters

    @torch.inference_mode()
    def refresh(self) -> None:
        """After a change of the parameters: compute again what is kept, in place, where a compiled graph reads it."""
        if self._kept is not None:
            new = factors_of([self])[0]
            for name in TENSORS:
                if (tensor := getattr(self._kept, name)) is not None and tensor is not getattr(new, name):
                    tensor.copy_(getattr(new, name))
            self._kept_at = self._key()

    def _key(self) -> tuple[tuple[int, int], ...]:
        return tuple([(parameter.data_ptr(), parameter._version) for parameter in self._own()])

    def _own(self) -> list[nn.Parameter]:
        # Not `parameters()`, which walks modules: a decode step that edits comes here once a layer.
        return [parameter for parameter in self._parameters.values() if parameter is not None]

    def train(self, mode: bool = True) -> Intervention:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _random_rotation(self, name: str) -> None:
        parameter = getattr(self, name)
        parameter.copy_(orthonormalise(torch.randn_like(parameter))[0])

    def _linear(self, weight: str, bias: str | None = None) -> None:
        """As `nn.Linear` starts: uniform in ±1/sqrt(d) for both."""
        bound = 1 / math.sqrt(getattr(self, weight).shape[-1])
        for name in (weight, bias):
            if name is not None:
                getattr(self, name).uniform_(-bound, bound)


def factors_of(interventions: Sequence[Intervention]) -> list[Factors]:
    """What interventions of one formula, shape and type compute with, differentiable in their parameters.

    Several are computed side by side: one stacked decomposition costs hardly more than one of a single R.
    """
    first = interventions[0]
    p: dict[str, Tensor]
    if len(interventions) == 1:
        p = {name: getattr(first, name).float() for name in first.shapes}
        if "R" in p:
            p["R"] = first.rotation()
        return [_factors(first, p)]
    p = {name: torch.stack([getattr(each, name) for each in interventions]).float() for name in first.shapes}
    if "R" in p:
        stored = [each.R for each in interventions]
        pull_back = pulls_back(stored[0])
        p["R"] = on_manifold(p["R"], pull_back)
        if pull_back:
            for parameter, r in zip(stored, p["R"].detach()):
                parameter.data.copy_(r)
    together = _factors(first, p)
    each_of = {name: tensor.unbind() for name in TENSORS if (tensor := getattr(together, name)) is not None}
    return [
        replace(together, **{name: tensors[n] for name, tensors in each_of.items()}) for n in range(len(interventions))
    ]


def _factors(intervention: Intervention, p: Mapping[str, Tensor]) -> Factors:
    factors = intervention.factors(p)
    return replace(factors, gate=p["v"], gate_bias=p["c"]) if intervention.gated else factors


class LowRank(Intervention):
    """``Bᵀ(f(S h + b) − B h)``, of which some formulas lack S, or the subtraction."""

    source: ClassVar[str | None]
    """Name of S."""
    basis: ClassVar[str]
    """Name of B."""
    subtracts: ClassVar[bool]

    def factors(self, p: Mapping[str, Tensor]) -> Factors:
        b, source = p[self.basis], p[self.source] if self.source else None
        if self.act_fn is not None:
            return Factors(
                source, b, p["b"], c=b if self.subtracts else None, c_bias=p.get("p"), act=ACTIVATIONS[self.act_fn]
            )
        if not self.subtracts:
            return Factors(source, b, p["b"])
        return Factors(-b if source is None else source - b, b, p["b"])

    def reset_parameters(self, init_weights: InitWeights) -> None:
        rotates = self.basis == "R"
        if rotates:
            self._random_rotation("R")
        else:
            self._linear(self.basis, "p" if "p" in self.shapes else None)
        if self.source is None:
            self.b.uniform_()
            if init_weights is True:
                self.b.zero_()
            return
        self._linear(self.source, "b")
        if init_weights is not True:
            return
        if self.act_fn is None:
            source = getattr(self, self.source)
            source.copy_(getattr(self, self.basis)) if self.subtracts else source.zero_()
            self.b.zero_()
        elif not rotates:  # f may be flat at 0, where W1 = 0 would never learn
            getattr(self, self.basis).zero_()


@final
class LoReFT(LowRank):
    """Rᵀ(f(Wh + b) − Rh); paper, eq. 2. Parameters: 2·r·d + r. With `act_fn`, no identity start unless gated."""

    parameter_shapes = {"R": "rd", "W": "rd", "b": "r"}
    source, basis, subtracts = "W", "R", True
    takes_act_fn = True


@final
class NoReFT(LowRank):
    """W2ᵀ(f(W1h + b) − W2h): LoReFT without the constraint. Parameters: 2·r·d + r.

    With `act_fn`, W2ᵀ(f(W1h + b) − W2h − p), as in the authors' code, and r parameters more; without, p is part of b.
    """

    parameter_shapes = {"W1": "rd", "W2": "rd", "b": "r"}
    shapes_with_act_fn = {"p": "r"}
    source, basis, subtracts = "W1", "W2", True
    takes_act_fn = True


@final
class DiReFT(LowRank):
    """Rᵀf(Wh + b): LoReFT without the −Rh. Parameters: 2·r·d + r. With `act_fn`, no identity start unless gated."""

    parameter_shapes = {"R": "rd", "W": "rd", "b": "r"}
    source, basis, subtracts = "W", "R", False
    takes_act_fn = True


@final
class NoDiReFT(LowRank):
    """W2ᵀf(W1h + b); paper, eq. 3, where it is called DiReFT. Parameters: 2·r·d + r."""

    parameter_shapes = {"W1": "rd", "W2": "rd", "b": "r"}
    source, basis, subtracts = "W1", "W2", False
    takes_act_fn = True


@final
class ConsReFT(LowRank):
    """Rᵀ(b − Rh): the subspace is set to a constant. Parameters: r·d + r. Ungated, no b makes this the identity."""

    parameter_shapes = {"R": "rd", "b": "r"}
    source, basis, subtracts = None, "R", True


@final
class LobiReFT(LowRank):
    """Rᵀb: a learned vector of r coordinates. Parameters: r·d + r."""

    parameter_shapes = {"R": "rd", "b": "r"}
    source, basis, subtracts = None, "R", False


@final
class Interchange(Intervention):
    """Rᵀ(Rs − Rh), s being the hidden state of another run (`peft_reft.interchange`); paper, eq. 1. Parameters: r·d.

    Without another run there is no s, and no edit.
    """

    parameter_shapes = {"R": "rd"}

    def factors(self, p: Mapping[str, Tensor]) -> Factors:
        return Factors(b=p["R"], c=p["R"])

    def edit(self, h: Tensor, source: Tensor | None = None) -> Tensor:
        if source is None:
            return torch.zeros_like(h, dtype=torch.float32)
        with without_autocast(h.device.type):
            return replace(self.current_factors(), source=source.float()).edit(h.float())

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._random_rotation("R")


class Elementwise(Intervention):
    """An edit of every dimension by itself."""

    has_rank = False

    def reset_parameters(self, init_weights: InitWeights) -> None:
        for name in self.parameter_shapes:
            start = float(name == "s")
            parameter = getattr(self, name)
            parameter.fill_(start)
            if init_weights is False or (init_weights == "paper" and self.gated):
                parameter.add_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))


@final
class RED(Elementwise):
    """h ⊙ s + b − h: scaling and bias; arXiv 2402.15179. Parameters: 2·d."""

    parameter_shapes = {"s": "d", "b": "d"}

    def factors(self, p: Mapping[str, Tensor]) -> Factors:
        return Factors(scale=p["s"] - 1, shift=p["b"])


@final
class Bias(Elementwise):
    """A learned vector b. Parameters: d."""

    parameter_shapes = {"b": "d"}

    def factors(self, p: Mapping[str, Tensor]) -> Factors:
        return Factors(shift=p["b"])


INTERVENTIONS: dict[str, type[Intervention]] = {
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direft": DiReFT,
    "nodireft": NoDiReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
    "red": RED,
    "bias": Bias,
    "interchange": Interchange,
}
