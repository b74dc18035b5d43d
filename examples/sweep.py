"""Sweep: the authors' order of tuning (positions, layers, rank, tie, then the learning rate) over a task of glue.py.

    python examples/sweep.py --preset cpu --data FOLDER --model MINILM_FOLDER --tasks trec

One field at a time, each from the best of those before it, by the dev half of the validation data; the test half is
looked at for the first and the last setting alone. Arguments are those of glue.py. Results are kept in
OUTPUT/results.json, the table is OUTPUT/table.json.
"""

import json
import statistics
from typing import Any

import glue
from recipe import Results, arguments, show

CANDIDATES: dict[str, list[Any]] = {
    "positions": ["f1", "f3", "f7", "f3+l3", "p"],
    "layers": ["all", "0-1", "1-", "0;2"],
    "r": [1, 4, 8, 16],
    "tie": ["layer", "group", "model"],
    "dropout": [0.0, 0.1],
}


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, glue.PRESETS, argv)
    results, table = Results(args.output / "results.json"), []
    for task in args.tasks:
        run = glue.runner(args, task)

        def measure(
            loreft: dict[str, Any], rate: float, seed: int, run: Any = run, task: str = task
        ) -> dict[str, Any]:
            return results.run(run, task=task, method="loreft", learning_rate=rate, seed=seed, loreft=loreft)

        best: dict[str, Any] = dict(r=args.r, positions=glue.POSITIONS.get(task, "f3"))
        rate, seed = args.learning_rates[0], args.seeds[0]
        default = (dict(best), rate)
        for field, values in CANDIDATES.items():
            tried = {json.dumps(value): measure({**best, field: value}, rate, seed)["dev"] for value in values}
            best[field] = json.loads(max(tried, key=lambda value: tried[value]))
            table.append({"task": task, "field": field, "dev": json.dumps(tried), "chosen": best[field]})
        tried = {each: measure(best, each, seed)["dev"] for each in args.learning_rates}
        rate = max(tried, key=lambda each: tried[each])
        table.append({"task": task, "field": "learning_rate", "dev": json.dumps(tried), "chosen": rate})
        for name, (loreft, chosen_rate) in {"default": default, "found": (best, rate)}.items():
            runs = [measure(loreft, chosen_rate, each) for each in args.seeds]
            mean = statistics.mean(each["test"] for each in runs)
            table.append({"task": task, "field": name, "dev": f"test {mean:.3f}", "chosen": json.dumps(loreft)})
    show(table, ["task", "field", "dev", "chosen"])
    (args.output / "table.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
