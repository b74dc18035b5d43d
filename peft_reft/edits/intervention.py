"""`Intervention`: what all formulas have in common. It holds parameters, and gives the factors to compute with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .factors import Factors, Gate
from .modes import without_autocast
from .rotation import on_manifold, orthonormalise, pulls_back

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
        act_fn: name of the activation f, one of `formulas.ACTIVATIONS` (transformers' `ACT2FN`).
        gate: whether the edit is multiplied by tanh(v·h + c): d + 1 parameters more, and the identity at the start for
            every formula, since v and c begin at 0 (and what is multiplied by them as in `"paper"`).

    Computation is in float32 with autocast off, whatever the type of parameters and input.

    Examples:
        >>> import torch
        >>> from peft_reft.edits.formulas import INTERVENTIONS
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

    # The parameters are read by name: replicas of `nn.DataParallel` have them as attributes, and none registered.

    @property
    def trains(self) -> bool:
        """Whether what is computed now is differentiated by the parameters."""
        return torch.is_grad_enabled() and any(getattr(self, name).requires_grad for name in self.shapes)

    def current_factors(self) -> Factors:
        """What it computes with now, in float32; differentiable in the parameters."""
        return factors_of([self])[0]

    def rotation(self) -> Tensor:
        """R, (..., r, d) float32 with orthonormal rows to 1e-5, differentiable in the parameter."""
        return on_manifold(self.R.float(), pulls_back(self.R))

    @property
    def kind(self) -> Hashable:
        """Equal for those that `factors_of` can compute together."""
        parameters = [getattr(self, name) for name in self.shapes]
        alike = [(p.shape, p.dtype, p.device, p.requires_grad, p.is_leaf) for p in parameters]
        return type(self), self.act_fn, self.gated, *alike

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
    return _factors(first, p).unstack()


def _factors(intervention: Intervention, p: Mapping[str, Tensor]) -> Factors:
    factors = intervention.factors(p)
    return replace(factors, gate=Gate(p["v"], p["c"])) if intervention.gated else factors
