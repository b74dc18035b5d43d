"""What LoReFT is worth beside LoRA: the same rows, the same search for a learning rate, errors beside every number.

    python experiments/worth.py --data FOLDER --model SMOLLM2_FOLDER --gemma GEMMA_FOLDER --docs docs
    python experiments/worth.py --data FOLDER --model SMOLLM2_FOLDER --tasks trec --methods "loreft, l7" lora

Every method has the same rates to choose from (`trials.search`): each for a third of the steps, more of them where the
best is the lowest or the highest, and three seeds at the best for all steps. What is held out is never trained on:
`dev` chooses, `test` is shown. The loss is the mean over rows of the mean over an answer's tokens; `accuracy` is the
share of rows whose likeliest choice is right, or whose answer greedy decoding would write. An error is one standard
error, over held-out rows and over seeds together. Results are kept in OUTPUT/results.json; a run that is there is not
run again, and an interrupted run goes on from its last checkpoint. Several processes, each with its own tasks or
methods, can share OUTPUT. LoReFT is trained with the rates of `create_loreft_optimizer`.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, SUFFIXES
from prompts import Row, TextTask, read
from runs import Found, OutOfTime, Results
from settings import Settings, read_arguments
from tables import publish, show
from torch import nn
from torch.nn import functional as F
from training import adapt, kept_mib, train, trainable
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from trials import search
from worth_page import COLUMNS, page

from peft_reft import DataCollatorForLoReft, LoReftConfig
from peft_reft.cli.rules import edits_answers, edits_start

IN_SHORT = ["base", "lora", "loreft", "loreft, l7", "loreft, l14", "lora, r=1"]
WITH_GEMMA = ["base", "lora", "loreft", "loreft, l7", "loreft, l7, no gains"]
LONG = ["base", "lora", "loreft", "loreft, l7", "loreft, l7+g", "loreft, everywhere", "lora, r=1"]
REASONING = [*LONG, *(name for name in METHODS if name not in LONG)]
COMPARED = {
    "trec": IN_SHORT,
    "trec, Gemma": WITH_GEMMA,
    "cola": IN_SHORT,
    "gsm8k": REASONING,
    "sums": REASONING,
    "ultrafeedback": LONG,
}
"""What is compared if `--methods` does not say it. TREC and CoLA have answers of one token, without use for `g`."""

EACH = "those of the task"


@dataclass(kw_only=True)
class WorthSettings(Settings):
    output: Path = Path("outputs/worth")
    gemma: str = "google/gemma-3-270m"
    tasks: list[str] = field(default_factory=lambda: [*COMPARED])
    methods: list[str] = field(default_factory=lambda: [EACH])
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44])
    dev: int = 40
    """Held-out rows that choose the learning rate."""
    test: int = 200
    """Held-out rows that tables are about."""
    share: float = 1.0
    """Share of each task's steps."""
    minutes: float = math.inf
    """After so long no run begins. A method that is not done is not shown."""
    eval_batch: int = 10


PRESETS = {"cpu": WorthSettings(model="HuggingFaceTB/SmolLM2-135M-Instruct")}


