"""PEFT's functions that know LoRA's layers alone, taught to take LoReFT's too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from typing import Any

from peft import PeftType, helpers
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from torch import Tensor, nn

from ..config import LoReftConfig
from ..edits.formulas import INTERVENTIONS
from ..patching import wrap
from ..tuner.layer import LoReftLayer
from ..tuner.state_dicts import without_adapter_name
from .hotswap import MAY_DIFFER, exchange

_NOT_COMPARED = (*MAY_DIFFER, "peft_type", "runtime_config")
"""PEFT compares the types first. How an adapter is run is not saved."""


def teach_peft() -> None:
    """Wrap PEFT's functions. A second call does nothing more."""
    compared = [field.name for field in fields(LoReftConfig) if field.name not in _NOT_COMPARED]
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType("LOREFT")] = compared
    wrap(hotswap, "hotswap_adapter_from_state_dict", _hotswap_from_state_dict)
    wrap(hotswap, "prepare_model_for_compiled_hotswap", _prepare_for_compiled_hotswap)
    wrap(helpers, "rescale_adapter_scale", _rescale)


def _hotswap_from_state_dict(
    original: Callable[..., None],
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """`peft.utils.hotswap.hotswap_adapter_from_state_dict`, which PEFT's `hotswap_adapter` calls."""
    if not isinstance(config, LoReftConfig):
        original(model, state_dict, adapter_name, config, *args, **kwargs)
        return
    weights = {without_adapter_name(key, adapter_name): tensor for key, tensor in state_dict.items()}
    exchange(model, adapter_name, config, weights, "the state dict")


def _prepare_for_compiled_hotswap(original: Callable[..., None], model: nn.Module, **kwargs: Any) -> None:
    """`peft.utils.hotswap.prepare_model_for_compiled_hotswap`: with LoReFT alone there is nothing to prepare.

    Raises:
        ValueError: `target_rank` asks for adapters of unlike ranks.
    """
    configs = list(getattr(model, "peft_config", {}).values())
    if not configs or not all(isinstance(config, LoReftConfig) for config in configs):
        original(model, **kwargs)
        return
    target_rank = kwargs.get("target_rank")
    ranks = set().union(*(_ranks(config) for config in configs))
    if target_rank is not None and not ranks <= {target_rank}:
        raise ValueError(
            f"target_rank={target_rank}: adapters of LoReFT have ranks ({sorted(ranks)} here) that cannot be padded, "
            "because the rows of R are orthonormal. Exchange adapters of one rank, which need no preparation "
            "(allowed: None)."
        )


def _ranks(config: LoReftConfig) -> set[int]:
    """The ranks that a config asks for; none, if its formula has no rank."""
    if not INTERVENTIONS[config.intervention].has_rank:
        return set()
    return {config.r} if isinstance(config.r, int) else set(config.r.values())


@contextmanager
def _rescale(
    original: Callable[..., AbstractContextManager[None]], model: nn.Module, multiplier: float
) -> Iterator[None]:
    """`peft.helpers.rescale_adapter_scale`: multiply the scales of all adapters within a `with` block."""
    modules = list(model.modules())
    ours = [module for module in modules if isinstance(module, LoReftLayer)]
    with ExitStack() as stack:
        if not ours or any(isinstance(module, LoraLayer) for module in modules):
            stack.enter_context(original(model, multiplier))
        elif not isinstance(multiplier, float | int):
            raise TypeError(f"multiplier={multiplier!r}: expected a number.")
        before = [dict(layer.scaling) for layer in ours]
        try:
            for layer in ours:
                layer.scaling = {name: scale * multiplier for name, scale in layer.scaling.items()}
            yield
        finally:
            for layer, scaling in zip(ours, before):
                layer.scaling = scaling
