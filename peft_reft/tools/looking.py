"""A forward to look at something: it leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..tuner.layer import LoReftLayer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode, and back into the mode of each."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def without_edits(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters of LoReFT edit nothing. Other adapters and trained modules stay as they are."""
    layers = [module for module in model.modules() if isinstance(module, LoReftLayer) and not module.disable_adapters]
    for layer in layers:
        layer.__dict__["_disable_adapters"] = True  # PEFT's `enable_adapters` would change what is trained
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__["_disable_adapters"] = False


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which is a tensor or a tuple that begins with one."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
