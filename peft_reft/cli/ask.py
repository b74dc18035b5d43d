"""Asking an adapter: in the form of its training data, for an answer as text."""

from __future__ import annotations

import sys
from argparse import Namespace
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


def uses_chat_template(args: Namespace, model: Any, tokenizer: Any, prompts: list[Any]) -> bool:
    """Whether prompts go through the chat template.

    Prompts that are lists of messages do. For texts the arguments decide; if they do not say, the training data; if
    that is not known, whether there is a template.

    Raises:
        ValueError: the tokenizer has no template, or `--raw` is given and a prompt is a list of messages.
    """
    uses: bool | None = args.chat_template
    if any(isinstance(prompt, list) for prompt in prompts):
        if uses is False:
            raise ValueError("--raw: a prompt is a list of messages, which only a chat template makes a text of.")
        uses = True
    if uses is None:
        uses = trained_on_chats(model)
    if uses is None:
        uses = bool(tokenizer.chat_template)
        assumption = "it was (else --raw)" if uses else "it was not, for the tokenizer has none"
        report_assumption(args.path_or_name, assumption)
    if uses and not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {args.path_or_name} has no chat template. Give --raw to ask without one.")
    return uses


def messages(content: Any, role: str) -> Any:
    """A text as the only message of a role; a list of messages as it is."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def encode(tokenizer: Any, prompts: list[Any], in_chat: bool) -> Any:
    """A batch of prompts, padded on the left: what the model reads, as tensors (batch, seq).

    Args:
        tokenizer: one that pads on the left.
        prompts: texts, or lists of messages.
        in_chat: put them into the chat template, with the header behind which the answer begins.
    """
    if not in_chat:
        return tokenizer(prompts, padding=True, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [messages(prompt, "user") for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
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


def document(tokenizer: Any, prompt: Any, completion: Any, in_chat: bool) -> tuple[list[int], int]:
    """The token ids of prompt and completion, as TRL's SFT makes them, and how many of them are the prompt's."""
    if in_chat:
        asked = messages(prompt, "user")
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template([*asked, *messages(completion, "assistant")], return_dict=True)
        ids = whole["input_ids"]
    else:
        eos = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        before = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + completion + eos)["input_ids"]
    same = [one == other for one, other in zip(before, ids)]
    return ids, len(same) if all(same) else same.index(False)
