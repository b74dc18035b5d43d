"""Merge adapters into the weights of a whole model, or refuse to before any weight is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from .folding import NEW_BIAS, QUANTISED, SHARED_WEIGHT, projection_of
from .layer import LoReftLayer

ROLLOUTS = "peft_reft.integrations.trl.rollouts_in_vllm()"
"""The line that TRL's rollouts in vLLM need."""

_ADVICE = (
    "Keep the adapter beside the model; `unload()` gives the base model back without it. (For TRL's rollouts in vLLM "
    f"call `{ROLLOUTS}` before the trainer is made: then nothing is merged.)"
)
_OF_BLOCK = "a block's output is edited, which no single weight makes (allowed: 'attention', 'mlp', 'heads')"


def merge_layers(
    model: nn.Module,
    names: Sequence[str],
    adapter_names: list[str] | None,
    safe_merge: bool,
    new_parameters: bool,
) -> None:
    """Fold adapters into the linear maps whose outputs they edit, in all layers of `model`.

    Args:
        model: the base model.
        names: of the adapters.
        adapter_names: the same as PEFT was given them: None for the active ones.
        safe_merge: whether to raise, before a layer is changed, if its result is not finite.
        new_parameters: whether a linear map may get a parameter that the base's does not have.

    Raises:
        ValueError: one of the layers cannot be merged; no weight has changed.
    """
    reason = why_not_merge(model, names, new_parameters)
    if reason is not None:
        raise ValueError(f"LoReFT cannot be merged into the weights: {reason}. {_ADVICE}")
    chosen = _layers_of(model, names)
    for layer, shares in zip(chosen, _share_weights(model, chosen)):
        layer.merge(safe_merge, adapter_names, new_parameters=True, shared=shares)


def why_not_merge(model: nn.Module, names: Sequence[str], new_parameters: bool = False) -> str | None:
    """Why `merge_layers` would refuse to fold adapters into the weights of `model`; None if it would not."""
    chosen = _layers_of(model, names)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = {id(block) for each in lists for block in each}
    for layer in chosen:
        reason = _OF_BLOCK if id(layer.block) in blocks else layer.why_not_merge(names)
        if reason is not None:
            return reason
    if not new_parameters:
        for layer, shares in zip(chosen, _share_weights(model, chosen)):
            map_name = type(projection_of(layer.block)).__name__
            if layer.quantization_backend is not None:
                return QUANTISED.format(layer.quantization_backend.backend_name)
            if shares:
                return SHARED_WEIGHT.format(map_name)
            if layer.gains_bias(names):
                return NEW_BIAS.format(map_name)
    return None


def _layers_of(model: nn.Module, names: Sequence[str]) -> list[LoReftLayer]:
    """The layers that have any of the adapters."""
    layers = [module for module in model.modules() if isinstance(module, LoReftLayer)]
    return [layer for layer in layers if layer.plans.keys() & names]


def _share_weights(model: nn.Module, layers: Sequence[LoReftLayer]) -> list[bool]:
    """For each layer, whether the weight of its linear map has another use in the model."""
    uses = _uses_of_parameters(model)
    return [uses[id(projection_of(layer.block).weight)] > 1 for layer in layers]


def _uses_of_parameters(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its id. More than one for tied embeddings."""
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return uses
