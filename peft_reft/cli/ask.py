"""Asking an adapter: in the form of its training data, for an answer as text."""

from __future__ import annotations

import sys
from typing import Any


def trained_on_chats(model: Any) -> bool | None:
    """Whether the adapter's training data was in a chat template; None if its config does not say."""
    response_template = getattr(model.peft_config["default"], "response_template", None)
    return None if response_template is None else bool(response_template)


def report_assumption(path_or_name: str, assumption: str) -> None:
    """Say on standard error what is assumed of the training data."""
    print(
        f"{path_or_name} does not say whether its training data was in a chat template. Assumed: {assumption}.",
        file=sys.stderr,
    )


def answer(
    model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, temperature: float, streamer: Any = None
) -> list[str]:
    """The answers to the prompts of a batch.

    Args:
        model: a model with an adapter.
        tokenizer: for decoding.
        inputs: what the tokenizer returned for the prompts, padded on the left.
        max_new_tokens: limit for each answer.
        temperature: 0: greedy.
        streamer: prints an answer while it is generated.

    Raises:
        ValueError: a prompt has no token.
    """
    inputs = inputs.to(model.device)
    if not inputs["attention_mask"].any(-1).all():
        raise ValueError("A prompt is empty: there is nothing to answer.")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    prompt_length = inputs["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return texts
