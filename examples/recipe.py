"""What the recipes share: arguments with presets, results that are kept, training, comparing methods, figures."""

import argparse
import json
import os
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_reft import DataCollatorForLoReft, LoReftConfig


def arguments(doc: str, presets: dict[str, dict[str, Any]], argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments whose names and defaults are those of the chosen preset; a list takes several values."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=[*presets], default="paper", help="where defaults come from")
    chosen = presets[first.parse_known_args(argv)[0].preset]
    parser = argparse.ArgumentParser(description=doc, parents=[first], formatter_class=argparse.RawTextHelpFormatter)
    for name, default in chosen.items():
        example = default[0] if isinstance(default, list) else default
        kind = str if example is None else type(example)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=default,
            type=json.loads if kind is bool else kind,
            nargs="+" if isinstance(default, list) else None,
            help=f"default: {default}",
        )
    parser.add_argument("--output", type=Path, default=Path("outputs") / Path(doc.split()[0].strip(":,.").lower()))
    parser.add_argument("--docs", type=Path, help="folder that gets figures/NAME.png and results/NAME.json as well")
    return parser.parse_args(argv)


class Results:
    """Runs and their settings in a JSON file. What is there is not run again, so an interrupted recipe goes on."""

    def __init__(self, path: Path, **common: Any) -> None:
        """`common` are settings that all runs of this call have: runs with others are not taken for them."""
        self.path = path
        self.common = common
        self.runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def run(self, function: Callable[..., dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """`function(**settings)`, or what it returned for these settings before."""
        wanted = {**self.common, **settings}
        for run in self.runs:
            if all(run.get(name) == value for name, value in wanted.items()):
                return run
        began = cpu_seconds()
        found = {**wanted, **function(**settings)}
        found["cpu_minutes"] = round((cpu_seconds() - began) / 60, 2)
        self.runs.append(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.runs, indent=1, ensure_ascii=False) + "\n")
        return found


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    return sum(os.times()[:4])


def adapt(base: nn.Module, method: str, task_type: str, loreft: dict[str, Any], lora: dict[str, Any]) -> nn.Module:
    """`base` with "loreft", "lora", or nothing but its head ("head") to train."""
    if method == "head":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in ("classifier", "score"))
        return base
    config = {"loreft": LoReftConfig, "lora": LoraConfig}[method]
    return get_peft_model(base, config(task_type=task_type, **{"loreft": loreft, "lora": lora}[method]))


def trainable(model: nn.Module) -> int:
    """Parameters that are trained, a classifier's head left out, as the paper counts."""
    heads = ("classifier", "score")
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not any(h in n for h in heads))


def resume(trainer: Trainer) -> None:
    """Train from the last checkpoint in the trainer's folder, if there is one."""
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)


def slug(*parts: Any) -> str:
    """A name for a folder."""
    return re.sub(r"[^\w.+~-]+", "_", "-".join(map(str, parts))).strip("_")


# Four checkpoints a run, of which the last is kept.
CHECKPOINTS = dict(save_strategy="steps", save_steps=0.25, save_total_limit=1)


def train(model: nn.Module, rows: Any, collate: Callable[..., Any], output: Path, seed: int, **settings: Any) -> None:
    """Train with transformers' Trainer: linear decay, a tenth of the steps to warm up, AdamW without weight decay.

    `output` is this run's own folder: checkpoints are there until the run is done, and it goes on from the last.
    """
    set_seed(seed)
    if isinstance(model, PeftModel) and isinstance(config := model.peft_config["default"], LoReftConfig):
        collate = DataCollatorForLoReft(collate, config)
    usual = dict(
        output_dir=str(output),
        seed=seed,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        report_to="none",
        logging_steps=50,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available(),
        **CHECKPOINTS,
    )
    resume(Trainer(model, TrainingArguments(**{**usual, **settings}), train_dataset=rows, data_collator=collate))
    shutil.rmtree(output)
    model.eval()


