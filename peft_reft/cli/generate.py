"""`peft-reft generate`: answer prompts, or a file of prompts, with an adapter."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from typing import Any, TextIO

from tqdm import tqdm

from .ask import answer, encode, uses_chat_template
from .load import load_model


def run(args: Namespace) -> None:
    if args.file:
        _answer_file(args)
        return
    _refuse_without_effect(args)
    model, tokenizer = load_model(args.path_or_name, args.base, args.device)
    in_chat = uses_chat_template(args, model, tokenizer, args.prompt)
    answers = _answers(args, model, tokenizer, args.prompt, in_chat)
    for row, prompt in enumerate(args.prompt):
        if len(args.prompt) > 1:
            print(f"> {prompt}")
        print(answers["generated"][row])
        if args.compare:
            print(f"without: {answers['generated_without'][row]}")


def _answers(args: Namespace, model: Any, tokenizer: Any, prompts: list[Any], in_chat: bool) -> dict[str, list[str]]:
    """The answers to a batch of prompts, with the adapter and, if `--compare` is given, without."""
    inputs = encode(tokenizer, prompts, in_chat)
    answers = {"generated": answer(model, tokenizer, inputs, args.max_new_tokens, args.temperature)}
    if args.compare:
        with model.disable_adapter():
            answers["generated_without"] = answer(model, tokenizer, inputs, args.max_new_tokens, args.temperature)
    return {label: [text.strip() for text in texts] for label, texts in answers.items()}


def _answer_file(args: Namespace) -> None:
    """Answer the rows of `--file`, `--batch-size` together; each batch is written when it is answered."""
    from .rows import questions  # needs datasets, which answering one prompt does not

    if args.prompt:
        raise ValueError("Prompts and --file exclude each other. Give one.")
    if args.output:
        _check_output(args.output, args.file)
    rows, prompts, _ = questions(args.file, args.prompt_column, None, has_answers=False)
    model, tokenizer = load_model(args.path_or_name, args.base, args.device)
    given = (args, model, tokenizer, rows, prompts)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as output:
            _answer_rows(*given, output)
        print(f"Wrote {args.output}, {len(rows)} rows.")
    else:
        _answer_rows(*given, sys.stdout)


def _answer_rows(
    args: Namespace, model: Any, tokenizer: Any, rows: list[dict[str, Any]], prompts: list[Any], output: TextIO
) -> None:
    in_chat = uses_chat_template(args, model, tokenizer, prompts)
    with tqdm(total=len(rows), unit="row") as bar:
        for begin in range(0, len(rows), args.batch_size):
            batch = slice(begin, begin + args.batch_size)
            answers = _answers(args, model, tokenizer, prompts[batch], in_chat)
            for number, row in enumerate(rows[batch]):
                answered = {**row, **{label: texts[number] for label, texts in answers.items()}}
                print(json.dumps(answered, ensure_ascii=False, default=str), file=output, flush=True)
            bar.update(len(rows[batch]))


def _check_output(output: str, file: str) -> None:
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"--output {output}: there is no folder {folder}.")
    if os.path.exists(output) and os.path.samefile(output, file):
        raise ValueError(f"--output {output} is the file that --file names. Give another name.")


def _refuse_without_effect(args: Namespace) -> None:
    if not args.prompt:
        raise ValueError("A prompt is missing. Give prompts, or --file FILE.")
    if args.output or args.prompt_column:
        raise ValueError("--output and --prompt-column go with --file FILE.")