class Worth:
    """One task: its rows as tokens, and models that are trained and scored on them."""

    def __init__(self, settings: WorthSettings, task: TextTask, methods: dict[str, dict[str, Any]]) -> None:
        """
        Args:
            methods: the fields of the config of each method. "adamw" in its name gives all parameters one rate, "no
                gains" leaves out of LoReFT's rates what norms make of edits.
        """
        self.settings = settings
        self.methods = methods
        self.task = task
        self.model = {"SmolLM2": settings.model, "Gemma": settings.gemma}[task.model]
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)
        rows, held = self.encode(task.rows), settings.dev + settings.test
        self.dev, self.test, self.rows = rows[: settings.dev], rows[settings.dev : held], rows[held:]
        self.choices = [self.one_token(choice) for choice in task.choices] if task.choices else None

    def one_token(self, text: str) -> int:
        (token,) = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token

    def encode(self, rows: list[Row]) -> list[dict[str, list[int]]]:
        found = []
        for prompt, completion in rows:
            first = self.tokenizer(prompt)["input_ids"]
            rest = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            if not self.task.choices:
                rest = [*rest, self.tokenizer.eos_token_id]
            if self.task.cut and len(first) <= self.task.max_length // 2:
                rest = rest[: self.task.max_length - len(first)]
            if len(first) + len(rest) <= self.task.max_length:
                found.append({"input_ids": first + rest, "labels": [-100] * len(first) + rest})
        return found

    @torch.no_grad()
    def score(self, model: nn.Module, rows: list[dict[str, list[int]]]) -> Found:
        """Loss and accuracy with their standard errors over rows."""
        losses, right = [], []
        collate = self.collator(model)
        for start in range(0, len(rows), self.settings.eval_batch):
            batch = answers_only(collate(rows[start : start + self.settings.eval_batch]))
            labels = batch["labels"][:, 1:]  # (batch, keep - 1)
            logits = model(**batch).logits[:, :-1]  # (batch, keep - 1, vocabulary)
            of_tokens = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (batch, keep - 1)
            counted = labels != -100
            losses += (of_tokens.sum(-1) / counted.sum(-1)).tolist()
            if self.choices is not None:
                at = counted.int().argmax(-1)  # (batch,): where the answer is predicted
                chosen = logits[torch.arange(len(at)), at][:, self.choices].argmax(-1)
                answer = labels[torch.arange(len(at)), at]
                right += (torch.tensor(self.choices)[chosen] == answer).float().tolist()
            elif self.task.exact:
                right += ((logits.argmax(-1) == labels) | ~counted).all(-1).float().tolist()
        found = {"loss": statistics.mean(losses), "loss_error": error(losses)}
        if right:
            found |= {"accuracy": statistics.mean(right), "accuracy_error": error(right)}
        return found

    def measure(self, trial: dict[str, Any]) -> Found:
        """Train one model and score it. A run of fewer steps than the task's is scored on `dev` alone."""
        method, steps, seed = trial["method"], trial["steps"], trial["seed"]
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.model)
        parameters, minutes = 0, 0.0
        if method != "base":
            model = self.adapted(model, method)
            parameters = trainable(model)
            began = time.process_time()
            train(
                model,
                self.rows,
                self.collate,
                self.settings.output / f"{self.task.name}-{method}-{trial['learning_rate']:g}-{seed}-{steps}",
                seed=seed,
                learning_rate=trial["learning_rate"],
                batch=self.task.batch,
                steps=steps,
                fitted=method.startswith("loreft") and "adamw" not in method,
                norm_gains="no gains" not in method,
            )
            minutes = (time.process_time() - began) / 60
        model.eval()
        found = {"parameters": parameters, "minutes": minutes, "dev": self.score(model, self.dev)["loss"]}
        if steps in (0, self.steps):
            found |= self.score(model, self.test)
        return found

    def memory(self, method: str) -> Found:
        """What a step keeps for its backward: the first rows to train on, as many as a batch has."""
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.model)
        model = self.adapted(model, method)
        return {"mib": kept_mib(model, self.collator(model)(self.rows[: self.task.batch]))}

    def adapted(self, model: nn.Module, method: str) -> nn.Module:
        fields = self.methods[method]
        loreft, lora = fields.get("loreft", fields), fields.get("lora", fields)
        return adapt(model, method, "CAUSAL_LM", loreft=loreft, lora=lora)

    def collator(self, model: nn.Module) -> Callable[..., dict[str, Any]]:
        config = getattr(model, "peft_config", {}).get("default")
        return DataCollatorForLoReft(self.collate, config) if isinstance(config, LoReftConfig) else self.collate

    @property
    def steps(self) -> int:
        return round(self.task.steps * self.settings.share)

    def facts(self) -> dict[str, Any]:
        """What the page says of the task: of a training, and of the held-out rows in the median."""
        answers = [sum(label != -100 for label in row["labels"]) for row in self.test]
        prompts = [len(row["labels"]) - answer for row, answer in zip(self.test, answers)]
        facts = {
            "batch": self.task.batch,
            "longest": self.task.max_length,
            "prompt": statistics.median(prompts),
            "answer": statistics.median(answers),
        }
        if self.choices is not None:
            last = [row["labels"][-1] for row in self.test]
            facts["majority"] = max(last.count(choice) for choice in self.choices) / len(last)
        return facts


