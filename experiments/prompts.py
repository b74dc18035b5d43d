"""Tasks of prompt and completion that a small model learns in minutes: what `worth.py` compares methods on.

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
YES_NO = [" yes", " no"]


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
    model: Literal["SmolLM2", "Gemma", "MPNet"] = "SmolLM2"
    """Which model `worth.py` trains: that of `--model`, of `--gemma` or of `--mpnet`."""


def gsm8k(folder: Path) -> list[Row]:
    lines = (folder / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return shuffled((f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows)


def ultrafeedback(folder: Path) -> list[Row]:
    lines = (folder / "ultrafeedback_1k" / "ultrafeedback_1k.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return shuffled((f"### Instruction:\n{row['instruction']}\n\n### Response:\n", row["output"]) for row in rows)


def trec_questions(folder: Path) -> list[Row]:
    rows = glue.read_trec(folder / "trec" / "train.txt")
    return shuffled((row["text"], CHOICES[row["label"]]) for row in rows)


def trec_alone(folder: Path) -> list[Row]:
    """Questions, with nothing before them."""
    return [(f"{question}\nCategory:", answer) for question, answer in trec_questions(folder)]


def trec(folder: Path) -> list[Row]:
    """Questions behind three examples."""
    head = (
        "Say what kind of answer a question asks for: " + ", ".join(TYPES[:-1]) + f" or {TYPES[-1]}.\n\n"
        "Who wrote Hamlet ?\nCategory: person\n\nWhat does NASA stand for ?\nCategory: abbreviation\n\n"
        "How far is the moon ?\nCategory: number\n\n"
    )
    return [(head + prompt, answer) for prompt, answer in trec_alone(folder)]


def cola_sentences(folder: Path) -> list[Row]:
    rows = glue.read_cola(folder / "cola" / "in_domain_train.tsv")
    return shuffled((row["sentence"], YES_NO[0] if row["label"] else YES_NO[1]) for row in rows)


def cola(folder: Path) -> list[Row]:
    head = (
        "Is the sentence acceptable English, with no word missing or misplaced?\n\nSentence: The cat sat on the mat.\n"
        "Acceptable: yes\n\nSentence: The cat sat the mat on.\nAcceptable: no\n\nSentence: "
    )
    return [(f"{head}{sentence}\nAcceptable:", answer) for sentence, answer in cola_sentences(folder)]


def sums(folder: Path) -> list[Row]:
    """Sums in words. No three numbers of the rows after the first 400 are those of a row before.

    Among the 400 they can come again. With 240 held out and 160 trained on, a tenth of the 200 rows to test on have
    them, and a training of 240 rows meets about two of these.
    """
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
    "trec, Gemma": (trec, dict(batch=4, steps=80, max_length=192, choices=CHOICES, model="Gemma")),
    "trec, no examples": (trec_alone, dict(batch=8, steps=80, max_length=96, choices=CHOICES)),
    "sums": (sums, dict(batch=4, steps=60, max_length=96, exact=True)),
    "cola": (cola, dict(batch=4, steps=80, max_length=160, choices=YES_NO)),
    "trec, MPNet": (trec_questions, dict(batch=16, steps=80, max_length=96, choices=CHOICES, model="MPNet")),
    "cola, MPNet": (cola_sentences, dict(batch=16, steps=160, max_length=96, choices=YES_NO, model="MPNet")),
}


def read(name: str, folder: Path) -> TextTask:
    make, sizes = SIZES[name]
    return TextTask(name, make(folder), **sizes)
