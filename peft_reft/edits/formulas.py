"""The formulas: one final class for each, and the table of their names.

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
from collections.abc import Callable, Mapping
from typing import ClassVar, final

import torch
from torch import Tensor
from transformers.activations import ACT2CLS, ACT2FN

from .factors import Activated, Affine, Difference, ElementwiseFactors, Factors, LowRankFactors
from .intervention import InitWeights, Intervention
from .modes import without_autocast

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: ACT2FN[name]
    for name in ACT2CLS
    if name not in ("prelu", "xielu")  # which have parameters of their own
}


class LowRank(Intervention):
    """``Bᵀ(f(S h + b) − B h)``, of which some formulas lack S, or the subtraction."""

    source: ClassVar[str | None]
    """Name of S."""
    basis: ClassVar[str]
    """Name of B."""
    subtracts: ClassVar[bool]

    def factors(self, p: Mapping[str, Tensor]) -> Factors:
        basis, source = p[self.basis], p[self.source] if self.source else None  # (..., r, d) both
        if self.act_fn is not None:
            subtracted = basis if self.subtracts else None
            return LowRankFactors(
                basis, Activated(Affine(source, p["b"]), ACTIVATIONS[self.act_fn], subtracted, p.get("p"))
            )
        if self.subtracts:
            source = -basis if source is None else source - basis
        return LowRankFactors(basis, Affine(source, p["b"]))

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
        return LowRankFactors(p["R"], Difference(p["R"]))

    def edit(self, h: Tensor, source: Tensor | None = None) -> Tensor:
        if source is None:
            return torch.zeros_like(h, dtype=torch.float32)
        with without_autocast(h.device.type):
            return self.current_factors().with_source(source.float()).edit(h.float())

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
        return ElementwiseFactors(p["s"] - 1, p["b"])


@final
class Bias(Elementwise):
    """A learned vector b. Parameters: d."""

    parameter_shapes = {"b": "d"}

    def factors(self, p: Mapping[str, Tensor]) -> Factors:
        return ElementwiseFactors(None, p["b"])


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
