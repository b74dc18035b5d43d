"""Tasks of prompt and completion that a small decoder learns in minutes: what `worth.py` compares methods on.

FOLDER has gsm8k/*.jsonl, ultrafeedback_1k/*.json, trec/*.txt and cola/*.tsv. Most prompts are long enough that the
first and the last tokens of a prompt are a part of it, not all.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import glue

Row = tuple[str, str]
"""Prompt and completion."""

TYPES = ["description", "entity", "abbreviation", "person", "place", "number"]
"""TREC's classes by number. Each is one token of SmolLM2's behind a space."""


@dataclass(frozen=True)
class TextTask:
    """Rows in an order of their own, with the size of a training."""

    name: str
    rows: list[Row]
    batch: int
    steps: int
    max_length: int
    """Tokens of a row, at most. Longer rows are left out."""
    cut: bool = False
    """Whether long answers are cut at `max_length`, if the prompt takes no more than half of it."""
    choices: list[str] | None = None
    """The completions of a classification, which is scored by the likeliest of them."""


def gsm8k(folder: Path) -> list[Row]:
    lines = (folder / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]


def ultrafeedback(folder: Path) -> list[Row]:
    lines = (folder / "ultrafeedback_1k" / "ultrafeedback_1k.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(f"### Instruction:\n{row['instruction']}\n\n### Response:\n", row["output"]) for row in rows]


def trec_alone(folder: Path) -> list[Row]:
    """Questions, with nothing before them."""
    rows = glue.read_trec(folder / "trec" / "train.txt")
    return [(f"{row['text']}\nCategory:", f" {TYPES[row['label']]}") for row in rows]


def trec(folder: Path) -> list[Row]:
    """Questions behind three examples."""
    head = (
        "Say what kind of answer a question asks for: " + ", ".join(TYPES[:-1]) + f" or {TYPES[-1]}.\n\n"
        "Who wrote Hamlet ?\nCategory: person\n\nWhat does NASA stand for ?\nCategory: abbreviation\n\n"
        "How far is the moon ?\nCategory: number\n\n"
    )
    return [(head + prompt, answer) for prompt, answer in trec_alone(folder)]


def cola(folder: Path) -> list[Row]:
    rows = glue.read_cola(folder / "cola" / "in_domain_train.tsv")
    head = (
        "Is the sentence acceptable English, with no word missing or misplaced?\n\nSentence: The cat sat on the mat.\n"
        "Acceptable: yes\n\nSentence: The cat sat the mat on.\nAcceptable: no\n\nSentence: "
    )
    return [(f"{head}{row['sentence']}\nAcceptable:", " yes" if row["label"] else " no") for row in rows]


SIZES: dict[str, tuple[Callable[[Path], list[Row]], dict]] = {
    "gsm8k": (gsm8k, dict(batch=4, steps=80, max_length=128)),
    "ultrafeedback": (ultrafeedback, dict(batch=2, steps=80, max_length=160, cut=True)),
    "trec": (trec, dict(batch=4, steps=80, max_length=192, choices=[f" {name}" for name in TYPES])),
    "trec, no examples": (trec_alone, dict(batch=8, steps=80, max_length=96, choices=[f" {name}" for name in TYPES])),
    "cola": (cola, dict(batch=4, steps=80, max_length=160, choices=[" yes", " no"])),
}


def read(name: str, folder: Path) -> TextTask:
    """A task, its rows shuffled by one seed."""
    make, sizes = SIZES[name]
    rows = make(folder)
    random.Random(0).shuffle(rows)
    return TextTask(name, rows, **sizes)
