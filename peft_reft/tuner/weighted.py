"""One adapter whose edit is the weighted sum of the edits of several, if that sum is an edit of this family.

Edits ``Bᵀf(A h + b)`` of rank r₁ and r₂ add up to an edit of rank r₁ + r₂ of the same form, which is `nodireft`. Its
A, B and b are those of the summands, one below the other; B is multiplied by the weights. Without f every formula of
rank r is such an edit. `red` and `bias` scale and shift. They add up to one scaling and one shift, which is `red`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import DEFAULT_R, LoReftConfig
from ..edits.factors import Activated, Affine, ElementwiseFactors, Factors, LowRankFactors
from ..edits.formulas import INTERVENTIONS
from ..edits.intervention import Intervention

_ALIKE = (
    "positions",
    "tie",
    "component",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "act_fn",
)
"""Fields that adapters must have alike."""

_NOT_SUBTRACTING = ("direft", "nodireft")
"""Formulas whose activation is around all that depends on h."""


def check_combination(combination_type: str, settings: dict[str, Any], adapters: dict[str, LoReftConfig]) -> None:
    """Raise ValueError if `combination_type` asks for another sum than the exact one.

    Args:
        combination_type: as for LoRA.
        settings: LoRA's settings of its other combination types; all must be None.
        adapters: configs of the summands by name.
    """
    ranked = [name for name, config in adapters.items() if INTERVENTIONS[config.intervention].has_rank]
    if combination_type == "linear" and ranked:
        raise ValueError(
            f"combination_type='linear' adds up the parameters of low-rank edits ({', '.join(map(repr, ranked))}), "
            "which is not the sum of the edits. Allowed with them: 'cat', the exact sum; ranks add up."
        )
    if combination_type not in ("cat", "linear"):
        raise ValueError(
            f"combination_type={combination_type!r} is one of LoRA's approximations. Allowed: 'cat' (the exact sum), "
            "'linear' (the same, for formulas without a rank)."
        )
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: combination_type={combination_type!r} has no such settings.")


def weighted_config(adapters: dict[str, LoReftConfig], n_layers: int) -> LoReftConfig:
    """The config of the weighted sum, in a model of `n_layers` blocks. Raises ValueError if the sum is no edit."""
    first_name, first = next(iter(adapters.items()))
    fields = (*_ALIKE, "layers") if first.tie == "model" else _ALIKE
    for name, config in adapters.items():
        for field in fields:
            if getattr(config, field) != getattr(first, field):
                raise ValueError(
                    f"The weighted sum is no single edit: {field}={getattr(first, field)!r} in {first_name!r}, "
                    f"{getattr(config, field)!r} in {name!r}. Adapters must be alike in {field}."
                )
        for field in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, field):
                raise ValueError(f"{name!r} has {field}={getattr(config, field)!r}, which cannot be added up.")
        if config.gate or config.intervention == "interchange":
            raise ValueError(
                f"The weighted sum is no single edit: {name!r} has gate={config.gate} and "
                f"intervention={config.intervention!r}. Not allowed: gate=True, 'interchange'."
            )
        if config.act_fn and config.intervention not in _NOT_SUBTRACTING:
            raise ValueError(
                f"The weighted sum is no single edit: {name!r} has act_fn={config.act_fn!r} and "
                f"intervention={config.intervention!r}, which subtracts. Allowed with act_fn: 'direft', 'nodireft'."
            )
    with_rank = {INTERVENTIONS[config.intervention].has_rank for config in adapters.values()}
    if len(with_rank) > 1:
        formulas = {name: config.intervention for name, config in adapters.items()}
        raise ValueError(f"The weighted sum is no single edit: some formulas have a rank, some have none: {formulas}.")
    config = copy.copy(first)
    config.dropout = 0.0  # each summand would drop elements of its own edit
    config.intervention = "nodireft" if with_rank == {True} else "red"
    edited = {name: each.positions_by_layer(n_layers) for name, each in adapters.items()}
    layers = sorted({layer for specs in edited.values() for layer in specs})
    if any(each.layers != first.layers for each in adapters.values()):
        config.layers = layers
    config.r = DEFAULT_R
    if with_rank == {True}:
        ranks = [each.ranks(edited[name], n_layers) for name, each in adapters.items()]
        sums = {str(layer): sum(by_layer.get(layer) or 0 for by_layer in ranks) for layer in layers}
        alike = len({*sums.values()}) == 1
        config.r = sums[str(layers[0])] if alike else sums
    return config


@torch.no_grad()
def fill_weighted(target: Intervention, summands: Sequence[tuple[float, Intervention]]) -> None:
    """Give `target` the parameters of the weighted sum, in the order of the summands.

    Args:
        target: `nodireft` or `red`.
        summands: weight and intervention of each adapter that edits here.
    """
    weighted = [(weight, intervention.factors_by_head()) for weight, intervention in summands]
    values = _low_rank_sum(weighted) if target.has_rank else _elementwise_sum(weighted)
    for name, value in values.items():
        getattr(target, name).copy_(value)


def _low_rank_sum(weighted: list[tuple[float, Factors]]) -> dict[str, Tensor]:
    """Parameters of `nodireft`: those of the summands, one below the other."""
    inner, outer, biases = [], [], []
    for weight, factors in weighted:
        assert isinstance(factors, LowRankFactors)
        affine = _inside(factors)
        inner.append(torch.zeros_like(factors.basis) if affine.weight is None else affine.weight)  # ([G,] r, d)
        outer.append(weight * factors.basis)  # ([G,] r, d)
        biases.append(affine.bias)  # ([G,] r)
    return {"W1": torch.cat(inner, -2), "W2": torch.cat(outer, -2), "b": torch.cat(biases, -1)}


def _elementwise_sum(weighted: list[tuple[float, Factors]]) -> dict[str, Tensor]:
    """Parameters of `red`, whose edit is (s − 1) ⊙ h + b."""
    scale, shift = torch.tensor(1.0), torch.tensor(0.0)
    for weight, factors in weighted:
        assert isinstance(factors, ElementwiseFactors)
        if factors.scale is not None:
            scale = scale + weight * factors.scale  # ([G,] d)
        if factors.shift is not None:
            shift = shift + weight * factors.shift  # ([G,] d)
    return {"s": scale, "b": shift}


def _inside(factors: LowRankFactors) -> Affine:
    """A and b of an edit ``Bᵀ f(A h + b)``."""
    coordinates = factors.coordinates
    if isinstance(coordinates, Activated):
        coordinates = coordinates.inside
    assert isinstance(coordinates, Affine)
    return coordinates
