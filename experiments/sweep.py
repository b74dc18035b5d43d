"""Sweep: the authors' order of tuning (positions, layers, rank, tie, then the learning rate) over an experiment.

    python experiments/sweep.py --preset cpu --data FOLDER --model MINILM_FOLDER --tasks trec --steps 100
    python experiments/sweep.py --recipe commonsense --preset cpu --data FOLDER --model SMOLLM2_FOLDER

The sweep changes one field at a time, starting from the best of the fields before it. The experiment's `dev` decides.
Only the default and what was found are scored on `test`, over all seeds. The arguments are those of the experiment;
the default is its setting with the middle learning rate. Results are kept in OUTPUT/results.json. The table is
OUTPUT/table.json, the figure OUTPUT/sweep_TASK.png (extra `viz`).

TREC with MiniLM: 0.853 by default (0.840 to 0.872 over 3 seeds), 0.868 (0.836 to 0.888) with what was found, r=16
instead of 4 (20 runs, 8 CPU minutes).
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import arithmetic
import commonsense
import glue
import llm_adapters
from glue import GlueTask
from llm_adapters import LanguageTask
from runs import Found, Results, Run, write_json
from settings import read_arguments
from tables import publish, pyplot, show
from transformers import AutoConfig

# A classifier reads the first token, a language model goes on from the last.
POSITIONS = {"glue": ["f1", "f3", "f7", "f3+l3", "p"]}
OF_A_DECODER = ["l1", "f1+l1", "f3+l3", "f7+l7", "p"]


def candidates(recipe: str, model: str, rates: list[float]) -> dict[str, list[Any]]:
    depth = AutoConfig.from_pretrained(model).num_hidden_layers
    return {
        "positions": POSITIONS.get(recipe, OF_A_DECODER),
        "layers": ["all", f"0-{depth // 3}", f"{depth // 3}-", f"{depth // 4};{depth // 2};{3 * depth // 4}"],
        "r": [1, 4, 8, 16],
        "tie": ["layer", "group", "model"],
        "dropout": [0.0, 0.1],
        "learning_rate": rates,
    }


def search(
    measure: Callable[[dict[str, Any]], Found],
    default: dict[str, Any],
    fields: dict[str, list[Any]],
    best_of: Callable[[list[float]], float],
) -> list[dict[str, Any]]:
    """For each field what was tried, with its `dev`, and what was chosen.

    Args:
        measure: trains and scores a model with these fields of `LoReftConfig` and this `learning_rate`.
        best_of: `min` or `max`.
    """
    stages, best = [], dict(default)
    for field, values in fields.items():
        tried = [measure({**best, field: value})["dev"] for value in values]
        best[field] = values[tried.index(best_of(tried))]
        stages.append({"field": field, "values": values, "dev": tried, "chosen": best[field]})
    return stages


def figure(stages: list[dict[str, Any]], title: str) -> Any:
    drawn, axes = pyplot().subplots(1, len(stages), figsize=(11, 2.8), sharey=True, layout="constrained")
    for stage, axis in zip(stages, axes):
        axis.plot(range(len(stage["values"])), stage["dev"], "o", color="0.6")
        chosen = stage["values"].index(stage["chosen"])
        axis.plot(chosen, stage["dev"][chosen], "o", color="C3")
        axis.set_xticks(range(len(stage["values"])), stage["values"], rotation=45, fontsize=8)
        axis.set(title=stage["field"].replace("_", " "), xmargin=0.15)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("dev")
    drawn.suptitle(title, fontsize=10)
    return drawn


def sweep(task: GlueTask | LanguageTask, recipe: str, results: Results, settings: Any) -> tuple[list[dict], str]:
    """What each stage tried and chose, then the scores of the default and of what was found; and a title for both."""
    rates = settings.learning_rates

    def measure(fields: dict[str, Any], seed: int) -> Found:
        loreft = dict(fields)
        rate = loreft.pop("learning_rate")
        run = Run(method="loreft", learning_rate=rate, seed=seed, task=task.name, loreft=loreft)
        return results.once(run.settings(), lambda: task.measure(run))

    default = {**task.loreft, "layers": "all", "tie": "layer", "learning_rate": rates[len(rates) // 2]}
    stages = search(
        measure=lambda fields: measure(fields, settings.seeds[0]),
        default=default,
        fields=candidates(recipe, settings.model, rates),
        best_of=min if task.lower else max,
    )
    found = {**default, **{stage["field"]: stage["chosen"] for stage in stages}}
    tests = {}
    for name, fields in {"default": default, "found": found}.items():
        runs = [measure(fields, seed) for seed in settings.seeds]
        test = [run["test"] for run in runs]
        tests[name] = f"{statistics.mean(test):.3f} ({min(test):.3f} to {max(test):.3f})"
        stages.append({"field": name, "chosen": fields, "test": test, "parameters": runs[0]["parameters"]})
    title = f"{task.name}: test {tests['default']} by default, {tests['found']} as found, {len(settings.seeds)} seeds"
    return stages, title


def main(argv: list[str] | None = None) -> None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", choices=["glue", "commonsense", "arithmetic"], default="glue")
    chosen, rest = first.parse_known_args(argv)
    if chosen.recipe == "glue":
        settings = read_arguments(__doc__, glue.PRESETS, rest)
        results = glue.results_of(settings)
        tasks = [GlueTask(settings, name) for name in settings.tasks]
    else:
        module = {"commonsense": commonsense, "arithmetic": arithmetic}[chosen.recipe]
        settings = read_arguments(__doc__, module.PRESETS, rest)
        results = llm_adapters.results_of(settings)
        tasks = [module.task_of(settings)]
    table = []
    for task in tasks:
        stages, title = sweep(task, chosen.recipe, results, settings)
        publish(f"sweep_{task.name}", settings, figure(stages[:-2], title))
        table += [{"task": task.name, **stage} for stage in stages]
        print(f"\n{title}")
    write_json(settings.output / "table.json", table)
    for row in table:
        tried = zip(row.get("values", []), row.get("dev", []))
        row["tried"] = ", ".join(f"{value}: {dev:.3f}" for value, dev in tried)
    show(table, ["task", "field", "tried", "chosen"])


if __name__ == "__main__":
    main()
