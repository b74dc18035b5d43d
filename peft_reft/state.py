"""`PositionState`: what a model's LoReFT layers share during one forward. No hooks here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .edits.factors import Factors
from .edits.intervention import Intervention, factors_of
from .positions.index import Arrangement, PositionIndex, arrange
from .positions.sources import SUBSPACES, Source, Step, Unread
from .positions.spec import Layout

Moment = list[tuple[Source | None, Tensor | None, dict[Any, Any]]]
"""Where a model's forward is, and its decoder's."""


@dataclass(eq=False)
class SourceRun:
    """Hidden states of a run of the model on other inputs, to be put into this one (`peft_reft.interchange`)."""

    subspaces: Tensor | None
    """(batch, n) or (1, n) int64: which rows of R are put in."""
    collecting: bool = True
    hidden: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer and adapter: at the positions ([G,] n, d) float32, and whether each is one ([G,] n, 1)."""


@dataclass(frozen=True)
class LayerPlan:
    """What one adapter does at one layer, read from its config once, at injection. Layers alike share one object."""

    layout: Layout
    """Groups of all the config's specs: how `intervention_positions` is laid out."""
    groups: Layout
    """Groups edited at this layer."""
    by: Arrangement
    dropout: float


@lru_cache(maxsize=256)
def share_plan(plan: LayerPlan) -> LayerPlan:
    """One object for all layers and adapters with that plan, whose positions are then computed once."""
    return plan


