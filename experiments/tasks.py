"""Tasks that `worth.py` and `rates.py` train and score models on: rows as tokens, for a decoder or an encoder."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from prompts import Row, TextTask
from runs import Found
from settings import Settings
from torch import nn
from torch.nn import functional as F
from training import adapt, kept_mib, train, trainable
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from peft_reft import DataCollatorForLoReft, LoReftConfig

IN_MPNET = {
    "q_proj": "attn.q",
    "k_proj": "attn.k",
    "v_proj": "attn.v",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
}
"""The linear maps of MPNet that do what `methods.py` names as Llama does."""


@dataclass(kw_only=True)
class TaskSettings(Settings):
    gemma: str = "google/gemma-3-270m"
    mpnet: str = "sentence-transformers/all-mpnet-base-v2"
    dev: int = 40
    """Held-out rows that choose the learning rate."""
    test: int = 200
    """Held-out rows that tables are about."""
    share: float = 1.0
    """Share of each task's steps."""
    eval_batch: int = 10


class DecoderTask:
    """Rows whose completions a decoder writes."""

    task_type = "CAUSAL_LM"

    def __init__(self, settings: TaskSettings, task: TextTask, methods: dict[str, dict[str, Any]]) -> None:
        """
        Args:
            methods: the fields of the config of each method. "adamw" in its name gives all parameters one rate.
        """
        self.settings = settings
        self.methods = methods
        self.task = task
        folders = {"SmolLM2": settings.model, "Gemma": settings.gemma, "MPNet": settings.mpnet}
        self.model = folders[task.model]
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.collate = self.padding()
        rows, held = self.encode(task.rows), settings.dev + settings.test
        self.dev, self.test, self.rows = rows[: settings.dev], rows[settings.dev : held], rows[held:]

    def padding(self) -> Callable[..., dict[str, Any]]:
        return DataCollatorForSeq2Seq(self.tokenizer)

    @cached_property
    def choices(self) -> list[int]:
        """The token of each choice. A choice of more than one raises."""
        tokens = []
        for choice in self.task.choices or []:
            (token,) = self.tokenizer(choice, add_special_tokens=False)["input_ids"]
            tokens.append(token)
        return tokens

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

    def base(self) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.model)
        return model

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
            if self.choices:
                at = counted.int().argmax(-1)  # (batch,): where the answer is predicted
                chosen = logits[torch.arange(len(at)), at][:, self.choices].argmax(-1)
                answer = labels[torch.arange(len(at)), at]
                right += (torch.tensor(self.choices)[chosen] == answer).float().tolist()
            elif self.task.exact:
                right += ((logits.argmax(-1) == labels) | ~counted).all(-1).float().tolist()
        return with_errors(losses, right)

    def measure(self, trial: dict[str, Any]) -> Found:
        """Train one model and score it. A run of fewer steps than the task's is scored on `dev` alone."""
        method, steps, seed = trial["method"], trial["steps"], trial["seed"]
        torch.manual_seed(seed)
        model = self.base()
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
            )
            minutes = (time.process_time() - began) / 60
        model.eval()
        found = {"parameters": parameters, "minutes": minutes, "dev": self.score(model, self.dev)["loss"]}
        if steps in (0, self.steps):
            found |= self.score(model, self.test)
        return found

    def memory(self, method: str) -> Found:
        """What a step keeps for its backward: the first rows to train on, as many as a batch has."""
        model = self.adapted(self.base(), method)
        return {"mib": kept_mib(model, self.collator(model)(self.rows[: self.task.batch]))}

    def adapted(self, model: nn.Module, method: str) -> nn.Module:
        fields = self.methods[method]
        loreft, lora = fields.get("loreft", fields), fields.get("lora", fields)
        return adapt(model, method, self.task_type, loreft=loreft, lora=lora)

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
        if self.choices:
            facts["majority"] = majority([row["labels"][-1] for row in self.test])
        return facts


class EncoderTask(DecoderTask):
    """Texts to classify: the prompts of a task, with a new head on an encoder. A completion is a class."""

    task_type = "SEQ_CLS"

    def padding(self) -> Callable[..., dict[str, Any]]:
        return DataCollatorWithPadding(self.tokenizer)

    def encode(self, rows: list[Row]) -> list[dict[str, Any]]:
        choices = self.task.choices or []
        tokens = self.tokenizer([text for text, _ in rows], truncation=True, max_length=self.task.max_length)
        return [
            {"input_ids": ids, "labels": choices.index(choice)}
            for ids, (_, choice) in zip(tokens["input_ids"], rows, strict=True)
        ]

    def base(self) -> nn.Module:
        labels = len(self.task.choices or [])
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=labels)
        return model

    @torch.no_grad()
    def score(self, model: nn.Module, rows: list[dict[str, Any]]) -> Found:
        losses, right = [], []
        collate = self.collator(model)
        for start in range(0, len(rows), self.settings.eval_batch):
            batch = collate(rows[start : start + self.settings.eval_batch])
            labels = batch.pop("labels")  # (batch,)
            logits = model(**batch).logits  # (batch, choices)
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            right += (logits.argmax(-1) == labels).float().tolist()
        return with_errors(losses, right)

    def adapted(self, model: nn.Module, method: str) -> nn.Module:
        fields = self.methods[method]
        if "target_modules" in fields:
            fields = {**fields, "target_modules": [IN_MPNET[name] for name in fields["target_modules"]]}
        return adapt(model, method, self.task_type, loreft=fields, lora=fields)

    def facts(self) -> dict[str, Any]:
        return {
            "batch": self.task.batch,
            "longest": self.task.max_length,
            "prompt": statistics.median(len(row["input_ids"]) for row in self.test),
            "majority": majority([row["labels"] for row in self.test]),
        }


def answers_only(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose positions are known, with labels and logits of its last columns: those that have answers."""
    first = int((batch["labels"] != -100).any(0).nonzero()[0])
    keep = batch["labels"].shape[1] - first + 1
    return {**batch, "labels": batch["labels"][:, -keep:], "logits_to_keep": keep}


def with_errors(losses: list[float], right: list[float]) -> Found:
    """Means over rows with their standard errors. `right` is empty for a task without right and wrong answers."""
    found = {"loss": statistics.mean(losses), "loss_error": error(losses)}
    if right:
        found |= {"accuracy": statistics.mean(right), "accuracy_error": error(right)}
    return found


def majority(answers: list[int]) -> float:
    """The share of rows that have the most frequent answer."""
    return max(answers.count(answer) for answer in set(answers)) / len(answers)


def error(values: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))
