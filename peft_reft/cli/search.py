"""The search of `peft-reft sweep`: what is tried in which order, which of two runs is better. It trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..positions.layers import resolve_layers
from ..positions.spec import Positions
from .rules import rate_text

Fields = dict[str, Any]
"""Fields of `LoReftConfig`, and `learning_rate`."""

FRACTIONS = (1 / 9, 1 / 3, 1.0)
"""Of the steps of a whole training: what all candidates get, what the best third of them gets, and so on."""
KEPT = 3
"""One of so many goes on to more steps."""
LEAST_STEPS = 10
"""Fewest steps of a run."""
POSITIONS = ("l1", "f1+l1", "f3+l3", "f7+l7", "l7", "p")
RANKS = (1, 4, 8, 16)
TIES = ("layer", "group", "model")
RATES = (1 / 3, 1.0, 3.0)
"""Of the learning rate that is suggested."""


@dataclass(frozen=True)
class Found:
    """What a run found: the loss on the held-out rows, row by row."""

    sums: list[float]
    """Of each row, the loss summed over the tokens of its answer."""
    tokens: list[int]

    @property
    def loss(self) -> float:
        """Mean over all tokens; infinite if the run broke."""
        loss = sum(self.sums) / sum(self.tokens)
        return loss if math.isfinite(loss) else math.inf

    @property
    def error(self) -> float:
        """Standard error of `loss` over rows."""
        return standard_error(self.sums, self.tokens)


def standard_error(sums: list[float], tokens: list[int]) -> float:
    """Standard error, over rows, of the mean by token (a ratio of two sums); infinite for one row."""
    if len(sums) < 2:
        return math.inf
    by_row, counts = np.array(sums), np.array(tokens)
    rest = by_row - by_row.sum() / counts.sum() * counts
    return float(np.sqrt((rest**2).sum() * len(sums) / (len(sums) - 1)) / counts.sum())


def is_better(one: Found, other: Found) -> bool:
    """Whether `one` is below `other` by more than the standard error of their difference on the same rows."""
    if math.isinf(one.loss):
        return False
    if math.isinf(other.loss):
        return True
    differences = [a - b for a, b in zip(one.sums, other.sums)]
    return sum(differences) / sum(one.tokens) < -standard_error(differences, one.tokens)


def rungs(steps: int) -> list[int]:
    """The numbers of steps of the runs, from few to `steps`."""
    return sorted({min(steps, max(LEAST_STEPS, round(steps * fraction))) for fraction in FRACTIONS})


def candidates(start: Fields, fixed: set[str], layers: int, width: int) -> dict[str, list[Any]]:
    """The values that are tried of each field, in the authors' order of tuning.

    Args:
        start: the setting that the search starts from.
        fixed: names of fields that stay as they are.
        layers: of the model.
        width: of the model.
    """
    third, quarter = max(1, layers // 3), max(1, layers // 4)
    some = f"{quarter};{layers // 2};{3 * layers // 4}"
    parts = (f"0-{third - 1}", f"{third}-", some) if layers > 3 else ()
    different = {tuple(resolve_layers(text, layers, "layers")): text for text in parts}
    tries: dict[str, list[Any]] = {
        "positions": [*POSITIONS] if start["positions"] != "all" else [],
        "layers": [*different.values()],
        "r": [r for r in RANKS if r <= width],
        "tie": [*TIES],
        "learning_rate": [float(rate_text(start["learning_rate"] * factor)) for factor in RATES],
    }
    return {
        field: [value for value in values if value != start[field]]
        for field, values in tries.items()
        if field not in fixed
    }


@dataclass
class Outcome:
    """Where a search got to."""

    best: Fields
    steps: int
    """Of the runs that decided."""
    found: Found | None
    """None: nothing was measured."""
    start: Found | None
    """What the start had with as many steps."""
    left: list[str]
    """What was not tried."""


def search(
    measure: Callable[[Fields, int], Found | None], start: Fields, tries: dict[str, list[Any]], steps: list[int]
) -> Outcome:
    """Change one field at a time with few steps, and train the best of all that was tried with more.

    A field keeps its value unless another is better by more than the noise. Of the settings that were tried the best
    third is trained with the next number of steps, and so on; the start always is, so that it can be compared.

    Args:
        measure: trains and scores a setting with so many steps; None: there is no time for it.
        start: the setting to start from.
        tries: by field, the values to try.
        steps: numbers of steps, from few to many.
    """
    left: list[str] = []
    seen: list[tuple[Fields, Found]] = []
    best = start
    found = measure(start, steps[0])
    if found is not None:
        seen.append((start, found))
    for field, values in tries.items():
        before = _of(best, seen)
        chosen, lowest = best, before
        for value in values:
            if field == "tie" and value == "group" and len(Positions.parse(best["positions"]).groups) < 2:
                continue  # one group: the same as "layer"
            candidate = {**best, field: value}
            tried = measure(candidate, steps[0])
            if tried is None or before is None or lowest is None:
                left.append(f"{field}={value}")
                continue
            seen.append((candidate, tried))
            if is_better(tried, before) and tried.loss < lowest.loss:
                chosen, lowest = candidate, tried
        best = chosen
    decided = steps[0], seen
    for more in steps[1:]:
        ranked = sorted(seen, key=lambda each: each[1].loss)
        going = [fields for fields, _ in ranked if fields != start][: max(1, len(seen) // KEPT)]
        seen = []
        for fields in [start, *going]:
            tried = measure(fields, more)
            if tried is None:
                left.append(f"{describe(fields, start)} with {more} steps")
            else:
                seen.append((fields, tried))
        if len(seen) < 2:
            left += [f"all with {later} steps" for later in steps if later > more]
            break
        decided = more, seen
    return _decide(start, *decided, left)


def _decide(start: Fields, steps: int, seen: list[tuple[Fields, Found]], left: list[str]) -> Outcome:
    """The best of the runs with the most steps: the start, unless another is better by more than the noise."""
    of_start = _of(start, seen)
    best, found = start, of_start
    for fields, tried in seen:
        if of_start is not None and found is not None and is_better(tried, of_start) and tried.loss < found.loss:
            best, found = fields, tried
    return Outcome(best, steps, found, of_start, left)


def _of(fields: Fields, seen: list[tuple[Fields, Found]]) -> Found | None:
    return next((found for each, found in seen if each == fields), None)


def describe(fields: Fields, start: Fields) -> str:
    """How a setting differs from the start."""
    changed = [f"{name}={value}" for name, value in fields.items() if value != start[name]]
    return ", ".join(changed) or "the start"
