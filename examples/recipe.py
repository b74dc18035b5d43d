"""What the recipes share: arguments with presets, results that are kept, training, a comparison of methods."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from peft_reft import DataCollatorForLoreft, LoreftConfig


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
    return parser.parse_args(argv)


class Results:
    """Runs and their settings in a JSON file. What is there is not run again, so an interrupted recipe goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def run(self, function: Callable[..., dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """`function(**settings)`, or what it returned for these settings before."""
        for run in self.runs:
            if all(run.get(name) == value for name, value in settings.items()):
                return run
        began = time.process_time()
        found = {**settings, **function(**settings)}
        found["cpu_minutes"] = round((time.process_time() - began) / 60, 2)
        self.runs.append(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.runs, indent=1, ensure_ascii=False) + "\n")
        return found


def adapt(base: nn.Module, method: str, task_type: str, loreft: dict[str, Any], lora: dict[str, Any]) -> nn.Module:
    """`base` with "loreft", "lora", or nothing but its head ("head") to train."""
    if method == "head":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in ("classifier", "score"))
        return base
    config = {"loreft": LoreftConfig, "lora": LoraConfig}[method]
    return get_peft_model(base, config(task_type=task_type, **{"loreft": loreft, "lora": lora}[method]))


def trainable(model: nn.Module) -> int:
    """Parameters that are trained, a classifier's head left out, as the paper counts."""
    heads = ("classifier", "score")
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not any(h in n for h in heads))


def train(model: nn.Module, rows: Any, collate: Callable[..., Any], output: Path, seed: int, **settings: Any) -> None:
    """Train with transformers' Trainer: linear decay, a tenth of the steps to warm up, AdamW without weight decay."""
    set_seed(seed)
    if isinstance(model, PeftModel) and isinstance(config := model.peft_config["default"], LoreftConfig):
        collate = DataCollatorForLoreft(collate, config)
    usual = dict(
        output_dir=str(output),
        seed=seed,
        lr_scheduler_type="linear",
        warmup_steps=max(1, settings.get("max_steps", 0) // 10),
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available(),
    )
    Trainer(model, TrainingArguments(**{**usual, **settings}), train_dataset=rows, data_collator=collate).train()
    model.eval()


def compare(
    results: Results,
    run: Callable[..., dict[str, Any]],
    methods: list[str],
    learning_rates: list[float],
    seeds: list[int],
    **settings: Any,
) -> list[dict[str, Any]]:
    """For each method: every learning rate with the first seed, then every seed at the one that did best on `dev`.

    Args:
        run: takes `method`, `learning_rate`, `seed` and `settings`; returns at least `dev` and `test`.

    Returns:
        One row for each method, with the mean and the extremes of `test` over seeds.
    """
    table = []
    for method in methods:
        swept = [
            results.run(run, method=method, learning_rate=rate, seed=seeds[0], **settings) for rate in learning_rates
        ]
        best = max(swept, key=lambda found: found["dev"])["learning_rate"]
        runs = [results.run(run, method=method, learning_rate=best, seed=seed, **settings) for seed in seeds]
        scores = [found["test"] for found in runs]
        table.append(
            {
                **settings,
                "method": method,
                "learning_rate": best,
                "parameters": runs[0]["parameters"],
                "test": statistics.mean(scores),
                "lowest": min(scores),
                "highest": max(scores),
                "seeds": len(seeds),
                "cpu_minutes": statistics.mean(found["cpu_minutes"] for found in runs),
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
