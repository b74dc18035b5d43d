"""Activation checkpointing: a part that runs again in a backward runs within the `Forward` that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..patching import check_listed
from .forward import innermost, resumed

_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes that hold a module's checkpoint function: transformers' models; torch's CheckpointWrapper."""


class WithForward:
    """A checkpoint function whose recomputation runs within the `Forward` that it belongs to.

    The hooks cannot see to that. They may not run again in the backward: with transformers up to 5.20 they do, with
    later versions they do not. Several forwards may come before one backward (DPO). On a GPU the backward runs in a
    thread of its own.

    Args:
        checkpoint: torch's checkpoint function, or one with the same arguments.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        forward = innermost()

        def run(*inputs: Any, **named: Any) -> Any:
            with resumed(forward):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)


def wrap_checkpoint_functions(model: nn.Module) -> bool:
    """Wrap the checkpoint functions of all modules; returns whether any part of the model is recomputed."""
    recomputes = False
    for module in model.modules():
        if vars(module).get("gradient_checkpointing") or "checkpoint_fn" in vars(module):
            recomputes = True
        for name in _CHECKPOINT_FUNCTIONS:
            function = vars(module).get(name)
            if function is not None and not isinstance(function, WithForward):
                check_listed(type(module), name)
                vars(module)[name] = WithForward(function)
    return recomputes


def unwrap_checkpoint_functions(model: nn.Module) -> None:
    """Undo `wrap_checkpoint_functions`."""
    for module in model.modules():
        for name in _CHECKPOINT_FUNCTIONS:
            function = vars(module).get(name)
            if isinstance(function, WithForward):
                vars(module)[name] = function.checkpoint