def compare(
    results: Results,
    run: Callable[..., dict[str, Any]],
    methods: list[str],
    learning_rates: list[float],
    seeds: list[int],
    lower: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """For each method: every learning rate with the first seed, then every seed at the one that did best on `dev`.

    Args:
        run: takes `method`, `learning_rate`, `seed` and `settings`; returns at least `dev`, `test` and `parameters`.
        lower: of `dev` the lowest is the best, as of a loss.

    Returns:
        One row for each method: mean and extremes of `test` over seeds, and the means of the other numbers.
    """
    table = []
    for method in methods:
        swept = [
            results.run(run, method=method, learning_rate=rate, seed=seeds[0], **settings) for rate in learning_rates
        ]
        best = (min if lower else max)(swept, key=lambda found: found["dev"])["learning_rate"]
        runs = [results.run(run, method=method, learning_rate=best, seed=seed, **settings) for seed in seeds]
        scores = [found["test"] for found in runs]
        means = {n: statistics.mean(r[n] for r in runs) for n, value in runs[0].items() if isinstance(value, float)}
        table.append(
            {
                **means,
                **settings,
                "method": method,
                "learning_rate": best,
                "rates": {str(found["learning_rate"]): found["dev"] for found in swept},
                "parameters": runs[0]["parameters"],
                "lowest": min(scores),
                "highest": max(scores),
                "seeds": len(seeds),
            }
        )
    return table


def show(table: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows as a Markdown table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in table:
        cells = [
            f"{row[c]:.3f}" if isinstance(row[c], float) and c != "learning_rate" else str(row[c]) for c in columns
        ]
        print(f"| {' | '.join(cells)} |")


def pyplot() -> Any:
    """matplotlib.pyplot (extra `viz`), drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def comparison_figure(table: list[dict[str, Any]], score: str) -> Any:
    """A row for each task: `dev` by learning rate; `test`, with its extremes over seeds, by method.

    `score` is what both are, where a task's rows do not say it themselves.
    """
    tasks = list(dict.fromkeys(row.get("task", "") for row in table))
    size = (9, 2.7 * len(tasks))
    drawn, axes = pyplot().subplots(len(tasks), 2, figsize=size, squeeze=False, layout="constrained")
    for task, (left, right) in zip(tasks, axes):
        rows = [row for row in table if row.get("task", "") == task]
        score = rows[0].get("score", score)
        for y, row in enumerate(rows):
            rates, dev = [float(rate) for rate in row["rates"]], list(row["rates"].values())
            if len(rates) == 1:  # nothing to sweep
                left.axhline(dev[0], color=f"C{y}", ls=":", label=row["method"])
            else:
                left.plot(rates, dev, "o-", color=f"C{y}", label=row["method"])
            reach = [[row["test"] - row["lowest"]], [row["highest"] - row["test"]]]
            right.errorbar(row["test"], y, xerr=reach, fmt="o", color=f"C{y}", capsize=4)
        left.set(xscale="log", xlabel="learning rate", ylabel=f"{task} dev\n{score}".strip())
        left.set_xticks(rates, [f"{rate:g}" for rate in rates])
        left.minorticks_off()
        left.legend(fontsize=8, framealpha=0.6)
        right.set(xlabel=f"{task} test: {score}, seeds: {rows[-1]['seeds']}".strip(), ylim=(len(rows) - 0.5, -0.5))
        right.set_yticks(range(len(rows)), [f"{row['method']}\n{row['parameters']:,}" for row in rows])
        right.grid(axis="x", alpha=0.3)
    return drawn


def publish(name: str, args: argparse.Namespace, drawn: Any = None) -> None:
    """Save a figure beside the results; with `--docs` both go there too."""
    if drawn:
        drawn.savefig(args.output / f"{name}.png", dpi=100)
    if args.docs:
        for kind in ("figures", "results"):
            (args.docs / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(args.output / "results.json", args.docs / "results" / f"{name}.json")
        if drawn:
            shutil.copy(args.output / f"{name}.png", args.docs / "figures" / f"{name}.png")
