"""An optimizer that fits the learning rate to edited layers, rank, hidden size, norms, and new heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel, TaskType
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..tuner.layer import LoReftLayer
from .norm_gains import norm_gains as measure_gains

_STEP = 2000.0
"""About 30 · sqrt(8 · 576): with it, r=8 behind all 30 blocks of size 576 takes the rate as it is."""

_COMMON_GAIN = 2.0
"""A norm's gain up to this needs no other rate: it is 0.8 to 1.3 where the rule holds without gains."""

_FRESH_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
"""Tasks whose models get a head that begins at random numbers."""


def create_loreft_optimizer(
    model: PeftModel,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    head_lr_ratio: float = 10.0,
    norm_gains: bool = True,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer whose parameter groups have rates of their own, made from one ``lr``.

    Adam moves each number of W and R by about its rate, whatever the gradient. One step so changes a hidden state by a
    share of about ``rate · sqrt(r · d)`` behind each of the n edited modules. The rate of an adapter is therefore
    ``lr · 2000 / (n · sqrt(r · d))``: for r=8 it is lr with 30 layers of size 576, six times lr with 6 layers of size
    384. `red` and `bias` have no r and take lr itself. A new head of a classifier begins at small random numbers and
    needs a higher rate than what stands before it.

    In most decoders a norm reads the edited hidden state. Some norms make the edit many times larger, compared with
    the rest of the hidden state: those of Gemma 3 about 10 times. One forward on 32 tokens of the vocabulary measures
    this gain. If it is more than 2, half of it divides the rate.

    Args:
        model: a model with a LoReFT adapter.
        optimizer_cls: Adam, or one of its kin.
        lr: the learning rate; begin with 1e-3, or 3e-3 for `nodireft` (docs/worth.md, gsm8k).
        head_lr_ratio: what lr is multiplied by for `modules_to_save`, to which PEFT adds the head, if the task type is
            one with a new head (SEQ_CLS, TOKEN_CLS, QUESTION_ANS).
        norm_gains: whether to measure what norms make of edits. False leaves it out, and needs no forward: for a model
            that does not run on tokens alone, or whose weights are spread over processes (FSDP's
            `cpu_ram_efficient_loading`, DeepSpeed's ZeRO-3).
        weight_decay: as in the optimizer.
        **kwargs: other arguments of the optimizer.

    Returns:
        The optimizer of all parameters that are trained. A Trainer takes it as ``optimizers=(optimizer, None)``.

    Raises:
        ValueError: nothing in the model is trained, or no LoReFT adapter is; or the forward of `norm_gains` fails.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_reft import LoReftConfig, create_loreft_optimizer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=576, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
        >>> model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=8))
        >>> optimizer = create_loreft_optimizer(model, lr=1e-3)
        >>> f"{optimizer.param_groups[0]['lr']:.4f}"  # 1e-3 * 2000 / (2 * sqrt(8 * 576))
        '0.0147'
    """
    if not any(parameter.requires_grad for layer in _layers(model) for parameter in layer.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no LoReFT adapter that is trained. Add one with `get_peft_model`, or load it "
            "with `is_trainable=True`."
        )
    rates: dict[int, float] = {}
    for parameter, rate in _rates(model, lr, lr * head_lr_ratio, measure_gains(model) if norm_gains else {}):
        rates[id(parameter)] = min(rate, rates.get(id(parameter), math.inf))  # several layers may share it
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(id(parameter), lr), []).append(parameter)
    given = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    return optimizer_cls(given, lr=lr, weight_decay=weight_decay, **kwargs)  # type: ignore[call-arg]


def _layers(model: nn.Module) -> list[LoReftLayer]:
    return [module for module in model.modules() if isinstance(module, LoReftLayer)]


def _rates(
    model: PeftModel, lr: float, of_heads: float, gains: Mapping[LoReftLayer, float]
) -> Iterator[tuple[nn.Parameter, float]]:
    """Parameters whose rate is not the optimizer's own, with it."""
    layers = _layers(model)
    for name, config in model.peft_config.items():
        edited = [layer for layer in layers if name in layer.plans]
        for layer in edited:
            weights, gain = layer.weights(name), gains.get(layer, 1.0)
            if not weights.has_rank:
                continue
            matrix = next(getattr(weights, each) for each, dimensions in weights.shapes.items() if dimensions == "rd")
            r, d = matrix.shape[-2:]
            rate = lr * _STEP / (len(edited) * math.sqrt(r * d))
            for parameter in weights.parameters():
                yield parameter, rate / max(1.0, gain / _COMMON_GAIN)
        if config.task_type in _FRESH_HEADS:
            for module in model.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    for parameter in module.parameters():
                        yield parameter, of_heads