def answers_only(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose positions are known, with labels and logits of its last columns: those that have answers."""
    first = int((batch["labels"] != -100).any(0).nonzero()[0])
    keep = batch["labels"].shape[1] - first + 1
    return {**batch, "labels": batch["labels"][:, -keep:], "logits_to_keep": keep}


def error(values: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def rows_of(settings: WorthSettings) -> list[dict[str, Any]]:
    """A row for each task and method whose runs are there, after those that the time allows."""
    table, ends = [], time.monotonic() + 60 * settings.minutes
    for name in settings.tasks:
        worth = Worth(settings, read(name, Path(settings.data or ".")), {**METHODS, **SUFFIXES})
        common = dict(model=Path(worth.model).name, dev_rows=settings.dev, test_rows=settings.test)
        results = Results(settings.output / "results.json", common, (ends - time.monotonic()) / 60)
        for method in COMPARED[name] if settings.methods == [EACH] else settings.methods:
            with suppress(OutOfTime):
                row = search(
                    results,
                    worth.measure,
                    task=name,
                    method=method,
                    learning_rates=settings.learning_rates,
                    seeds=settings.seeds,
                    steps=worth.steps,
                )
                table.append(row | {"facts": worth.facts()} | own_parts(worth.methods.get(method)))
                print(json.dumps(table[-1]), flush=True)
                if method != "base":
                    asked = dict(task=name, method=method, measured="memory")
                    table[-1]["MiB"] = results.once(asked, partial(worth.memory, method))["mib"]
    return table


def own_parts(fields: dict[str, Any] | None) -> dict[str, str]:
    """Which parts of serving are the base model's and which the adapter's own, from the fields of its config.

    `prefix` is the prefix cache, up to the first edited token if it is the base's; `decoding` computes answer tokens.
    """
    if fields is None:
        return {"prefix": "base", "decoding": "base"}
    if "positions" not in fields:  # weights change
        return {"prefix": "own", "decoding": "own"}
    positions = fields["positions"]
    return {
        "prefix": "own" if edits_start(positions) else "base",
        "decoding": "own" if edits_answers(positions) else "base",
    }


def beside_lora(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are shown: `share`, of LoRA's parameters, and `within`, whether one standard error parts them.

    The error is LoRA's own. Of tasks with an accuracy that is compared, of others the loss: `score` names it.
    """
    of_lora = {row["task"]: row for row in table if row["method"] == "lora"}
    shown = []
    for row in table:
        score, sign = ("accuracy", 1) if "accuracy" in row else ("loss", -1)
        lora, cells = of_lora.get(row["task"]), {**row, "share": "", "within": "", "score": score}
        if lora is not None and row["method"] not in ("lora", "base"):
            cells["share"] = f"1/{lora['parameters'] / row['parameters']:.0f}"
            cells["behind"] = sign * (lora[score] - row[score])
            cells["within"] = "yes" if cells["behind"] <= lora[f"{score}_error"] else "no"
        for name in ("loss", "accuracy"):
            cells[name] = f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" if name in row else ""
        cells["search"] = f"{row['runs']} runs, {row['search_minutes']:.0f} min"
        cells["minutes"] = f"{row['minutes']:.1f}"
        cells["MiB"] = f"{row['MiB']:.0f}" if "MiB" in row else ""
        shown.append(cells)
    return shown


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    table = beside_lora(rows_of(settings))
    show(table, ["task", *COLUMNS])
    publish("worth", settings)
    if settings.docs:
        text = page(table, rows=settings.test, dev=settings.dev, rates=len(settings.learning_rates))
        (settings.docs / "worth.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
