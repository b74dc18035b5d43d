"""`peft-reft chat`: talk with an adapter, line by line."""

from __future__ import annotations

from argparse import Namespace

from transformers import TextStreamer

from .ask import answer, report_assumption, trained_on_chats
from .load import load_model


def run(args: Namespace) -> None:
    model, tokenizer = load_model(args.path_or_name, args.base, args.device)
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {args.path_or_name} has no chat template. Use `peft-reft generate`.")
    trained = trained_on_chats(model)
    if trained is False and not args.chat_template:
        raise ValueError(
            f"{args.path_or_name} was trained on prompts without a chat template, which a conversation needs. Use "
            "`peft-reft generate`, or give --chat-template to talk with it nonetheless."
        )
    if trained is None and not args.chat_template:
        report_assumption(args.path_or_name, "it was")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while line := _read_line():
        messages.append({"role": "user", "content": line})
        # The whole conversation is encoded each time: a kept cache would hold the edits of earlier turns.
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        (text,) = answer(model, tokenizer, inputs, args.max_new_tokens, args.temperature, streamer)
        messages.append({"role": "assistant", "content": text})


def _read_line() -> str:
    """A line of the user; "" at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
