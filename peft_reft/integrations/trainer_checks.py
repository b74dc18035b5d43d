"""After the first backward of a training run: warn of what is to be trained and gets no gradient."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..tuner.layer import LoReftLayer

_SHOWN = 8
_ELSEWHERE = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
"""Environment variables that accelerate sets while a parameter's gradient is not in `grad`, or in pieces."""


def warn_of_unmoved(model: nn.Module) -> None:
    """Warn, by name, of LoReFT parameters that are to be trained and got no gradient.

    The module that they edit was not called, or what it returned was not used: no optimizer will ever move them.

    Args:
        model: after a backward, before gradients are set to None.

    Examples:
        >>> loss.backward()  # doctest: +SKIP
        >>> warn_of_unmoved(model)  # doctest: +SKIP
    """
    trained = {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if isinstance(module, LoReftLayer)
        for own, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    unmoved = [name for name, parameter in trained.items() if parameter.grad is None]
    if unmoved:
        more = f" and {len(unmoved) - _SHOWN} more" if len(unmoved) > _SHOWN else ""
        warnings.warn(
            f"LoReFT: {len(unmoved)} of {len(trained)} trainable tensors got no gradient in the first training step, "
            f"and will not be trained: {', '.join(unmoved[:_SHOWN])}{more}. The modules they edit are not called in "
            "this training, or what they return is not used; leave them out of `target_modules` or `layers`.",
            stacklevel=2,
        )


class TrainingChecks(TrainerCallback):
    """Calls `warn_of_unmoved` before the first optimizer step of each training run, on the main process."""

    def __init__(self) -> None:
        self.checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        elsewhere = any(os.environ.get(name, "false").lower() == "true" for name in _ELSEWHERE)
        if not self.checked and state.is_world_process_zero and not elsewhere:
            warn_of_unmoved(kwargs["model"])
        self.checked = True
