"""GLUE with an encoder (paper, section on natural language understanding): LoReFT, LoRA, and the head alone.

    python experiments/glue.py                                                   # RoBERTa-base, eight tasks, a GPU
    python experiments/glue.py --preset cpu --data FOLDER --model MINILM_FOLDER   # CoLA and TREC, MiniLM, two cores

The protocol is the paper's: half of the validation data is held out for the score, and the other half chooses the
learning rate. The score is the mean over seeds. Every method has the same three rates to choose from. FOLDER has
cola/*.tsv and trec/*.txt. Without `--data` the sets come from the Hub. Results are kept in OUTPUT/results.json, and a
run that is there is not run again. An interrupted run goes on from its last checkpoint.

TREC with MiniLM, accuracy over 3 seeds (CPU minutes a run): LoReFT 0.905 (1.1), LoRA 0.911 (1.2), head 0.516 (0.6).
CoLA, correlation: 0.000 for each in 300 steps; with `--steps 1200`, 2 seeds: LoReFT 0.108, LoRA 0.122, head 0.000.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from runs import Found, Results, Run, compare
from settings import Settings, read_arguments
from tables import comparison_figure, publish, show
from training import adapt, train, trainable
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


@dataclass(kw_only=True)
class GlueSettings(Settings):
    output: Path = Path("outputs/glue")
    tasks: list[str]
    methods: list[str] = field(default_factory=lambda: ["loreft", "lora", "head"])
    learning_rates: list[float]
    seeds: list[int]
    epochs: float
    steps: int
    batch: int
    r: int
    dropout: float
    max_length: int


PRESETS = {
    "paper": GlueSettings(
        model="FacebookAI/roberta-base",
        tasks=["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"],
        learning_rates=[3e-4, 6e-4, 9e-4],
        seeds=[42, 43, 44, 45, 46],
        epochs=40.0,
        steps=-1,
        batch=32,
        r=1,
        dropout=0.05,
        max_length=256,
    ),
    "cpu": GlueSettings(
        model="sentence-transformers/all-MiniLM-L6-v2",
        tasks=["cola", "trec"],
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


def read(folder: Path, task: str) -> tuple[list[dict], list[dict]]:
    """Training and validation rows of `folder/task`."""
    if task == "trec":
        return read_trec(folder / "trec" / "train.txt"), read_trec(folder / "trec" / "test.txt")
    if task == "cola":
        parts = ["in_domain_train.tsv"], ["in_domain_dev.tsv", "out_of_domain_dev.tsv"]
        train, validation = ([row for name in names for row in read_cola(folder / "cola" / name)] for names in parts)
        return train, validation
    raise SystemExit(f"--data has no {task}: cola and trec can be read from files, the others come from the Hub.")


def read_trec(path: Path) -> list[dict]:
    lines = [line.split(" ", 1) for line in path.read_text(encoding="latin-1").splitlines()]
    return [{"text": text, "label": int(label)} for label, text in lines]


def read_cola(path: Path) -> list[dict]:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"sentence": line[3], "label": int(line[1])} for line in lines]


def from_hub(task: str) -> tuple[list[dict], list[dict]]:
    from datasets import load_dataset

    data = load_dataset("nyu-mll/glue", task)
    return data["train"].to_list(), data["validation_matched" if task == "mnli" else "validation"].to_list()


def score(task: str, logits: torch.Tensor, labels: list[float]) -> float:
    """Pearson's correlation for STS-B and CoLA (Matthews' for two classes), else accuracy: as in the paper."""
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


class GlueTask:
    """One task: its rows, read once, and models that are trained and scored on them."""

    lower = False  # the highest `dev` is the best
    fitted = False  # whether `create_loreft_optimizer` makes the optimizer

    def __init__(self, settings: GlueSettings, name: str) -> None:
        self.settings = settings
        self.name = name
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        train_rows, validation = read(Path(settings.data), name) if settings.data else from_hub(name)
        self.labels = 1 if name == "stsb" else len({row["label"] for row in train_rows})
        self.rows, held = self.encode(train_rows), self.encode(validation)
        random.Random(0).shuffle(held)
        self.dev, self.test = held[: len(held) // 2], held[len(held) // 2 :]
        # Fields of `LoReftConfig`.
        self.loreft = dict(r=settings.r, positions=POSITIONS.get(name, "f3"), dropout=settings.dropout)

    def encode(self, rows: list[dict]) -> list[dict]:
        texts = [[row[field] for row in rows] for field in FIELDS[self.name]]
        tokens = self.tokenizer(*texts, truncation=True, max_length=self.settings.max_length)
        return [{**{k: v[n] for k, v in tokens.items()}, "label": row["label"]} for n, row in enumerate(rows)]

    def measure(self, run: Run) -> Found:
        """Train one model, and score it on both halves of the validation data."""
        settings = self.settings
        torch.manual_seed(run.seed)
        base = AutoModelForSequenceClassification.from_pretrained(settings.model, num_labels=self.labels)
        lora = dict(r=8, lora_alpha=16, target_modules=r".*\.(query|value|attn\.q|attn\.v)")  # MPNet's are attn.q, .v
        model = adapt(base, run.method, "SEQ_CLS", loreft={**self.loreft, **(run.loreft or {})}, lora=lora)
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
            fitted=self.fitted,
        )
        return {
            "dev": evaluate(model, self.dev, self.collate, self.name),
            "test": evaluate(model, self.test, self.collate, self.name),
            "parameters": trainable(model),
        }


def results_of(settings: GlueSettings) -> Results:
    names = ("epochs", "steps", "batch", "r", "dropout", "max_length")
    return Results(settings.output / "results.json", {name: getattr(settings, name) for name in names})


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    results = results_of(settings)
    table = []
    for name in settings.tasks:
        table += compare(
            results,
            GlueTask(settings, name).measure,
            methods=settings.methods,
            learning_rates=settings.learning_rates,
            seeds=settings.seeds,
            task=name,
        )
    show(table, ["task", "method", "parameters", "learning_rate", "test", "lowest", "highest", "seeds", "cpu_minutes"])
    scores = {"cola": "Matthews correlation", "stsb": "correlation"}
    scored = [{**row, "score": scores.get(row["task"], "accuracy")} for row in table]
    publish("glue", settings, comparison_figure(scored, "accuracy"))


if __name__ == "__main__":
    main()
