"""GLUE with an encoder (paper, section on natural language understanding): LoReFT, LoRA, and the head alone.

    python examples/glue.py                                                    # RoBERTa-base, eight tasks, a GPU
    python examples/glue.py --preset cpu --data FOLDER --model MINILM_FOLDER    # CoLA and TREC, MiniLM, two CPU cores

The paper's protocol: half of the validation data is held out for the score, the other half chooses the learning rate;
mean over seeds. Every method has the same three rates to choose from. FOLDER has cola/*.tsv and trec/*.txt; without
`--data` the sets come from the Hub. Results are kept in OUTPUT/results.json, and a run that is there is not run again;
one that was interrupted goes on from its last checkpoint.

TREC with MiniLM, accuracy over 3 seeds (CPU minutes a run): LoReFT 0.905 (1.1), LoRA 0.911 (1.2), head 0.516 (0.6).
CoLA, correlation: 0.000 for each in 300 steps; with `--steps 1200`, 2 seeds: LoReFT 0.108, LoRA 0.122, head 0.000.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipe import Results, adapt, arguments, compare, comparison_figure, publish, show, slug, train, trainable
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "trec": ("text",),
}
# The paper's positions: p1 for MNLI, p11 for QNLI and QQP, else p3.
POSITIONS = {"mnli": "f1", "qnli": "f11", "qqp": "f11"}
LOWER = False  # `dev` is a score
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(
        model="FacebookAI/roberta-base",
        data=None,
        tasks=["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"],
        methods=["loreft", "lora", "head"],
        learning_rates=[3e-4, 6e-4, 9e-4],
        seeds=[42, 43, 44, 45, 46],
        epochs=40.0,
        steps=-1,
        batch=32,
        r=1,
        dropout=0.05,
        max_length=256,
    ),
    "cpu": dict(
        model="sentence-transformers/all-MiniLM-L6-v2",
        data=None,
        tasks=["cola", "trec"],
        methods=["loreft", "lora", "head"],
        learning_rates=[1e-3, 3e-3, 9e-3],
        seeds=[42, 43, 44],
        epochs=1.0,
        steps=300,
        batch=16,
        r=4,
        dropout=0.0,
        max_length=128,
    ),
}


def local(folder: Path, task: str) -> tuple[list[dict], list[dict]]:
    """Training and validation rows of `folder/task`."""
    if task == "trec":
        lines = {
            p: (folder / "trec" / f"{p}.txt").read_text(encoding="latin-1").splitlines() for p in ("train", "test")
        }
        parts = [[line.split(" ", 1) for line in lines[part]] for part in ("train", "test")]
        return tuple([{"text": text, "label": int(label)} for label, text in part] for part in parts)

    def cola(*names: str) -> list[dict]:
        lines = [
            line.split("\t") for name in names for line in (folder / "cola" / name).read_text("utf-8").splitlines()
        ]
        return [{"sentence": line[3], "label": int(line[1])} for line in lines]

    if task != "cola":
        raise SystemExit(f"--data has no {task}: cola and trec can be read from files, the others come from the Hub.")
    return cola("in_domain_train.tsv"), cola("in_domain_dev.tsv", "out_of_domain_dev.tsv")


def from_hub(task: str) -> tuple[list[dict], list[dict]]:
    from datasets import load_dataset

    data = load_dataset("nyu-mll/glue", task)
    return data["train"].to_list(), data["validation_matched" if task == "mnli" else "validation"].to_list()


def score(task: str, logits: torch.Tensor, labels: list[float]) -> float:
    """Pearson's correlation for STS-B and CoLA (of two classes it is Matthews'), else accuracy: as in the paper."""
    given = torch.tensor(labels, dtype=torch.float32)
    predicted = logits[:, 0].float() if task == "stsb" else logits.argmax(-1).float()
    if task in ("stsb", "cola"):
        return torch.corrcoef(torch.stack([predicted, given]))[0, 1].nan_to_num().item()  # one class only: no relation
    return (predicted == given).float().mean().item()


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: list[dict], collate: Any, task: str) -> float:
    parts = []
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        batch.pop("labels")
        parts.append(model(**{k: v.to(model.device) for k, v in batch.items()}).logits.cpu())
    return score(task, torch.cat(parts), [row["label"] for row in rows])


def runner(args: Any, task: str) -> Callable[..., dict[str, Any]]:
    """Read the task's data once; what it returns trains and scores one model, `loreft` being fields of its config."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    collate = DataCollatorWithPadding(tokenizer)
    train_rows, validation = local(Path(args.data), task) if args.data else from_hub(task)
    labels = 1 if task == "stsb" else len({row["label"] for row in train_rows})

    def encoded(rows: list[dict]) -> list[dict]:
        texts = [[row[field] for row in rows] for field in FIELDS[task]]
        tokens = tokenizer(*texts, truncation=True, max_length=args.max_length)
        return [{**{k: v[n] for k, v in tokens.items()}, "label": row["label"]} for n, row in enumerate(rows)]

    rows, held = encoded(train_rows), encoded(validation)
    random.Random(0).shuffle(held)
    halves = {"dev": held[: len(held) // 2], "test": held[len(held) // 2 :]}

    def run(
        task: str, method: str, learning_rate: float, seed: int, loreft: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
        lora = dict(r=8, lora_alpha=16, target_modules=["query", "value"])
        model = adapt(base, method, "SEQ_CLS", {**default(args, task), **(loreft or {})}, lora)
        settings = dict(max_steps=args.steps, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch)
        folder = args.output / slug(task, method, learning_rate, seed, args.steps, *(loreft or {}).values())
        train(model, rows, collate, folder, seed, learning_rate=learning_rate, **settings)
        scores = {name: evaluate(model, part, collate, task) for name, part in halves.items()}
        return {**scores, "parameters": trainable(model)}

    return run


def default(args: Any, task: str) -> dict[str, Any]:
    """Fields of `LoReftConfig`."""
    return dict(r=args.r, positions=POSITIONS.get(task, "f3"), dropout=args.dropout)


def results_of(args: Any) -> Results:
    common = {name: getattr(args, name) for name in ("epochs", "steps", "batch", "r", "dropout", "max_length")}
    return Results(args.output / "results.json", **common)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, PRESETS, argv)
    results, table = results_of(args), []
    for task in args.tasks:
        run = runner(args, task)
        table += compare(results, run, args.methods, args.learning_rates, args.seeds, task=task)
    columns = ["task", "method", "parameters", "learning_rate", "test", "lowest", "highest", "seeds", "cpu_minutes"]
    show(table, columns)
    scores = {"cola": "Matthews correlation", "stsb": "correlation"}
    scored = [{**row, "score": scores.get(row["task"], "accuracy")} for row in table]
    publish("glue", args, comparison_figure(scored, "accuracy"))


if __name__ == "__main__":
    main()
