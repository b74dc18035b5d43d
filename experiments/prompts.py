"""Tasks of prompt and completion that a small decoder learns in minutes: what `worth.py` compares methods on.

FOLDER has gsm8k/*.jsonl, ultrafeedback_1k/*.json, trec/*.txt and cola/*.tsv; word_sums.py makes its own. Most prompts
are long enough that the first and the last tokens of a prompt are a part of it, not all.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import glue
import word_sums

Row = tuple[str, str]
"""Prompt and completion."""

TYPES = ["description", "entity", "abbreviation", "person", "place", "number"]
"""TREC's classes by number."""
CHOICES = [f" {name}" for name in TYPES]
"""What an answer is. Each is one token, of SmolLM2's and of Gemma's."""


@dataclass(frozen=True)
class TextTask:
    """Rows with the size of a training. The first of them are held out."""

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
    exact: bool = False
    """Whether an answer is right if greedy decoding writes just this: if each of its tokens is the likeliest."""
    model: Literal["SmolLM2", "Gemma"] = "SmolLM2"
    """Which model `worth.py` trains: that of `--model`, or of `--gemma`."""


def gsm8k(folder: Path) -> list[Row]:
    lines = (folder / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return shuffled((f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows)


def ultrafeedback(folder: Path) -> list[Row]:
    lines = (folder / "ultrafeedback_1k" / "ultrafeedback_1k.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return shuffled((f"### Instruction:\n{row['instruction']}\n\n### Response:\n", row["output"]) for row in rows)


def trec_alone(folder: Path) -> list[Row]:
    """Questions, with nothing before them."""
    rows = glue.read_trec(folder / "trec" / "train.txt")
    return shuffled((f"{row['text']}\nCategory:", f" {TYPES[row['label']]}") for row in rows)


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
    return shuffled((f"{head}{row['sentence']}\nAcceptable:", " yes" if row["label"] else " no") for row in rows)


def sums(folder: Path) -> list[Row]:
    """Sums in words. No three numbers of the rows after the first 400 are those of a row before."""
    rows = word_sums.rows(400, seed=1, test=True) + word_sums.rows(2000, seed=0)
    return [(word_sums.TEMPLATE.format(row["prompt"]), row["completion"]) for row in rows]


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """The rows in an order that is the same every time."""
    found = list(rows)
    random.Random(0).shuffle(found)
    return found


SIZES: dict[str, tuple[Callable[[Path], list[Row]], dict]] = {
    "gsm8k": (gsm8k, dict(batch=2, steps=60, max_length=112)),
    "ultrafeedback": (ultrafeedback, dict(batch=2, steps=60, max_length=128, cut=True)),
    "trec": (trec, dict(batch=4, steps=80, max_length=192, choices=CHOICES)),
    "trec, Gemma": (trec, dict(batch=4, steps=40, max_length=192, choices=CHOICES, model="Gemma")),
    "trec, no examples": (trec_alone, dict(batch=8, steps=80, max_length=96, choices=CHOICES)),
    "sums": (sums, dict(batch=4, steps=60, max_length=96, exact=True)),
    "cola": (cola, dict(batch=4, steps=80, max_length=160, choices=[" yes", " no"])),
}


def read(name: str, folder: Path) -> TextTask:
    make, sizes = SIZES[name]
    return TextTask(name, make(folder), **sizes)
