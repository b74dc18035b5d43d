"""The format of LLM-Adapters (arXiv 2304.01933), which the paper trains and evaluates on: for arithmetic, commonsense.

A clone of https://github.com/AGI-Edgerunners/LLM-Adapters has ft-training_set/NAME.json and dataset/NAME/test.json,
lists of `instruction`, `input`, `output` and `answer`.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import Found, Results, Run, compare
from settings import Settings
from torch import nn
from tqdm import tqdm
from training import adapt, reload, train, trainable
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

Example = dict[str, str]  # prompt, completion, answer
Extract = Callable[[str], str | None]
"""Finds the answer in a text."""


def read_training_set(folder: Path, name: str) -> list[Example]:
    """Rows of a training set of the clone in `folder`."""
    return read(folder / "ft-training_set" / f"{name}.json")


def read_test_set(folder: Path, name: str) -> list[Example]:
    """Rows of a test set of the clone in `folder`."""
    return read(folder / "dataset" / name / "test.json")


def read(path: Path) -> list[Example]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [{"prompt": row["instruction"], "completion": row["output"], "answer": str(row["answer"])} for row in rows]


def encode(tokenizer: Any, rows: list[Example], template: str, max_length: int) -> list[dict[str, list[int]]]:
    """Tokens of prompt and completion; the prompt's have no label. Rows longer than `max_length` are left out."""
    found = []
    for row in rows:
        prompt = tokenizer(template.format(row["prompt"]))["input_ids"]
        rest = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + len(rest) <= max_length:
            found.append({"input_ids": prompt + rest, "labels": [-100] * len(prompt) + rest})
    return found


@torch.no_grad()
def loss(model: nn.Module, rows: list[dict[str, list[int]]], collate: Any, batch: int) -> float:
    losses = []
    for start in range(0, len(rows), batch):
        inputs = collate(rows[start : start + batch])
        losses.append(model(**{k: v.to(model.device) for k, v in inputs.items()}).loss.item())
    return statistics.mean(losses)


@torch.no_grad()
def accuracy(
    model: Any,
    tokenizer: Any,
    rows: list[Example],
    template: str,
    extract: Extract,
    *,
    batch: int,
    new_tokens: int,
) -> float:
    """Share of rows for which `extract` finds the right answer in the generated text."""
    tokenizer.padding_side = "left"
    right = 0
    for start in tqdm(range(0, len(rows), batch), desc="answering", leave=False):
        part = rows[start : start + batch]
        inputs = tokenizer([template.format(row["prompt"]) for row in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs.to(model.device), max_new_tokens=new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(extract(text) == row["answer"] for text, row in zip(texts, part))
    tokenizer.padding_side = "right"
    return right / len(rows)


@dataclass(kw_only=True)
class LanguageSettings(Settings):
    """Settings of arithmetic.py and commonsense.py."""

    data: str = "."
    tests: list[str]
    methods: list[str]
    learning_rates: list[float]
    seeds: list[int]
    epochs: float
    steps: int
    batch: int
    max_length: int
    new_tokens: int
    """Tokens of an answer, at most."""
    eval_batch: int
    rows: int
    """Questions of each test set, at most."""
    held: int
    """Training rows in each of `dev` and `test`, which are not trained on."""


class LanguageTask:
    """Rows of prompt and completion, and models that are trained on them. Scores are losses on held-out rows.

    Args:
        methods: fields of the config of each method, as in `methods.py`; "base" is the model as it is.
        template: what a prompt is put into.
    """

    lower = True  # the lowest `dev` is the best

    def __init__(
        self,
        name: str,
        settings: LanguageSettings,
        methods: dict[str, dict[str, Any]],
        rows: list[Example],
        template: str,
    ) -> None:
        self.name = name
        self.settings = settings
        self.methods = methods
        self.loreft = {**methods["loreft"], "dropout": 0.0}
        self.template = template
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)
        encoded, held = encode(self.tokenizer, rows, template, settings.max_length), settings.held
        self.dev, self.test, self.rows = encoded[:held], encoded[held : 2 * held], encoded[2 * held :]

    def load(self) -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(self.settings.model)
        return base.to("cuda" if torch.cuda.is_available() else "cpu")

    def adapter(self, run: Run) -> Path:
        """Where the trained adapter of a run is."""
        return self.settings.output / "adapters" / run.folder(self.settings.steps)

    def measure(self, run: Run) -> Found:
        """Train and keep an adapter; its losses."""
        settings = self.settings
        model = self.load()
        parameters = 0
        if run.method != "base":
            torch.manual_seed(run.seed)
            fields = {**self.methods[run.method], **(run.loreft or {})}
            loreft, lora = fields.get("loreft", fields), fields.get("lora", fields)
            model = adapt(model, run.method, "CAUSAL_LM", loreft=loreft, lora=lora)
            train(
                model,
                self.rows,
                self.collate,
                settings.output / run.folder(settings.steps),
                seed=run.seed,
                learning_rate=run.learning_rate,
                batch=settings.batch,
                steps=settings.steps,
                epochs=settings.epochs,
            )
            model.save_pretrained(self.adapter(run))
            parameters = trainable(model)
        dev = loss(model, self.dev, self.collate, settings.batch)
        test = loss(model, self.test, self.collate, settings.batch)
        return {"dev": dev, "test": test, "parameters": parameters}

    def answer(self, run: Run, tests: dict[str, list[Example]], extract: Extract) -> Found:
        """Accuracy of a trained adapter on each test set, greedily."""
        model = self.load()
        if run.method != "base":
            model = reload(model, run.method, self.adapter(run))
        model.eval()
        scores = {}
        for name, rows in tests.items():
            scores[name] = accuracy(
                model,
                self.tokenizer,
                rows,
                self.template,
                extract,
                batch=self.settings.eval_batch,
                new_tokens=self.settings.new_tokens,
            )
        return {"scores": scores, "accuracy": statistics.mean(scores.values())}


def results_of(settings: LanguageSettings) -> Results:
    names = ("epochs", "steps", "batch", "max_length", "held")
    return Results(settings.output / "results.json", {name: getattr(settings, name) for name in names})


def evaluate(task: LanguageTask, tests: dict[str, list[Example]], extract: Extract) -> list[dict[str, Any]]:
    """The table of all methods. Answers come from the base and from each method's best learning rate alone."""
    settings = task.settings
    results = results_of(settings)
    common = {**results.common, "rows": settings.rows, "new_tokens": settings.new_tokens}
    answers = Results(settings.output / "answers.json", common)
    base = compare(
        results,
        task.measure,
        methods=["base"],
        learning_rates=[0.0],
        seeds=settings.seeds[:1],
        task=task.name,
        lower=True,
    )
    adapted = compare(
        results,
        task.measure,
        methods=settings.methods,
        learning_rates=settings.learning_rates,
        seeds=settings.seeds,
        task=task.name,
        lower=True,
    )
    table = base + adapted
    for row in table:
        runs = []
        for seed in settings.seeds[: row["seeds"]]:
            run = Run(method=row["method"], learning_rate=row["learning_rate"], seed=seed, task=task.name)
            runs.append(answers.once(run.settings(), lambda run=run: task.answer(run, tests, extract)))
        row["accuracy"] = statistics.mean(found["accuracy"] for found in runs)
        row["scores"] = {name: statistics.mean(found["scores"][name] for found in runs) for name in tests}
        row["cpu_minutes"] += statistics.mean(found["cpu_minutes"] for found in runs)
    return table
