"""The marks of a chat template, found from a tokenizer and written into adapters; and prompts of a length you know."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import LoReftConfig
from ..positions.batch import prompts_of
from ..positions.chat.template import Found, find_marks
from ..positions.marks import Marks, check_template
from ..tuner.forward import share_plan
from ..tuner.layer import LoReftLayer


def chat_marks(tokenizer: Any) -> dict[str, list[list[int]]]:
    """Find the headers of a tokenizer's chat template, as fields of `LoReftConfig`.

    An unchanged Trainer, TRL's trainers and `peft-reft train` find them by themselves. Call this in a training loop of
    your own, or for an adapter that was trained without them.

    Args:
        tokenizer: a tokenizer or processor of transformers, with a chat template.

    Returns:
        `response_template` (headers behind which an answer begins) and `instruction_template` (headers at which an
        answer has ended), each a list of lists of token ids.

    Raises:
        ValueError: the tokenizer has no chat template, or headers cannot be told from contents in it.

    Examples:
        >>> config = LoReftConfig(task_type="CAUSAL_LM", **chat_marks(tokenizer))  # doctest: +SKIP
    """
    found = find_marks(tokenizer)
    if found is None:
        raise ValueError(f"{type(tokenizer).__name__} has no chat template, so there are no headers to find.")
    if found.problem is not None:
        raise ValueError(f"The headers of the chat template cannot be found: {found.problem}")
    warn_of_limits(found)
    return {"response_template": found.response_template, "instruction_template": found.instruction_template}


def warn_of_limits(found: Found) -> None:
    """Warn of chats in which the marks that were found are wrong: with tools, or with system messages in mid-chat."""
    taken_for_answers = []
    if found.without_tools:
        taken_for_answers.append("the results of tools")
    if found.without_system:
        taken_for_answers.append("system messages in mid-chat")
    if taken_for_answers:
        warnings.warn(
            "LoReFT found the headers of the chat template, but they do not tell "
            f"{' and '.join(taken_for_answers)} from answers: in chats that have them, other tokens are edited than "
            "meant. Give `response_template` and `instruction_template` in the config if you have such chats.",
            stacklevel=3,
        )


def set_marks(
    model: nn.Module,
    response_template: Sequence[Sequence[int]],
    instruction_template: Sequence[Sequence[int]],
    adapter_names: Sequence[str] | None = None,
) -> list[str]:
    """Write marks into adapters: into their config, which is saved, and into the plans of their layers.

    Args:
        model: with LoReFT adapters; a PEFT model, or a model of transformers after `add_adapter`.
        response_template: see `LoReftConfig`.
        instruction_template: see `LoReftConfig`.
        adapter_names: which adapters; None: those that have no marks yet.

    Returns:
        The names of the adapters that were changed.
    """
    marks = Marks.of(
        check_template(list(response_template), "response_template"),
        check_template(list(instruction_template), "instruction_template"),
    )
    assert marks is not None
    configs = loreft_configs(model)
    if adapter_names is None:
        adapter_names = [name for name, config in configs.items() if config.response_template is None]
    for name in adapter_names:
        configs[name].response_template = [list(template) for template in marks.response]
        configs[name].instruction_template = [list(template) for template in marks.instruction]
    for layer in model.modules():
        if isinstance(layer, LoReftLayer):
            for name in adapter_names:
                plan = layer.plans.get(name)
                if plan is not None:
                    layer.plans[name] = share_plan(replace(plan, wanted=replace(plan.wanted, marks=marks)))
    return list(adapter_names)


def loreft_configs(model: nn.Module) -> dict[str, LoReftConfig]:
    """Return the configs of a model's LoReFT adapters, by name."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            return {name: config for name, config in configs.items() if isinstance(config, LoReftConfig)}
    return {}


@contextmanager
def prompt_lengths(lengths: Sequence[int]) -> Iterator[None]:
    """Say how long the prompts of the rows are, around forwards that do not say it themselves.

    It is for code that you cannot change: an evaluation harness, a reward function, a loss without labels. Inside the
    context each row that a causal language model is given is a prompt of the length given and an answer. If a forward
    continues a filled cache, the length counts from the beginning of what the cache holds.

    Args:
        lengths: number of real tokens in the prompt of each row, in the order of the rows. Padding does not count.

    Raises:
        ValueError: a length is no int of 0 or more; or, in a forward, there are not as many rows as lengths.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_reft import LoReftConfig, prompt_lengths
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()
        >>> config = LoReftConfig(task_type="CAUSAL_LM", positions="l2", init_weights=False)
        >>> model = get_peft_model(base, config).eval()
        >>> ids, labels = torch.arange(8).unsqueeze(0), torch.tensor([[-100] * 5 + [5, 6, 7]])
        >>> with prompt_lengths([5]):
        ...     logits = model(input_ids=ids).logits
        >>> torch.equal(logits, model(input_ids=ids, labels=labels).logits)
        True
    """
    given = list(lengths)
    if not all(type(length) is int and length >= 0 for length in given):
        raise ValueError(f"prompt_lengths({lengths!r}): expected ints of 0 or more, one for each row.")
    token = prompts_of.set(given)
    try:
        yield
    finally:
        prompts_of.reset(token)
