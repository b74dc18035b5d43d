"""Sweep: the authors' order of tuning (positions, layers, rank, tie, then the learning rate) over a recipe.

    python examples/sweep.py --preset cpu --data FOLDER --model MINILM_FOLDER --tasks trec --steps 100
    python examples/sweep.py --recipe commonsense --preset cpu --data FOLDER --model SMOLLM2_FOLDER

One field at a time, each from the best of those before it, by what the recipe calls `dev`; `test` is looked at for the
default and for what was found alone, over all seeds. Arguments are those of the recipe; the default is its setting
with the middle learning rate. Results are kept in OUTPUT/results.json, the table is OUTPUT/table.json, the figure is
OUTPUT/sweep_TASK.png (extra `viz`).

TREC with MiniLM: 0.853 by default (0.840 to 0.872 over 3 seeds), 0.868 (0.836 to 0.888) with what was found, r=16
instead of 4 (20 runs, 8 CPU minutes).
"""

import argparse
import importlib
import json
import statistics
from typing import Any

from recipe import arguments, publish, pyplot, show
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


def search(measure: Any, default: dict[str, Any], fields: dict[str, list[Any]], best_of: Any) -> list[dict]:
    """For each field what was tried, with its `dev`, and what was chosen."""
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


def main(argv: list[str] | None = None) -> None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", choices=["glue", "commonsense", "arithmetic"], default="glue")
    chosen, rest = first.parse_known_args(argv)
    recipe = importlib.import_module(chosen.recipe)
    args = arguments(__doc__, recipe.PRESETS, rest)
    results, table = recipe.results_of(args), []
    tasks = args.tasks if chosen.recipe == "glue" else [chosen.recipe]
    for task in tasks:
        run = recipe.runner(args, task)

        def measure(fields: dict[str, Any], seed: int = args.seeds[0], run: Any = run, task: str = task) -> dict:
            loreft = dict(fields)
            rate = loreft.pop("learning_rate")
            return results.run(run, task=task, method="loreft", learning_rate=rate, seed=seed, loreft=loreft)

        rates = args.learning_rates
        default = dict(recipe.default(args, task), layers="all", tie="layer", learning_rate=rates[len(rates) // 2])
        fields = candidates(chosen.recipe, args.model, rates)
        stages = search(measure, default, fields, min if recipe.LOWER else max)
        found = {**default, **{stage["field"]: stage["chosen"] for stage in stages}}
        tests = {}
        for name, fields in {"default": default, "found": found}.items():
            runs = [measure(fields, seed) for seed in args.seeds]
            test = [each["test"] for each in runs]
            tests[name] = f"{statistics.mean(test):.3f} ({min(test):.3f} to {max(test):.3f})"
            stages.append({"field": name, "chosen": fields, "test": test, "parameters": runs[0]["parameters"]})
        title = f"{task}: test {tests['default']} by default, {tests['found']} as found, {len(args.seeds)} seeds"
        publish(f"sweep_{task}", args, figure(stages[:-2], title))
        table += [{"task": task, **stage} for stage in stages]
        print(f"\n{title}")
    (args.output / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        row["tried"] = " ".join(f"{v}: {d:.3f}," for v, d in zip(row.get("values", []), row.get("dev", []))).strip(",")
    show(table, ["task", "field", "tried", "chosen"])


if __name__ == "__main__":
    main()
