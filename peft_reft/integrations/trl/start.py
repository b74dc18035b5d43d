"""Wrap TRL's `VLLMGeneration`, so that it sends the adapter alone if the model has one of LoReFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ...patching import wrap
from . import colocated, server
from .policy import Policy

_SENDS = "_peft_reft_sends"
"""Attribute of a `VLLMGeneration`: the policy, and its way to the engine."""


def rollouts_in_vllm(**engine_arguments: Any) -> None:
    """Let TRL's trainers roll out LoReFT in vLLM. Call it once, before the trainer is made.

    Trainers whose model has no active LoReFT adapter do what TRL does. A second call replaces the first.

    Args:
        engine_arguments: for the engine of `vllm_mode="colocate"`, such as `enforce_eager=True`: what vLLM's `LLM`
            takes. They replace TRL's. By default its `dtype` is that in which the trainer computes.

    Examples:
        >>> from peft_reft.integrations.trl import rollouts_in_vllm
        >>> rollouts_in_vllm()  # doctest: +SKIP
        >>> args = GRPOConfig(use_vllm=True, vllm_mode="colocate")  # doctest: +SKIP
        >>> GRPOTrainer(model, reward_funcs, args, peft_config=LoReftConfig()).train()  # doctest: +SKIP
    """
    from trl.generation.vllm_generation import VLLMGeneration

    wrap(VLLMGeneration, "_init_vllm", partial(_start, engine_arguments))
    wrap(VLLMGeneration, "sync_weights", _send)
    wrap(VLLMGeneration, "generate", _generate)


def _start(engine_arguments: dict[str, Any], inner: Callable[[Any], None], generation: Any) -> None:
    """Make or find the engine (`VLLMGeneration._init_vllm`)."""
    policy = Policy.of(generation.model)
    if policy is None:
        inner(generation)
        return
    if generation.mode == "server":
        way: colocated.Colocated | server.Served = server.start(inner, generation, policy)
    else:
        way = colocated.start(inner, generation, policy, engine_arguments)
    setattr(generation, _SENDS, (policy, way))


def _send(inner: Callable[[Any], None], generation: Any) -> None:
    """Send the adapter as it is now (`VLLMGeneration.sync_weights`)."""
    found = vars(generation).get(_SENDS)
    if found is None:
        inner(generation)
        return
    policy, way = found
    way.send(policy.files(generation))


def _generate(inner: Callable[..., Any], generation: Any, *args: Any, **kwargs: Any) -> Any:
    """Note the prompts of a rollout (`VLLMGeneration.generate`): the forward that trains must find where they end."""
    output = inner(generation, *args, **kwargs)
    found = vars(generation).get(_SENDS)
    if found is not None:
        prompts, answers = output[:2]
        found[0].note_rollout(prompts, answers)
    return output
