"""The two families of formulas: of low rank, and elementwise. A formula fills in names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers.activations import ACT2CLS, ACT2FN

from .factors import Activated, Affine, Factors, LowRankFactors
from .intervention import InitWeights, Intervention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: ACT2FN[name]
    for name in ACT2CLS
    if name not in ("prelu", "xielu")  # these two have parameters of their own
}
"""The activations f, by transformers' names."""


class LowRank(Intervention):
    """``Bᵀ(f(projected) − B h)``, with ``projected = W h + b``. Some formulas lack W, others the subtraction."""

    matrix: ClassVar[str | None]
    """Name of the parameter W; None for a formula without it."""
    basis: ClassVar[str]
    """Name of the parameter B."""
    subtracts: ClassVar[bool]
    """Whether B h is subtracted."""

    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        bias = parameters["b"]  # (..., r)
        basis = parameters[self.basis]  # (..., r, d)
        matrix = None if self.matrix is None else parameters[self.matrix]  # (..., r, d)
        if self.act_fn is not None:
            subtracted = basis if self.subtracts else None
            projected = Affine(matrix, bias)
            activated = Activated(projected, ACTIVATIONS[self.act_fn], subtracted, parameters.get("p"))
            return LowRankFactors(basis, activated)
        if self.subtracts:  # W h + b − B h = (W − B) h + b
            matrix = -basis if matrix is None else matrix - basis
        return LowRankFactors(basis, Affine(matrix, bias))

    def reset_parameters(self, init_weights: InitWeights) -> None:
        rotates = self.basis == "R"
        if rotates:
            self._random_rotation("R")
        else:
            self._linear(self.basis, "p" if "p" in self.shapes else None)
        if self.matrix is None:
            self.b.uniform_()  # drawn in any case: a seed then gives later layers the same numbers
            if init_weights is True:
                self.b.zero_()
            return
        self._linear(self.matrix, "b")
        if init_weights is not True:
            return
        if self.act_fn is None:
            matrix = getattr(self, self.matrix)
            if self.subtracts:
                matrix.copy_(getattr(self, self.basis))
            else:
                matrix.zero_()
            self.b.zero_()
        elif not rotates:  # f may be flat at 0, where W1 = 0 would never learn
            getattr(self, self.basis).zero_()


class Elementwise(Intervention):
    """An edit that computes each dimension from itself alone."""

    has_rank = False

    def reset_parameters(self, init_weights: InitWeights) -> None:
        for name in self.parameter_shapes:
            start = 1.0 if name == "s" else 0.0
            parameter = getattr(self, name)
            parameter.fill_(start)
            if init_weights is False or (init_weights == "paper" and self.gated):
                parameter.add_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
