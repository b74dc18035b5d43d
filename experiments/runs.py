"""Runs of an experiment: results that are kept, and the comparison of methods over learning rates and seeds."""

import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Found = dict[str, Any]
"""What a run measured: at least `dev`, `test` and `parameters` in a comparison."""


@dataclass(frozen=True)
class Run:
    """One model to train and score."""

    method: str
    learning_rate: float
    seed: int
    task: str | None = None
    loreft: dict[str, Any] | None = None
    """Fields of `LoReftConfig` that differ from the experiment's own."""

    def settings(self) -> dict[str, Any]:
        """The fields that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def folder(self, steps: int) -> str:
        """A folder's name for this run of `steps` steps."""
        parts = [self.task, self.method, self.learning_rate, self.seed, steps, *(self.loreft or {}).values()]
        return re.sub(r"[^\w.+~-]+", "_", "-".join(str(part) for part in parts if part is not None)).strip("_")


class OutOfTime(Exception):
    """A run is not there, and there is no time for it."""


class Results:
    """Measurements and their settings in a JSON file. What is there is not measured again."""

    def __init__(self, path: Path, common: dict[str, Any], minutes: float = math.inf) -> None:
        """
        Args:
            path: of the file.
            common: settings of all runs of this call. Runs with other settings do not count as the same.
            minutes: after so long no run begins.
        """
        self.path = path
        self.common = common
        self.ends = time.monotonic() + minutes * 60
        self.runs = self.read()

    def read(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    def once(self, settings: dict[str, Any], measure: Callable[[], Found]) -> dict[str, Any]:
        """What `measure()` returns, together with the settings: from the file if it is there.

        Raises:
            OutOfTime: it is not there, and there is no time for it.
        """
        wanted = {**self.common, **settings}
        for run in self.runs:
            if all(run.get(name) == value for name, value in wanted.items()):
                return run
        if time.monotonic() >= self.ends:
            raise OutOfTime
        began = cpu_seconds()
        found = {**wanted, **measure()}
        found["cpu_minutes"] = round((cpu_seconds() - began) / 60, 2)
        self.runs = [*self.read(), found]  # another process may have added its own
        write_json(self.path, self.runs)
        return found


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def cpu_seconds() -> float:
    """CPU time of this process and of the processes that it waited for."""
    return sum(os.times()[:4])


def compare(
    results: Results,
    measure: Callable[[Run], Found],
    *,
    methods: list[str],
    learning_rates: list[float],
    seeds: list[int],
    task: str | None = None,
    lower: bool = False,
) -> list[dict[str, Any]]:
    """For each method: every learning rate with the first seed, then every seed at the one that did best on `dev`.

    Args:
        measure: trains and scores one model.
        lower: whether the lowest `dev` is the best, as of a loss.

    Returns:
        One row for each method: mean and extremes of `test` over seeds, and the means of the other numbers.
    """
    best_of = min if lower else max
    table = []
    for method in methods:

        def run(learning_rate: float, seed: int, method: str = method) -> dict[str, Any]:
            one = Run(method=method, learning_rate=learning_rate, seed=seed, task=task)
            return results.once(one.settings(), lambda: measure(one))

        swept = [run(rate, seeds[0]) for rate in learning_rates]
        best = best_of(swept, key=lambda found: found["dev"])["learning_rate"]
        runs = [run(best, seed) for seed in seeds]
        scores = [found["test"] for found in runs]
        row: dict[str, Any] = {}
        for name, value in runs[0].items():
            if isinstance(value, float):
                row[name] = statistics.mean(found[name] for found in runs)
        if task is not None:
            row["task"] = task
        row["method"] = method
        row["learning_rate"] = best
        row["rates"] = {str(found["learning_rate"]): found["dev"] for found in swept}
        row["parameters"] = runs[0]["parameters"]
        row["lowest"], row["highest"] = min(scores), max(scores)
        row["seeds"] = len(seeds)
        table.append(row)
    return table
