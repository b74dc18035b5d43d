"""Whether a run learns, judged from the losses of its steps alone. `not_learning` watches a Trainer with it.

The judgement is made to be silent when in doubt. A run that learns must not be told to change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_STEPS = 50
"""Steps behind the warm-up that a judgement needs."""
LEAST_ROWS = 100
"""Rows that a judgement of a classifier needs."""
NEAR_ZERO = 0.1
"""A loss below this has nothing left to learn."""
MATTERS = 0.05
"""A fall by this share of the loss is learning."""
SURE = 3.0
"""Standard errors between what was measured and `MATTERS`: one run in thousands is that far off by chance."""
STARTS = (1, 5, 10, 20)
"""Numbers of first steps whose mean is compared with the end: a run may learn all that it can in its first steps."""
FELL = 2.0
"""Standard errors by which such a mean must be above the end to count as learning."""
TINY = 0.002
"""A fall by less than this share of the loss is none, however little noise there is."""
BROKEN = 5
"""So many steps without a finite loss, one behind the other, and the weights are lost."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a run, and which way the learning rate has to go."""

    why: str
    rate_is_too_high: bool
    needs_a_look: bool = False
    """Whether it rests on the way that the loss took: harder rows, or a fall in the first steps, may hide learning."""


def judge(losses: Sequence[float], warmup: int) -> Verdict | None:
    """Say whether a run did not learn; None if it did, or if nobody can tell.

    A run did not learn if all of this holds. The mean loss of its last quarter is not below that of its first quarter
    by more than the standard error of the difference. That difference is, `SURE` standard errors added, less than
    `MATTERS` of the loss. No mean of the first steps, warm-up included, is above the last quarter's by more than its
    noise. The loss is not near 0. Or: the loss is above that of the first steps, or not finite any more.

    Args:
        losses: of the optimizer steps, in order, from the first step of the run on.
        warmup: how many of them belong to the warm-up.

    Examples:
        >>> judge([0.7, 0.69] * 40, warmup=8).rate_is_too_high
        False
        >>> judge([0.7 - 0.005 * step for step in range(80)], warmup=8) is None
        True
    """
    broken = judge_finite(losses)
    if broken is not None:
        return broken
    steps = torch.tensor(losses, dtype=torch.float64)  # (steps,)
    past = steps[warmup:]
    past, steps = past[past.isfinite()], steps[steps.isfinite()]
    if len(past) < LEAST_STEPS:
        return None
    quarter = len(past) // 4
    first, last = past[:quarter], past[-quarter:]
    end, noise = last.mean().item(), last.std().item()
    if end < NEAR_ZERO:
        return None

    def error(count: int) -> float:
        """Standard error of the difference between the mean of `count` steps and that of the last quarter."""
        return noise * math.sqrt(1 / count + 1 / quarter)

    begin = steps[:5].mean().item()
    rise = end - begin
    if rise > SURE * error(5) and rise > 2 * MATTERS * abs(begin):
        why = f"its loss was {begin:.4g} at the start and is {end:.4g} at the end"
        return Verdict(why, rate_is_too_high=True, needs_a_look=True)
    jumped, least = _jumped(steps, begin, error(5)), TINY * abs(end)
    for count in STARTS[:2] if jumped else STARTS:  # the jump itself is not what was learned
        if steps[:count].mean().item() - end > max(FELL * error(count), least):
            return None
    drop = first.mean().item() - end
    uncertainty = math.sqrt((first.var().item() + last.var().item()) / quarter)
    if drop > max(uncertainty, least) or drop + SURE * uncertainty > MATTERS * abs(first.mean().item()):
        return None
    why = (
        f"behind the warm-up its loss was {first.mean().item():.4g} in the first quarter of the steps and {end:.4g} "
        f"in the last (standard error of the difference: {uncertainty:.2g})"
    )
    return Verdict(why, rate_is_too_high=jumped, needs_a_look=True)


def judge_finite(losses: Sequence[float]) -> Verdict | None:
    """Say since when the loss is not finite; None if it is, or if it never was, which no learning rate does."""
    number = len(losses)
    while number and not math.isfinite(losses[number - 1]):
        number -= 1
    if len(losses) - number < BROKEN or not number or not math.isfinite(losses[0]):
        return None
    return Verdict(f"its loss is not a finite number since step {number + 1}", rate_is_too_high=True)


def judge_classes(losses: Sequence[float], warmup: int, given: Counter[int], guessed: Counter[int]) -> Verdict | None:
    """Say whether a classifier knows no more than how frequent the classes are; None if it does, or nobody can tell.

    Such a classifier gives all texts one class, and its loss is not below the entropy of the classes' frequencies.

    Args:
        losses: of the optimizer steps, in order: the mean cross-entropy of their rows.
        warmup: how many of them belong to the warm-up.
        given: how many rows of the last quarter have each class.
        guessed: how many rows of the last quarter got each class.
    """
    rows = given.total()
    if len(losses) - warmup < LEAST_STEPS or rows < LEAST_ROWS or len(given) < 2 or len(guessed) != 1:
        return None
    entropy = -sum(count / rows * math.log(count / rows) for count in given.values())
    steps = torch.tensor(losses, dtype=torch.float64)  # (steps,)
    last = steps[-((len(losses) - warmup) // 4) :]
    end = last.mean().item()
    if not math.isfinite(end) or end < NEAR_ZERO or end < entropy:
        return None
    begin, noise = steps[:5].mean().item(), last.std().item()
    why = (
        f"all of its last {rows} training rows got the same class, and its loss, {end:.4g}, is not below that of "
        f"knowing only how frequent the classes are, {entropy:.4g}"
    )
    return Verdict(why, rate_is_too_high=_jumped(steps, begin, noise * math.sqrt(1 / 5 + 1 / len(last))))


def _jumped(steps: Tensor, begin: float, error: float) -> bool:
    """Whether any five steps in a row had a loss far above that of the first five."""
    highest = steps.unfold(0, 5, 1).mean(1).max().item()
    return highest > begin + max(2 * SURE * error, 0.2 * abs(begin))
