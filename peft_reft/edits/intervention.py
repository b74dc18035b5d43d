"""`Intervention`: what all formulas have in common. It holds parameters, and makes the factors to compute with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..shapes import Float
from .factors import Factors, Gate
from .modes import without_autocast
from .rotation import on_manifold, orthonormalise, pulls_back

InitWeights = bool | Literal["paper"]


class Intervention(nn.Module, ABC):
    """A learned edit of hidden states, ``edit(h) = Φ(h) − h``.

    Args:
        d: hidden size.
        r: rank, 1 <= r <= d; None for a formula without one.
        count: how many independent interventions to hold; None for one. With a number, parameters and inputs have a
            leading dimension G = `count`, and the interventions are computed side by side.
        init_weights: True: Φ is the identity at the start, if the formula allows it; `"paper"`: as in the authors'
            code; False: random, for tests.
        act_fn: name of the activation f, one of `families.ACTIVATIONS` (transformers' `ACT2FN`).
        gate: whether tanh(v·h + c) multiplies the edit, with d + 1 parameters more. v and c begin at 0, so that every
            formula begins as the identity; its other parameters begin as with `"paper"`. Not with `heads`.
        heads: how many heads a hidden state is made up of, one behind the other; None if it is not. Each head then has
            an intervention of its own, of size d / heads and of rank r: parameters have `heads` in front, behind
            `count`, and inputs are hidden states of all heads.

    It computes in float32 with autocast off, whatever the type of the parameters and of the input.

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
    """Name of each parameter, as in the formula, and its dimensions. `R` always has orthonormal rows."""
    shapes_with_act_fn: ClassVar[dict[str, str]] = {}
    """The same of the parameters that `act_fn` adds."""
    has_rank: ClassVar[bool] = True
    """Whether the formula has an r."""
    takes_act_fn: ClassVar[bool] = False
    """Whether the formula has an f."""

    def __init__(
        self,
        d: int,
        r: int | None,
        count: int | None = None,
        init_weights: InitWeights = True,
        act_fn: str | None = None,
        gate: bool = False,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        if act_fn is not None and not self.takes_act_fn:
            raise ValueError(
                f"act_fn={act_fn!r}: {type(self).__name__} has no Wh + b for it to act on (allowed: None)."
            )
        self.act_fn = act_fn
        if gate and heads is not None:
            raise ValueError(f"gate={gate}: heads={heads} have no gate (allowed: False).")
        self.gated = gate
        self.heads = heads
        lead = tuple(number for number in (count, heads) if number is not None)
        sizes: dict[str, Any] = {"d": d if heads is None else d // heads, "r": r, "1": 1}
        self.shapes = self.shapes_of(act_fn, gate)
        for name, dimensions in self.shapes.items():
            shape = (*lead, *(sizes[dimension] for dimension in dimensions))
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        if not any(parameter.is_meta for parameter in self.parameters()):
            self._fill(init_weights)

    @torch.no_grad()
    def _fill(self, init_weights: InitWeights) -> None:
        """Fill all parameters in place, those of the gate included."""
        if not self.gated:
            self.reset_parameters(init_weights)
            return
        self.reset_parameters("paper" if init_weights is True else init_weights)
        if init_weights is False:
            self.v.normal_(std=1 / math.sqrt(self.v.shape[-1]))
            self.c.normal_()
        else:
            self.v.zero_()
            self.c.zero_()

    @classmethod
    def shapes_of(cls, act_fn: str | None, gate: bool) -> dict[str, str]:
        """Return all parameters with these settings, and the dimensions of each."""
        shapes = dict(cls.parameter_shapes)
        if act_fn is not None:
            shapes |= cls.shapes_with_act_fn
        if gate:
            shapes |= {"v": "d", "c": "1"}
        return shapes

    @abstractmethod
    def factors(self, parameters: Mapping[str, Tensor]) -> Factors:
        """Make the factors that the formula computes with, without the gate.

        Args:
            parameters: by name, in float32, `R` with orthonormal rows.
        """

    @abstractmethod
    def reset_parameters(self, init_weights: InitWeights) -> None:
        """Fill the parameters of the formula in place."""

    def edit(self, h: Float[Tensor, "... n d"]) -> Float[Tensor, "... n d"]:
        """Compute Φ(h) − h.

        Args:
            h: (n, d), or (G, n, d) with `count`; of any float type.

        Returns:
            The edit, of the same shape, float32.
        """
        with without_autocast(h.device.type):
            return self.current_factors().edit(h.float())

    # Parameters are read by name: a replica of `nn.DataParallel` has them as attributes, but none is registered.

    @property
    def trains(self) -> bool:
        """Whether a result computed now can be differentiated by the parameters."""
        return torch.is_grad_enabled() and any(getattr(self, name).requires_grad for name in self.shapes)

    def current_factors(self) -> Factors:
        """Return the factors of the parameters as they are now, float32, differentiable in the parameters."""
        return factors_of([self])[0]

    def factors_by_head(self) -> Factors:
        """Return the same, but with `heads` as the parameters have it: the heads' factors side by side."""
        return _factors(self, _parameters(self))

    def rotation(self) -> Float[Tensor, "... r d"]:
        """Return R, float32 with orthonormal rows to 1e-5, differentiable in the parameter."""
        return on_manifold(self.R.float(), pulls_back(self.R))

    @property
    def d(self) -> int:
        """Hidden size."""
        ends_with_d = next(name for name, dimensions in self.shapes.items() if dimensions.endswith("d"))
        return int(getattr(self, ends_with_d).shape[-1]) * (self.heads or 1)

    @property
    def signature(self) -> Hashable:
        """Equal for interventions that `factors_of` can compute together."""
        parameters = [getattr(self, name) for name in self.shapes]
        alike = [(p.shape, p.dtype, p.device, p.requires_grad, p.is_leaf) for p in parameters]
        return type(self), self.act_fn, self.gated, self.heads, *alike

    def _random_rotation(self, name: str) -> None:
        """Fill a parameter with a random matrix of orthonormal rows."""
        parameter = getattr(self, name)
        parameter.copy_(orthonormalise(torch.randn_like(parameter))[0])

    def _linear(self, weight: str, bias: str | None = None) -> None:
        """Fill parameters as `nn.Linear` does: uniform in ±1/sqrt(d), weight and bias alike."""
        bound = 1 / math.sqrt(getattr(self, weight).shape[-1])
        for name in (weight, bias):
            if name is not None:
                getattr(self, name).uniform_(-bound, bound)


def factors_of(interventions: Sequence[Intervention]) -> list[Factors]:
    """Make the factors of interventions of one `signature`, differentiable in their parameters.

    Several are computed side by side: one stacked decomposition costs hardly more than one of a single R.
    """
    first = interventions[0]
    if len(interventions) == 1:
        return [_joined(first, _factors(first, _parameters(first)))]
    parameters: dict[str, Tensor] = {}
    for name in first.shapes:
        parameters[name] = torch.stack([getattr(each, name) for each in interventions]).float()
    if "R" in parameters:
        pull_back = pulls_back(first.R)
        parameters["R"] = on_manifold(parameters["R"], pull_back)
        if pull_back:  # the stack is a copy: each parameter has to be written, too
            for each, rotation in zip(interventions, parameters["R"].detach()):
                each.R.data.copy_(rotation)
    return _joined(first, _factors(first, parameters)).unstack()


def _parameters(intervention: Intervention) -> dict[str, Tensor]:
    """The parameters of one intervention, by name, as `Intervention.factors` takes them."""
    parameters: dict[str, Tensor] = {name: getattr(intervention, name).float() for name in intervention.shapes}
    if "R" in parameters:
        parameters["R"] = intervention.rotation()
    return parameters


def _joined(intervention: Intervention, factors: Factors) -> Factors:
    return factors if intervention.heads is None else factors.join_heads()


def _factors(intervention: Intervention, parameters: Mapping[str, Tensor]) -> Factors:
    factors = intervention.factors(parameters)
    if not intervention.gated:
        return factors
    return replace(factors, gate=Gate(weight=parameters["v"], bias=parameters["c"]))
