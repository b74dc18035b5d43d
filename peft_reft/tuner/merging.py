"""Merge adapters into the weights of a whole model, or refuse to before any weight is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from .folding import NEW_BIAS, SHARED_WEIGHT, projection_of
from .layer import LoReftLayer

_ADVICE = "Keep the adapter beside the model; `unload()` gives the base model back without it."
_OF_BLOCK = "a block's output is edited, which no single weight makes (allowed: 'attention', 'mlp')"


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
    layers = [module for module in model.modules() if isinstance(module, LoReftLayer)]
    chosen = [layer for layer in layers if layer.plans.keys() & names]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = {id(block) for each in lists for block in each}
    for layer in chosen:
        _refuse(_OF_BLOCK if id(layer.block) in blocks else layer.why_not_merge(names))
    uses = _uses_of_parameters(model)
    sharing = {layer for layer in chosen if uses[id(projection_of(layer.block).weight)] > 1}
    if not new_parameters:
        for layer in chosen:
            map_name = type(projection_of(layer.block)).__name__
            if layer in sharing:
                _refuse(SHARED_WEIGHT.format(map_name))
            elif layer.gains_bias(names):
                _refuse(NEW_BIAS.format(map_name))
    for layer in chosen:
        layer.merge(safe_merge, adapter_names, new_parameters=True, shared=layer in sharing)


def _uses_of_parameters(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its id. More than one for tied embeddings."""
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return uses


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"LoReFT cannot be merged into the weights: {reason}. {_ADVICE}")
