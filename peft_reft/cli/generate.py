"""`peft-reft generate`: answer prompts with an adapter."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from .ask import answer, report_assumption, trained_on_chats
from .load import load_model


def run(args: Namespace) -> None:
    model, tokenizer = load_model(args.path_or_name, args.base, args.device)
    if _uses_chat_template(args, model, tokenizer):
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in args.prompt],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(args.prompt, padding=True, return_tensors="pt")
    answers = {"": answer(model, tokenizer, inputs, args.max_new_tokens, args.temperature)}
    if args.compare:
        with model.disable_adapter():
            answers["without: "] = answer(model, tokenizer, inputs, args.max_new_tokens, args.temperature)
    for row, prompt in enumerate(args.prompt):
        if len(args.prompt) > 1:
            print(f"> {prompt}")
        for label, texts in answers.items():
            print(f"{label}{texts[row].strip()}")


def _uses_chat_template(args: Namespace, model: Any, tokenizer: Any) -> bool:
    """Whether prompts go through the chat template.

    The arguments decide; if they do not say, the training data; if that is not known, whether there is a template.
    """
    uses: bool | None = args.chat_template
    if uses is None:
        uses = trained_on_chats(model)
    if uses is None:
        uses = bool(tokenizer.chat_template)
        assumption = "it was (else --raw)" if uses else "it was not, for the tokenizer has none"
        report_assumption(args.path_or_name, assumption)
    if uses and not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {args.path_or_name} has no chat template. Give --raw to ask without one.")
    return uses