class PositionState:
    """Positions of the running forward. One object a base model, held by it and by all its LoReFT layers.

    The decoder of an encoder-decoder model reads other tokens, and has a state of its own, `decoder`.

    Args:
        model: the base model; not kept.
        labels_mark_prompts: whether labels are one a token, -100 over the prompt (causal language models).
        decoder: state of the model's decoder.
    """

    def __init__(self, model: nn.Module, labels_mark_prompts: bool, decoder: PositionState | None = None) -> None:
        self.labels_mark_prompts = labels_mark_prompts
        self.decoder = decoder
        self.layers: list[Any] = []
        self.argument_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.source_runs: list[SourceRun] = []
        self._source: Source | None = None
        self._subspaces: Tensor | None = None
        self._module: int | None = None
        self._computed: dict[Any, Any] = {}
        self._factors: dict[int, Factors] = {}
        self.recomputes = False

    @property
    def running(self) -> bool:
        """Whether a forward has begun and not ended."""
        return self._source is not None

    def begin(self, source: Source, module: nn.Module, subspaces: Tensor | None = None) -> None:
        self._source, self._subspaces, self._module = source, subspaces, id(module)
        self._computed = {}
        self._factors = {}

    def end(self, module: nn.Module) -> None:
        """Forget the forward, if it is this module's that began it."""
        if self._module == id(module):
            self._source = self._subspaces = self._module = None
            self._computed = {}
            self._factors = {}
            if self.decoder is not None:
                self.decoder.end(module)

    @contextmanager
    def recomputing(self, moment: Moment) -> Iterator[None]:
        """The state as it was at `moment`, for a part of that forward that activation checkpointing runs again."""
        now = self.moment
        self._go_to(moment)
        try:
            yield
        finally:
            self._go_to(now)

    @property
    def moment(self) -> Moment:
        mine = [(self._source, self._subspaces, self._computed)]
        return mine if self.decoder is None else mine + self.decoder.moment

    def _go_to(self, moment: Moment) -> None:
        self._source, self._subspaces, self._computed = moment[0]
        if self.decoder is not None:
            self.decoder._go_to(moment[1:])

    def index(self, plan: LayerPlan, hidden: Tensor) -> PositionIndex | None:
        """Positions for the running forward, or None if it edits none; computed once for all layers of one plan.

        Args:
            plan: of the layer that asks.
            hidden: what it edits, (batch, seq, d) or (batch * seq, d).
        """
        # By identity: a decode step asks once a layer, and a hash of `plan` costs more.
        index = self._computed[id(plan)] if id(plan) in self._computed else self._compute(plan, hidden)
        if index is None or index.keep.device == hidden.device:
            return index
        if (id(plan), hidden.device) not in self._computed:  # a model spread over several devices (`device_map`)
            self._computed[id(plan), hidden.device] = index.to(hidden.device)
        return self._computed[id(plan), hidden.device]

    def _compute(self, plan: LayerPlan, hidden: Tensor) -> PositionIndex | None:
        if isinstance(self._source, Unread):
            self._source = self._source.read(hidden)
        if self._source is None:
            raise RuntimeError(
                "A module edited by LoReFT ran outside a forward of its model, so the positions of the prompt are "
                "unknown. Call the model itself (or its `generate`), not one of its parts."
            )
        if plan.layout not in self._computed:
            self._computed[plan.layout] = self._source.slots(plan.layout)
        slots = self._computed[plan.layout]
        seq = self._source.shape[1]
        index = None if slots is None else arrange(slots, seq, plan.layout, plan.groups, plan.by)
        self._computed[id(plan)] = index
        return index

    def names_of_rows(self, adapter_names: Sequence[str], batch: int) -> Sequence[str]:
        """Adapter names, one a row of the running forward: beams and `num_return_sequences` repeat each row's."""
        if len(adapter_names) == batch:
            return adapter_names
        if isinstance(self._source, Step) and batch % len(adapter_names) == 0:
            return [name for name in adapter_names for _ in range(batch // len(adapter_names))]
        raise ValueError(
            f"adapter_names has {len(adapter_names)} entries for a batch of {batch} rows; give one a row."
        )

    def rows_of(
        self, scales: Sequence[tuple[str, float]], names: Sequence[str], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """For each row the place of its adapter in `scales`, or 0; and its adapter's scale, or 0 if it is no such.

        Computed once for all layers.
        """
        key = (*scales, device)
        if key not in self._computed:
            at = {name: place for place, (name, _) in enumerate(scales)}
            scale_of = dict(scales)
            self._computed[key] = (
                torch.tensor([at.get(name, 0) for name in names], device=device),
                torch.tensor([scale_of.get(name, 0.0) for name in names], device=device),
            )
        return self._computed[key]

    def keep(self, index: PositionIndex, factors: Factors) -> Tensor:
        """`index.keep`; where the forward was given `subspaces`, ([G,] n, r) with those coordinates of each token."""
        return index.keep if self._subspaces is None else self._within(self._subspaces, index, factors)

    def _within(self, subspaces: Tensor, index: PositionIndex, factors: Factors) -> Tensor:
        r = factors.rank
        if r is None:
            raise ValueError(f"{SUBSPACES} were given, but the formula of an active adapter has no rank.")
        key = (id(subspaces), id(index), r)
        if key not in self._computed:
            batch, seq = index.shape
            if len(subspaces) not in (1, batch):
                if not isinstance(self._source, Step) or batch % len(subspaces):
                    raise ValueError(f"{SUBSPACES} has {len(subspaces)} rows for a batch of {batch}.")
                subspaces = subspaces.repeat_interleave(batch // len(subspaces), 0)
            if subspaces.device.type == "cpu" and not torch.compiler.is_compiling() and subspaces.numel():
                low, high = int(subspaces.min()), int(subspaces.max())
                if low < -1 or high >= r:
                    raise ValueError(
                        f"{SUBSPACES} names rows {low} to {high} of R; allowed: 0 to {r - 1}, -1 for none."
                    )
            rows = F.pad(subspaces.to(index.keep.device) + 1, (0, 1))  # 0: none
            chosen = F.one_hot(rows, r + 1).amax(1)[:, 1:].float().expand(batch, r)
            if index.rows is None:
                of_token = chosen.repeat_interleave(seq, 0)
            else:
                of_token = chosen[index.rows.div(seq, rounding_mode="floor")]
            self._computed[key] = index.keep * of_token
        return self._computed[key]

    def exchange(
        self, place: Any, hidden: Tensor, index: PositionIndex, factors: Factors
    ) -> list[tuple[Factors, Tensor]]:
        """Factors with the hidden states of other runs put into them, and what to keep, for each run; or note these.

        Args:
            place: layer and adapter.
            hidden: ([G,] n, d), as they are in this run.
            index: where that is.
            factors: of the interchange intervention.
        """
        if self.source_runs and self.source_runs[-1].collecting:
            self.source_runs[-1].hidden[place] = hidden.detach().float().clone(), index.keep
            return []
        given = []
        for run in self.source_runs:
            if place not in run.hidden:
                continue
            source, there = run.hidden[place]
            times, rest = divmod(hidden.shape[-2], source.shape[-2])
            if rest or (times > 1 and not isinstance(self._source, Step)):
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
            subspaces = self._subspaces if run.subspaces is None else run.subspaces
            keep = index.keep if subspaces is None else self._within(subspaces, index, factors)
            given.append((factors.with_source(source.to(hidden.device)), keep * there.to(keep.device)))
        return given

    def factors(self, weights: Intervention) -> Factors:
        """A, B and b of one layer's weights; in training those of all layers are computed together, once a forward."""
        if not weights.trains:
            return weights.current_factors()
        if id(weights) in self._factors:
            return self._factors[id(weights)]
        # What is recomputed must not reach back to what was computed outside of it; a shard is whole in its turn only.
        if self.recomputes or torch.distributed.is_initialized() or torch.compiler.is_compiling():
            return weights.current_factors()
        alike: dict[Any, dict[int, Intervention]] = {}
        for layer in self.layers:
            for each in layer.active_weights():
                alike.setdefault(each.kind, {})[id(each)] = each
        for group in alike.values():
            self._factors |= zip(group, factors_of(list(group.values())))
        return self._factors[id(weights)] if id(weights) in self._factors else weights.current_factors()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model is not in a forward.
        now: dict[str, Any] = dict(
            source_runs=[], _source=None, _subspaces=None, _module=None, _computed={}, _factors={}
        )
        return {**self.__dict__, **now}
