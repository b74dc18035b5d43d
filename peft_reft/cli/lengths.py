"""How long prompts and answers are, and what a spec edits of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from ..positions.groups import Turn
from ..positions.spec import Positions
from ..tuner.untouched import GAIN
from .ask import document, messages
from .rows import Rows
from .rules import Form

SAMPLE = 1000
"""Rows whose tokens are counted; of more rows so many are drawn."""


@dataclass(frozen=True)
class Lengths:
    """Rows of a data set: their form, their number, and the tokens of those that were counted."""

    form: Form
    rows: int | None
    """None: they are streamed."""
    prompt: NDArray[np.int64]
    """(counted,); the earlier turns of a chat belong to its prompt."""
    answer: NDArray[np.int64]
    """(counted,); 0 in rows of labels."""
    labels: int | None = None
    """How many classes the rows have, if they have labels."""

    def medians(self) -> tuple[float, float]:
        return float(np.median(self.prompt)), float(np.median(self.answer))


@dataclass(frozen=True)
class Shares:
    """What a spec edits of rows, and what it leaves to the base; each a share from 0 to 1."""

    tokens: float
    """Of all tokens, those that are edited."""
    training: float
    """The work of a training step, over the forward and the backward of every token."""
    prefix: float
    """Of the prompts' tokens, those before the first edited one: the base's prefix cache has them."""


def count(rows: Rows, tokenizer: Any, form: Form, text_field: str, max_length: int | None, seed: int) -> Lengths:
    """Count the tokens of rows, as TRL's SFT makes them; of at most `SAMPLE` rows.

    Args:
        rows: with the columns that `train` reads; or texts with labels.
        tokenizer: of the model.
        form: of the rows.
        text_field: the column of texts, for rows of that form or of labels.
        max_length: longest row in tokens; what is behind it is cut off. None: any.
        seed: chooses the rows that are counted.
    """
    known = isinstance(rows, Dataset)
    if known and len(rows) > SAMPLE:
        drawn = list(rows.shuffle(seed=seed).select(range(SAMPLE)))
    else:
        drawn = [row for row, _ in zip(rows, range(SAMPLE))]
    counted = [_tokens(row, tokenizer, form, text_field) for row in drawn]
    prompt, answer = np.array(counted, dtype=np.int64).T  # (counted,) each
    if max_length is not None:
        prompt = np.minimum(prompt, max_length)
        answer = np.minimum(answer, max_length - prompt)
    labels = len(set(rows["label"])) if known and form == "labels" else None
    return Lengths(form, len(rows) if known else None, prompt, answer, labels)


def _tokens(row: Mapping[str, Any], tokenizer: Any, form: Form, text_field: str) -> tuple[int, int]:
    """How many tokens prompt and answer of a row have."""
    if form == "labels":
        return len(tokenizer(row[text_field])["input_ids"]), 0
    if form == "texts":
        return 0, len(tokenizer(row[text_field])["input_ids"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None:
        chat = row.get("messages") or row["conversations"]
        last = max((number for number, each in enumerate(chat) if each["role"] == "assistant"), default=len(chat))
        prompt, completion = chat[:last], chat[last:]
    in_chat = not isinstance(prompt, str)
    ids, prompt_length = document(
        tokenizer, prompt, messages(completion, "assistant") if in_chat else completion, in_chat
    )
    return prompt_length, len(ids) - prompt_length


def shares(positions: str, lengths: Lengths) -> Shares:
    """What a spec edits of the rows. Each is taken for one prompt and one answer."""
    prompt, answer = lengths.prompt, lengths.answer
    total = prompt + answer
    turn = Turn(begin=np.zeros_like(prompt), answer=prompt, stop=total, is_first=np.ones_like(prompt, dtype=bool))
    edited, first = np.zeros_like(total), total.copy()
    for group in Positions.parse(positions).groups:
        span = group.span(turn)
        start = np.maximum(span.start, span.lower)
        stop = span.upper if group.count is None else np.minimum(span.upper, span.start + group.count)
        taken = np.maximum(stop - start, 0)
        edited = edited + taken
        first = np.where(taken > 0, np.minimum(first, start), first)
    work = 1.0
    if lengths.form == "prompts":
        untouched = np.minimum(first, np.maximum(prompt - 1, 0))
        work = float((untouched + 2 * (total - untouched)).sum() / (2 * total.sum()))
    return Shares(
        tokens=float(edited.sum() / total.sum()),
        training=work if work <= GAIN else 1.0,
        prefix=float(np.minimum(first, prompt).sum() / max(prompt.sum(), 1)),
    )
