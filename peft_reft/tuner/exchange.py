"""Hidden states that a forward takes from another run, the source run, for `peft_reft.interchange`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..edits.factors import Factors
from ..positions.index import PositionIndex
from ..shapes import Float
from .forward import Forward

Place = tuple[int, str]
"""The id of a layer, and the name of an adapter."""


@dataclass(eq=False)
class SourceRun:
    """Hidden states of a run of the model on other inputs."""

    subspaces: Tensor | None
    """(batch, n) or (1, n) int64: which rows of R are exchanged; None: those given to the forward, or all."""
    collecting: bool = True
    """Whether the source run is still running."""
    hidden: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of each layer and adapter the hidden states ([G,] n, d) float32, and which slots are filled ([G,] n, 1)."""


def exchange(
    forward: Forward, place: Place, hidden: Float[Tensor, "*G n d"], index: PositionIndex, factors: Factors
) -> list[tuple[Factors, Tensor]]:
    """Take hidden states from each source run; within a source run, store this forward's for it.

    ::

        generate repeated each row twice        source [s0 s1]  ->  [s0 s0 s1 s1]   (rows)

    Args:
        forward: that runs.
        place: the layer and the adapter.
        hidden: at the slots of this run.
        index: of those slots.
        factors: of the interchange intervention.

    Returns:
        For each source run the factors with its hidden states, and what multiplies the edits. Nothing within a source
        run.

    Raises:
        ValueError: a source run has another number of positions than this one.
    """
    runs: list[SourceRun] = forward.attachment.source_runs
    if runs and runs[-1].collecting:
        runs[-1].hidden[place] = hidden.detach().float().clone(), index.valid
        return []
    given = []
    for run in runs:
        if place not in run.hidden:
            continue
        source, filled = run.hidden[place]
        times, rest = divmod(hidden.shape[-2], source.shape[-2])
        if rest or (times > 1 and not forward.repeats_rows):
            raise ValueError(
                f"The source run has {source.shape[-2]} positions in all rows together, the base has "
                f"{hidden.shape[-2]}: an interchange needs a source position for every base position."
            )
        if times > 1:
            n_of_row = hidden.shape[-2] // index.shape[0]
            source = _repeat_rows(source, n_of_row, times)
            filled = _repeat_rows(filled, n_of_row, times)
        subspaces = forward.subspaces if run.subspaces is None else run.subspaces
        keep = index.valid if subspaces is None else forward.within(subspaces, index, factors)
        given.append((factors.with_source_hidden(source.to(hidden.device)), keep * filled.to(keep.device)))
    return given


def _repeat_rows(tensor: Tensor, n_of_row: int, times: int) -> Tensor:
    """Repeat each row of a batch `times` times, as `generate` does.

    Args:
        tensor: ([G,] rows * n_of_row, d).

    Returns:
        ([G,] rows * times * n_of_row, d).
    """
    by_row: Tensor = tensor.unflatten(-2, (-1, n_of_row))  # ([G,] rows, n_of_row, d)
    return by_row.repeat_interleave(times, -3).flatten(-3, -2)
