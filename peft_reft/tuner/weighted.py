"""One adapter whose edit is the weighted sum of the edits of several, where that is an edit of this family.

Edits ``Bᵀf(A h + b)`` of rank r₁ and r₂ add up to one of rank r₁ + r₂ of the same form, which is `nodireft`: A, B and
b are those of the summands, one below the other, and B times the weight. Without f every formula of rank r is such an
edit. `red` and `bias` are scalings and biases, and add up to one scaling and bias: `red`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..config import DEFAULT_R, LoReftConfig
from ..edits.factors import Activated, Affine, ElementwiseFactors, LowRankFactors
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
_NOT_SUBTRACTING = ("direft", "nodireft")


def check_combination(combination_type: str, settings: dict[str, Any], adapters: dict[str, LoReftConfig]) -> None:
    """Raise ValueError if LoRA's `combination_type` is another sum than the one that is computed here."""
    ranked = [name for name, config in adapters.items() if INTERVENTIONS[config.intervention].has_rank]
    if combination_type == "linear" and ranked:
        raise ValueError(
            f"combination_type='linear' adds up the parameters of low-rank edits ({', '.join(map(repr, ranked))}), "
            "which is not the sum of the edits. Allowed with them: 'cat', the exact sum; ranks add up."
        )
    if combination_type not in ("cat", "linear"):
        raise ValueError(
            f"combination_type={combination_type!r} is an approximation of LoRA's. Allowed: 'cat' (the exact sum), "
            "'linear' (the same, for formulas without a rank)."
        )
    if given := {name: value for name, value in settings.items() if value is not None}:
        raise ValueError(f"{', '.join(given)}: combination_type={combination_type!r} has no such settings.")


def weighted_config(adapters: dict[str, LoReftConfig], n_layers: int) -> LoReftConfig:
    """The config of the weighted sum, in a model of `n_layers` blocks. Raises ValueError if there is none."""
    first_name, first = next(iter(adapters.items()))
    for name, config in adapters.items():
        for field in (*_ALIKE, "layers") if first.tie == "model" else _ALIKE:
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
    config.dropout = 0.0  # each would have had its own
    config.intervention, config.r = ("nodireft", {}) if with_rank == {True} else ("red", DEFAULT_R)
    edited = {name: each.positions_by_layer(n_layers) for name, each in adapters.items()}
    layers = sorted({layer for specs in edited.values() for layer in specs})
    if any(each.layers != first.layers for each in adapters.values()):
        config.layers = layers
    if isinstance(config.r, dict):
        ranks = {name: each.ranks(edited[name], n_layers) for name, each in adapters.items()}
        sums = {str(layer): sum(of.get(layer) or 0 for of in ranks.values()) for layer in layers}
        config.r = next(iter(sums.values())) if len({*sums.values()}) == 1 else sums
    return config


@torch.no_grad()
def fill_weighted(target: Intervention, summands: Sequence[tuple[float, Intervention]]) -> None:
    """Give `target` (`nodireft` or `red`) the parameters of the weighted sum, in the order of the summands."""
    values: dict[str, Any]
    found = [(weight, intervention.current_factors()) for weight, intervention in summands]
    if target.has_rank:
        low_rank = [(weight, each) for weight, each in found if isinstance(each, LowRankFactors)]
        inside = [_inside(each) for _, each in low_rank]
        weights = [affine.weight for affine in inside]
        values = {
            "W1": torch.cat(
                [torch.zeros_like(each.basis) if w is None else w for w, (_, each) in zip(weights, low_rank)], -2
            ),
            "W2": torch.cat([weight * each.basis for weight, each in low_rank], -2),
            "b": torch.cat([affine.bias for affine in inside], -1),
        }
    else:
        elementwise = [(weight, each) for weight, each in found if isinstance(each, ElementwiseFactors)]
        values = {
            "s": 1 + sum(weight * each.scale for weight, each in elementwise if each.scale is not None),
            "b": sum(weight * each.shift for weight, each in elementwise),
        }
    for name, value in values.items():
        getattr(target, name).copy_(torch.as_tensor(value))


def _inside(factors: LowRankFactors) -> Affine:
    """A and b of an edit ``Bᵀ f(A h + b)``."""
    z = factors.coordinates
    if isinstance(z, Activated):
        z = z.inside
    assert isinstance(z, Affine)
    return z
