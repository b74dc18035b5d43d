"""Checks of a training run: how its rows are packed, and whether the first backward reaches every trainable tensor."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..config import LoReftConfig
from ..patching import is_wrapped
from ..tuner.layer import LoReftLayer
from ..tuner.merging import ROLLOUTS, why_not_merge

_SHOWN = 8  # names in a warning
WITHOUT_GRAD = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
"""Environment variables by which accelerate says that gradients are not in `grad`, or only in pieces."""


def refuse_packing(args: Any, config: LoReftConfig) -> None:
    """Refuse TRL's ways of packing that cut documents, if the spec counts from a document's beginning.

    Raises:
        ValueError: names the setting, the spec, and what to use. `truncation_mode="keep_end"` only warns: it does no
            harm if no row is longer than `max_length`.
    """
    from_beginning = [group for group in config.layout if group.counts_from_beginning]
    if not from_beginning:
        return
    groups = "+".join(map(str, from_beginning))
    strategy = getattr(args, "packing_strategy", None) if getattr(args, "packing", False) else None
    if strategy in ("wrapped", "bfd_split") and not config.edits_everything:
        raise ValueError(
            f"packing_strategy={strategy!r} cuts documents, so a row starts in the middle of a document, where "
            f"{groups} of positions={config.positions!r} would edit other tokens than `generate` does. Keep documents "
            "whole: packing_strategy='bfd'."
        )
    if getattr(args, "truncation_mode", None) == "keep_end" and getattr(args, "max_length", None):
        warnings.warn(
            f"LoReFT: truncation_mode='keep_end' cuts the beginning of documents longer than max_length="
            f"{args.max_length}, and {groups} of positions={config.positions!r} then edits other tokens than "
            "`generate` does. Nothing in such a row shows it. Use truncation_mode='keep_start', or leave long rows "
            "out.",
            stacklevel=2,
        )


def refuse_merged_rollouts(args: Any, model: nn.Module, names: Sequence[str]) -> None:
    """Refuse rollouts in vLLM for which TRL would merge adapters that cannot be merged, before an engine starts.

    Args:
        args: of a trainer.
        model: its model.
        names: of the adapters of LoReFT in it.

    Raises:
        ValueError: names the line that is missing in the user's script.
    """
    if hasattr(args, "weight_sync_timeout"):  # TRL's asynchronous trainers, which have a way of their own
        reason = why_not_merge(model, names)
        if reason is not None:
            raise ValueError(
                f"{type(args).__name__}: TRL's asynchronous trainers send a server merged weights, or LoRA adapters, "
                f"but {reason}. Use GRPOTrainer or DistillationTrainer with use_vllm=True, after `{ROLLOUTS}`."
            )
        return
    vllm_generation = sys.modules.get("trl.generation.vllm_generation")
    if not getattr(args, "use_vllm", False) or vllm_generation is None:
        return
    reason = why_not_merge(model, names)
    if reason is not None and not is_wrapped(vllm_generation.VLLMGeneration, "sync_weights"):
        raise ValueError(
            f"use_vllm=True: TRL would merge LoReFT into the weights and send these, but {reason}. Call `{ROLLOUTS}` "
            "before the trainer is made, and the adapter alone is sent."
        )


def warn_of_missing_gradients(model: nn.Module) -> None:
    """Warn, by name, of trainable LoReFT tensors that have no gradient. No optimizer will ever move them.

    The module that such a tensor edits was not called, or its output was not used.

    Args:
        model: after a backward, before the gradients are set to None.

    Examples:
        >>> loss.backward()  # doctest: +SKIP
        >>> warn_of_missing_gradients(model)  # doctest: +SKIP
    """
    trainable = {}
    for module_name, module in model.named_modules():
        if isinstance(module, LoReftLayer):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    trainable[f"{module_name}.{name}"] = parameter
    missing = [name for name, parameter in trainable.items() if parameter.grad is None]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        names = ", ".join(missing[:_SHOWN])
        warnings.warn(
            f"LoReFT: {len(missing)} of {len(trainable)} trainable tensors got no gradient in the first training "
            f"step, and will not be trained: {names}{more}. The modules they edit are not called in this training, "
            "or their output is not used; leave them out of `target_modules` or `layers`.",
            stacklevel=2,
        )


class CheckGradients(TrainerCallback):
    """Calls `warn_of_missing_gradients` before the first optimizer step of each run, on the main process."""

    def __init__(self) -> None:
        self.checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        without_grad = any(os.environ.get(name, "false").lower() == "true" for name in WITHOUT_GRAD)
        if not self.checked and state.is_world_process_zero and not without_grad:
            warn_of_missing_gradients(kwargs["model"])
        self.checked = True
