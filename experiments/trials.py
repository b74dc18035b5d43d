"""Methods compared under an equal search: learning rates by short trainings, seeds at the best alone."""

import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from runs import Found, OutOfTime, Results

Measure = Callable[[dict[str, Any]], Found]
"""Trains and scores one model. It is given `task`, `method`, `learning_rate`, `seed` and `steps`."""


def search(
    results: Results,
    measure: Measure,
    *,
    task: str,
    method: str,
    learning_rates: list[float],
    seeds: list[int],
    steps: int,
) -> dict[str, Any]:
    """Train a method with every rate for a third of the steps, then with the best for all of them, with every seed.

    If the best rate is the lowest or the highest, the next one is tried, as long as that is better. The loss on the
    rows `dev` decides. A method without a learning rate is scored as it is.

    Returns:
        One row of a table: the means over seeds, errors, and what the search cost.

    Raises:
        OutOfTime: not even one seed is there. Those that are there make a row.
    """
    spent: dict[str, dict[str, Any]] = {}

    def run(rate: float, seed: int, steps: int) -> dict[str, Any]:
        settings = dict(task=task, method=method, learning_rate=rate, seed=seed, steps=steps)
        found = results.once(settings, lambda: measure(settings))
        spent[repr(settings)] = found
        return found

    if method == "base":
        runs = [run(0.0, seeds[0], 0)]
    else:
        short = [run(rate, seeds[0], max(steps // 3, 1)) for rate in sorted(learning_rates)]
        best = min(short, key=by_dev)
        with suppress(OutOfTime):
            while best in (short[0], short[-1]):
                upwards = best is short[-1]
                tried = run(next_rate(best["learning_rate"], upwards), seeds[0], max(steps // 3, 1))
                if by_dev(tried) >= by_dev(best):
                    break
                short.insert(len(short) if upwards else 0, tried)
                best = tried
        rate = best["learning_rate"]
        runs = [run(rate, seeds[0], steps)]
        with suppress(OutOfTime):
            for seed in seeds[1:]:
                runs.append(run(rate, seed, steps))
    row = {
        "task": task,
        "method": method,
        "parameters": runs[0]["parameters"],
        "steps": steps,
        "learning_rate": runs[0]["learning_rate"],
        "seeds": len(runs),
        "runs": len(spent),
        "search_minutes": sum(found["cpu_minutes"] for found in spent.values()),
        "minutes": statistics.mean(found["minutes"] for found in runs),
    }
    for name in ("loss", "accuracy"):
        if name in runs[0]:
            row[name], row[f"{name}_error"] = with_error(runs, name)
    return row


def next_rate(rate: float, upwards: bool) -> float:
    """The rate above or below, in steps of about three: 1e-3, 3e-3, 1e-2."""
    half_decades = round(2 * math.log10(rate)) + (1 if upwards else -1)
    return float(f"{3 if half_decades % 2 else 1}e{half_decades // 2}")


def by_dev(found: dict[str, Any]) -> float:
    """What sorts runs, the best first; a run that diverged comes last."""
    return found["dev"] if math.isfinite(found["dev"]) else math.inf


def with_error(runs: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """The mean over seeds, and its standard error: over held-out rows and over seeds together.

    The rows are the same for every seed, so their part does not shrink with more seeds.
    """
    values = [found[name] for found in runs]
    over_rows = statistics.mean(found[f"{name}_error"] for found in runs)
    over_seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), math.hypot(over_rows, over_seeds)
