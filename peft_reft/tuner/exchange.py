"""Hidden states that a forward takes from another run, for `peft_reft.interchange`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..edits.factors import Factors
from ..positions.index import PositionIndex
from .forward import Forward


@dataclass(eq=False)
class SourceRun:
    """Hidden states of a run of the model on other inputs, to be put into this one."""

    subspaces: Tensor | None
    """(batch, n) or (1, n) int64: which rows of R are put in."""
    collecting: bool = True
    hidden: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer and adapter: at the positions ([G,] n, d) float32, and whether each is one ([G,] n, 1)."""


def exchange(
    forward: Forward, place: Any, hidden: Tensor, index: PositionIndex, factors: Factors
) -> list[tuple[Factors, Tensor]]:
    """Factors with the hidden states of other runs put into them, and what to keep, for each run; or note these.

    Args:
        forward: that runs.
        place: layer and adapter.
        hidden: ([G,] n, d), as they are in this run.
        index: where that is.
        factors: of the interchange intervention.
    """
    runs: list[SourceRun] = forward.attachment.source_runs
    if runs and runs[-1].collecting:
        runs[-1].hidden[place] = hidden.detach().float().clone(), index.keep
        return []
    given = []
    for run in runs:
        if place not in run.hidden:
            continue
        source, there = run.hidden[place]
        times, rest = divmod(hidden.shape[-2], source.shape[-2])
        if rest or (times > 1 and not forward.repeats_rows):
            raise ValueError(
                f"The source run has {source.shape[-2]} positions in all rows together, the base has "
                f"{hidden.shape[-2]}: an interchange needs a source position for every base position."
            )
        if times > 1:  # rows that `generate` repeated
            per_row = hidden.shape[-2] // index.shape[0]
            source, there = (
                tensor.unflatten(-2, (-1, per_row)).repeat_interleave(times, -3).flatten(-3, -2)
                for tensor in (source, there)
            )
        subspaces = forward.subspaces if run.subspaces is None else run.subspaces
        keep = index.keep if subspaces is None else forward.within(subspaces, index, factors)
        given.append((factors.with_source_hidden(source.to(hidden.device)), keep * there.to(keep.device)))
    return given
