"""The format of LLM-Adapters (arXiv 2304.01933) that the paper trains and evaluates on; what two recipes share.

A clone of https://github.com/AGI-Edgerunners/LLM-Adapters has ft-training_set/NAME.json and dataset/NAME/test.json,
lists of `instruction`, `input`, `output` and `answer`.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from recipe import Results, compare, slug, train, trainable
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from peft_reft import LoReftConfig

Example = dict[str, str]  # prompt, completion, answer


def read(folder: Path, training: str | None = None, test: str | None = None) -> list[Example]:
    """Rows of a training set or a test set of the clone in `folder`."""
    path = (
        folder / "ft-training_set" / f"{training}.json" if training else folder / "dataset" / str(test) / "test.json"
    )
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
    extract: Callable[[str], str | None],
    batch: int,
    **generation: Any,
) -> float:
    """Share of rows of whose generated text `extract` finds the answer."""
    tokenizer.padding_side = "left"
    right = 0
    for start in tqdm(range(0, len(rows), batch), desc="answering", leave=False):
        part = rows[start : start + batch]
        inputs = tokenizer([template.format(row["prompt"]) for row in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs.to(model.device), **generation)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(extract(text) == row["answer"] for text, row in zip(texts, part))
    tokenizer.padding_side = "right"
    return right / len(rows)


def load(args: Any) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(args.model)
    return base.to("cuda" if torch.cuda.is_available() else "cpu")


def tokenizer_of(args: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def runner(
    args: Any, methods: dict[str, dict[str, Any]], rows: list[Example], template: str
) -> Callable[..., dict[str, Any]]:
    """What trains and keeps an adapter; `dev` and `test` are losses on held-out rows. "base" is the model as it is."""
    tokenizer = tokenizer_of(args)
    collate = DataCollatorForSeq2Seq(tokenizer)
    encoded = encode(tokenizer, rows, template, args.max_length)
    dev, test, encoded = encoded[: args.held], encoded[args.held : 2 * args.held], encoded[2 * args.held :]

    def run(
        task: str, method: str, learning_rate: float, seed: int, loreft: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        model = load(args)
        parameters = 0
        if method != "base":
            config = (LoraConfig if method.startswith("lora") else LoReftConfig)(
                task_type="CAUSAL_LM", **{**methods[method], **(loreft or {})}
            )
            torch.manual_seed(seed)
            model = get_peft_model(model, config)
            name = slug(method, learning_rate, seed, args.steps, *(loreft or {}).values())
            settings = dict(max_steps=args.steps, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch)
            train(model, encoded, collate, args.output / name, seed, learning_rate=learning_rate, **settings)
            model.save_pretrained(args.output / "adapters" / name)
            parameters = trainable(model)
        losses = {name: loss(model, part, collate, args.batch) for name, part in {"dev": dev, "test": test}.items()}
        return {**losses, "parameters": parameters}

    return run


def results_of(args: Any) -> Results:
    common = {name: getattr(args, name) for name in ("epochs", "steps", "batch", "max_length", "held")}
    return Results(args.output / "results.json", **common)


def evaluate(
    args: Any,
    task: str,
    run: Callable[..., dict[str, Any]],
    tests: dict[str, list[Example]],
    template: str,
    extract: Callable[[str], str | None],
) -> list[dict[str, Any]]:
    """The table of all methods; answers are generated with the base and each method's best learning rate alone."""
    results = results_of(args)
    answers = Results(args.output / "answers.json", **results.common, rows=args.rows, new_tokens=args.new_tokens)

    tokenizer = tokenizer_of(args)

    def answer(method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        model = load(args)
        if method != "base":
            model = PeftModel.from_pretrained(
                model, str(args.output / "adapters" / slug(method, learning_rate, seed, args.steps))
            )
        settings = dict(max_new_tokens=args.new_tokens, do_sample=False)
        scores = {
            name: accuracy(model.eval(), tokenizer, rows, template, extract, args.eval_batch, **settings)
            for name, rows in tests.items()
        }
        return {"scores": scores, "accuracy": statistics.mean(scores.values())}

    table = compare(results, run, ["base"], [0.0], args.seeds[:1], lower=True, task=task)
    table += compare(results, run, args.methods, args.learning_rates, args.seeds, lower=True, task=task)
    for row in table:
        seeds = args.seeds[: row["seeds"]]
        runs = [answers.run(answer, method=row["method"], learning_rate=row["learning_rate"], seed=n) for n in seeds]
        row["accuracy"] = statistics.mean(found["accuracy"] for found in runs)
        row["scores"] = {name: statistics.mean(found["scores"][name] for found in runs) for name in tests}
        row["cpu_minutes"] += statistics.mean(found["cpu_minutes"] for found in runs)
    return table
