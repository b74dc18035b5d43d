"""What LoReFT is worth beside LoRA: the same rows, the same search for a learning rate, errors beside every number.

    python experiments/worth.py --data FOLDER --model SMOLLM2_FOLDER --gemma GEMMA_FOLDER --mpnet MPNET_FOLDER \\
        --docs docs
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
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from methods import METHODS, SUFFIXES
from prompts import read
from runs import OutOfTime, Results
from settings import read_arguments
from tables import publish, show
from tasks import DecoderTask, EncoderTask, TaskSettings
from trials import search
from worth_page import COLUMNS, page

from peft_reft.cli.rules import edits_answers, edits_start

IN_SHORT = ["base", "lora", "loreft", "loreft, l7", "loreft, l14", "lora, r=1"]
CLASSES = ["base", "lora", "loreft", "lora, r=1"]
WITH_GEMMA = ["base", "lora", "loreft", "loreft, l7"]
LONG = ["base", "lora", "loreft", "loreft, l7", "loreft, l14", "loreft, l7+g", "loreft, everywhere", "lora, r=1"]
REASONING = [*LONG, *(name for name in METHODS if name not in LONG)]
COMPARED = {
    "trec": IN_SHORT,
    "trec, Gemma": WITH_GEMMA,
    "trec, MPNet": CLASSES,
    "cola": IN_SHORT,
    "cola, MPNet": CLASSES,
    "gsm8k": REASONING,
    "sums": REASONING,
    "ultrafeedback": LONG,
}
"""What is compared if `--methods` does not say it. TREC and CoLA have answers of one token, without use for `g`."""

EACH = "those of the task"


@dataclass(kw_only=True)
class WorthSettings(TaskSettings):
    output: Path = Path("outputs/worth")
    tasks: list[str] = field(default_factory=lambda: [*COMPARED])
    methods: list[str] = field(default_factory=lambda: [EACH])
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44])
    minutes: float = math.inf
    """After so long no run begins. A method that is not done is not shown."""


PRESETS = {"cpu": WorthSettings(model="HuggingFaceTB/SmolLM2-135M-Instruct")}


def rows_of(settings: WorthSettings) -> list[dict[str, Any]]:
    """A row for each task and method whose runs are there, after those that the time allows."""
    table, ends = [], time.monotonic() + 60 * settings.minutes
    for name in settings.tasks:
        task = read(name, Path(settings.data or "."))
        encoder = task.model == "MPNet"
        worth = (EncoderTask if encoder else DecoderTask)(settings, task, {**METHODS, **SUFFIXES})
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
                parts = {} if encoder else own_parts(worth.methods.get(method))
                table.append({"prefix": "", "decoding": "", **row, "facts": worth.facts(), **parts})
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
