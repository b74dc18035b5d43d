"""`peft-reft evaluate`: loss and exact match of an adapter on rows with known answers."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .ask import answer, document, encode, uses_chat_template
from .load import load_model
from .rows import questions

_IGNORED = -100  # the label of a token that is not in the loss


def run(args: Namespace) -> None:
    _, prompts, completions = questions(args.file, args.prompt_column, args.completion_column, has_answers=True)
    expected = [_text(completion) for completion in completions]
    model, tokenizer = load_model(args.path_or_name, args.base, args.device)
    in_chat = uses_chat_template(args, model, tokenizer, [*prompts, *completions])
    documents = [document(tokenizer, *pair, in_chat) for pair in zip(prompts, completions)]
    found = {"with": _evaluate(args.batch_size, model, tokenizer, prompts, expected, documents, in_chat)}
    if args.compare:
        with model.disable_adapter():
            found["without"] = _evaluate(args.batch_size, model, tokenizer, prompts, expected, documents, in_chat)
    if args.json:
        print(json.dumps(found if args.compare else found["with"], indent=2))
        return
    for label, numbers in found.items():
        begin = f"{label}: " if args.compare else ""
        print(
            f"{begin}loss {numbers['loss']:.4f} (mean over {numbers['tokens']} tokens), exact match "
            f"{numbers['exact_match']:.3f} ({numbers['matches']} of {numbers['rows']} rows)"
        )


def _text(completion: Any) -> str:
    """The text that an answer has to match."""
    if isinstance(completion, str):
        return completion
    if len(completion) > 1 or not isinstance(completion[0]["content"], str):
        raise ValueError(
            f"A completion is {completion!r:.200}. Expected a text, or one message whose content is a text."
        )
    content: str = completion[0]["content"]
    return content


def _evaluate(
    batch_size: int,
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    expected: list[str],
    documents: list[tuple[list[int], int]],
    in_chat: bool,
) -> dict[str, Any]:
    """Loss by token, and the share of rows whose greedy answer is the expected text (white space around it aside).

    An answer may be as long as the longest completion of its batch.
    """
    loss, tokens, matches = 0.0, 0, 0
    with tqdm(total=len(prompts), unit="row") as bar:
        for begin in range(0, len(prompts), batch_size):
            batch = slice(begin, begin + batch_size)
            batch_loss, batch_tokens = _loss(model, documents[batch])
            loss += batch_loss
            tokens += batch_tokens
            longest = max(len(ids) - prompt_length for ids, prompt_length in documents[batch])
            texts = answer(model, tokenizer, encode(tokenizer, prompts[batch], in_chat), longest, temperature=0)
            matches += sum(text.strip() == right.strip() for text, right in zip(texts, expected[batch]))
            bar.update(len(texts))
    rows = len(prompts)
    return {"rows": rows, "loss": loss / tokens, "tokens": tokens, "exact_match": matches / rows, "matches": matches}


def _loss(model: Any, documents: list[tuple[list[int], int]]) -> tuple[float, int]:
    """The sum of the loss over the completions' tokens of a batch, and their number."""
    ids = [torch.tensor(document) for document, _ in documents]
    input_ids = pad_sequence(ids, batch_first=True)  # (batch, seq), padded on the right with 0
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)  # (batch, seq)
    labels = input_ids.masked_fill(attention_mask == 0, _IGNORED)  # (batch, seq)
    for row, (_, prompt_length) in enumerate(documents):
        labels[row, :prompt_length] = _IGNORED
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    with torch.no_grad():
        mean = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).loss
    tokens = int((labels[:, 1:] != _IGNORED).sum())
    return float(mean) * tokens, tokens
