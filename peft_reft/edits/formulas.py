"""The table of formulas: a class for each, and its name.

A formula of rank r is ``edit(h) = Bᵀ z(h)``. The class says what z and B are. f is `act_fn`; without it, f(x) = x.

===========  =======================  =========================
name         Φ(h) − h                 where it comes from
===========  =======================  =========================
loreft       Rᵀ(f(Wh + b) − Rh)       arXiv 2404.03592, eq. 2
noreft       W2ᵀ(f(W1h + b) − W2h)    its table of ablations
direft       Rᵀf(Wh + b)              its table of ablations
nodireft     W2ᵀf(W1h + b)            its eq. 3 (DiReFT)
consreft     Rᵀ(b − Rh)               its table of ablations
lobireft     Rᵀb                      its table of ablations
interchange  Rᵀ(Rs − Rh)              its eq. 1 (DII, DAS)
===========  =======================  =========================

Two formulas have no rank: `red`, h ⊙ s + b − h (arXiv 2402.15179), and `bias`, a learned vector b. All but
`interchange` can be gated, ``tanh(v·h + c) · edit(h)``. R has orthonormal rows, see `rotation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from ..shapes import Float
from .factors import Difference, ElementwiseFactors, Factors, LowRankFactors
from .families import Elementwise, LowRank
from .intervention import InitWeights, Intervention
from .modes import without_autocast


@final
class LoReFT(LowRank):
    """Rᵀ(f(Wh + b) − Rh); paper, eq. 2. Parameters: 2·r·d + r. With `act_fn`, no identity start unless gated."""

    parameter_shapes = {"R": "rd", "W": "rd", "b": "r"}
    matrix, basis, subtracts = "W", "R", True
    takes_act_fn = True


@final
class NoReFT(LowRank):
    """W2ᵀ(f(W1h + b) − W2h): LoReFT without the constraint. Parameters: 2·r·d + r.

    With `act_fn` it is W2ᵀ(f(W1h + b) − W2h − p), as in the authors' code, with r parameters more. Without `act_fn`, b
    does what p would do.
    """

    parameter_shapes = {"W1": "rd", "W2": "rd", "b": "r"}
    shapes_with_act_fn = {"p": "r"}
    matrix, basis, subtracts = "W1", "W2", True
    takes_act_fn = True


@final
class DiReFT(LowRank):
    """Rᵀf(Wh + b): LoReFT without the −Rh. Parameters: 2·r·d + r. With `act_fn`, no identity start unless gated."""

    parameter_shapes = {"R": "rd", "W": "rd", "b": "r"}
    matrix, basis, subtracts = "W", "R", False
    takes_act_fn = True


@final
class NoDiReFT(LowRank):
    """W2ᵀf(W1h + b); paper, eq. 3, which calls it DiReFT. Parameters: 2·r·d + r."""

    parameter_shapes = {"W1": "rd", "W2": "rd", "b": "r"}
    matrix, basis, subtracts = "W1", "W2", False
    takes_act_fn = True


@final
class ConsReFT(LowRank):
    """Rᵀ(b − Rh): sets the subspace to a constant. Parameters: r·d + r. Ungated, no b makes it the identity."""

    parameter_shapes = {"R": "rd", "b": "r"}
    matrix, basis, subtracts = None, "R", True


@final
class LobiReFT(LowRank):
    """Rᵀb: adds a learned vector of r coordinates. Parameters: r·d + r."""

    parameter_shapes = {"R": "rd", "b": "r"}
    matrix, basis, subtracts = None, "R", False


@final
class Interchange(Intervention):
    """Rᵀ(Rs − Rh); paper, eq. 1. Parameters: r·d.

    s is the hidden state of a source run (`peft_reft.interchange`). Without a source run nothing is edited.
    """

    parameter_shapes = {"R": "rd"}

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        return LowRankFactors(parameters["R"], Difference(parameters["R"]))

    def edit(
        self, h: Float[Tensor, "... n d"], source_hidden: Float[Tensor, "... n d"] | None = None
    ) -> Float[Tensor, "... n d"]:
        """Compute Φ(h) − h, with the hidden states s of a source run; 0 without them."""
        if source_hidden is None:
            return torch.zeros_like(h, dtype=torch.float32)
        with without_autocast(h.device.type):
            return self.current_factors().with_source_hidden(source_hidden.float()).edit(h.float())

    def reset_parameters(self, init_weights: InitWeights) -> None:
        self._random_rotation("R")


@final
class RED(Elementwise):
    """h ⊙ s + b − h: scales and shifts; arXiv 2402.15179. Parameters: 2·d."""

    parameter_shapes = {"s": "d", "b": "d"}

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        return ElementwiseFactors(scale=parameters["s"] - 1, shift=parameters["b"])


@final
class Bias(Elementwise):
    """Adds a learned vector b. Parameters: d."""

    parameter_shapes = {"b": "d"}

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        return ElementwiseFactors(scale=None, shift=parameters["b"])


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
"""The formulas, by the names that `LoReftConfig.intervention` takes."""
