"""`Forward`: what the LoReFT layers share during one forward of their model. No hooks here.

A `Forward` is made when a forward of the model begins and dropped when it ends. It is current in the thread that runs
the forward, and in no other. What runs elsewhere or later, such as the recomputation of activation checkpointing in a
backward, captures the `Forward` and makes it current for its own time (`resumed`). Nothing that belongs to one forward
lives on the model.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..edits.factors import Factors
from ..edits.intervention import Intervention, factors_of
from ..positions.batch import SUBSPACES, can_be_read
from ..positions.generation import GenerateStep, Generation
from ..positions.index import Arrangement, PositionIndex, arrange
from ..positions.memory import CacheMemory
from ..positions.sources import Source, Unread
from ..positions.spec import Layout
from ..positions.wanted import Wanted

ATTRIBUTE = "peft_reft_attachment"
"""Where a model, and a part of it that is hooked, keeps its `Attachment`."""


@dataclass(frozen=True)
class LayerPlan:
    """What one adapter does at one layer, read from its config once, at injection. Layers alike share one object."""

    wanted: Wanted
    """What to ask a forward for: the groups of all the config's specs, and the marks of its chat template."""
    groups: Layout
    """Groups edited at this layer."""
    by: Arrangement
    dropout: float


@lru_cache(maxsize=256)
def share_plan(plan: LayerPlan) -> LayerPlan:
    """One object for all layers and adapters with that plan, whose positions are then computed once."""
    return plan


class Attachment:
    """What a base model and all its LoReFT layers have in common, whatever runs. Nothing of a forward.

    The decoder of an encoder-decoder model reads other tokens, and has an attachment of its own, `decoder`.

    Args:
        model: the base model; not kept.
        has_answers: whether its rows hold prompt and answer, and labels are one a token (causal language models).
        decoder: of the model's decoder.
    """

    def __init__(self, model: nn.Module, has_answers: bool, decoder: Attachment | None = None) -> None:
        self.has_answers = has_answers
        self.decoder = decoder
        self.layers: list[Any] = []
        self.argument_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.source_runs: list[Any] = []
        """Runs that `peft_reft.interchange` takes hidden states from."""
        self.first_batch: Callable[[dict[str, Any]], None] | None = None
        """Called with the inputs of each training forward, until it is None (see `training_log`)."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source_runs": [], "first_batch": None}


class _Current(threading.local):
    """What this thread is at. `torch.compile` can trace it, other than a context variable."""

    forward: Forward | None = None
    generation: GenerationFrame | None = None
    names: NamesOfRows | None = None


_current = _Current()


@dataclass
class NamesOfRows:
    """`adapter_names`, one a row, for a model's layers."""

    attachment: Attachment
    names: Sequence[str]
    outer: NamesOfRows | None


@dataclass
class GenerationFrame:
    """A call of `generate` that runs in this thread."""

    attachment: Attachment
    generation: Generation
    outer: GenerationFrame | None


def current(attachment: Attachment) -> Forward | None:
    """The forward of that attachment's model that runs in this thread, the innermost of them."""
    frame = _current.forward
    while frame is not None and frame.attachment is not attachment:
        frame = frame.outer
    return frame


def current_generation(attachment: Attachment) -> Generation | None:
    """The call of `generate` of that attachment's model that runs in this thread, the innermost of them."""
    frame = _current.generation
    while frame is not None and frame.attachment is not attachment:
        frame = frame.outer
    return None if frame is None else frame.generation


def current_names(attachment: Attachment) -> Sequence[str] | None:
    """The `adapter_names` of this thread's call of that attachment's model."""
    frame = _current.names
    while frame is not None and frame.attachment is not attachment:
        frame = frame.outer
    return None if frame is None else frame.names


@contextmanager
def generating(attachment: Attachment, generation: Generation) -> Iterator[None]:
    """While a call of `generate` runs."""
    outer = _current.generation
    _current.generation = GenerationFrame(attachment, generation, outer)
    try:
        yield
    finally:
        _current.generation = outer


@contextmanager
def naming_rows(attachment: Attachment, names: Sequence[str]) -> Iterator[None]:
    """While a call runs that names an adapter for each row."""
    outer = _current.names
    _current.names = NamesOfRows(attachment, names, outer)
    if attachment.decoder is not None:
        _current.names = NamesOfRows(attachment.decoder, names, _current.names)
    try:
        yield
    finally:
        _current.names = outer


def begin(attachment: Attachment, source: Source, module: nn.Module, subspaces: Tensor | None = None) -> Forward:
    """Make a new `Forward` current. `end(module)` ends it."""
    generation = current_generation(attachment)
    if generation is not None and not isinstance(source, GenerateStep):
        generation = None
    _current.forward = Forward(attachment, source, module, subspaces, _current.forward, generation)
    return _current.forward


def end(module: nn.Module) -> None:
    """Drop what forwards of `module` began in this thread, and all that was begun inside them."""
    frame, below = _current.forward, None
    found = False
    while frame is not None:
        if frame.module is module:
            below, found = frame.outer, True
        elif found:
            break
        frame = frame.outer
    if found:
        _current.forward = below


@contextmanager
def resumed(frames: Forward | None) -> Iterator[None]:
    """While a part of a forward runs once more, perhaps in another thread: for its time, that forward is current."""
    now = _current.forward
    _current.forward = frames
    try:
        yield
    finally:
        _current.forward = now


def innermost() -> Forward | None:
    """The forward, of whatever model, that runs in this thread."""
    return _current.forward


class Forward:
    """One forward: where its positions come from, and what is computed once for all layers.

    Args:
        attachment: of the model.
        source: where the positions come from.
        module: the module whose forward began it.
        subspaces: (batch, n) or (1, n) int64: rows of R that edits stay within, -1 for none.
        outer: the forward that was current before.
        generation: the call of `generate` that this forward is a step of.
    """

    def __init__(
        self,
        attachment: Attachment,
        source: Source,
        module: nn.Module,
        subspaces: Tensor | None,
        outer: Forward | None,
        generation: Generation | None,
    ) -> None:
        self.attachment = attachment
        self.source = source
        self.module = module
        self.subspaces = subspaces
        self.outer = outer
        self.generation = generation
        self.past: int | None = 0
        """Columns in the cache that the forward was given; None if it does not say."""
        self.memory: CacheMemory | None = None
        """Of that cache."""
        self.entered = False
        """Whether the module's `forward` has been reached, which `__call__` runs behind the hook that began this."""
        self.recomputes = False
        """Whether parts of it are run again in the backward."""
        self.asked: dict[str, Wanted] = {}
        """What the layers asked for, by adapter."""
        self._slots: dict[Wanted, Tensor | None] = {}
        self._indices: dict[int, PositionIndex | None] = {}
        self._moved: dict[tuple[int, torch.device], PositionIndex] = {}
        self._factors: dict[tuple[int, bool], Factors] = {} if generation is None else generation.factors
        self._rows: dict[Any, tuple[Tensor, Tensor]] = {}
        self._kept: dict[tuple[int, int], Tensor] = {}

    def index(self, adapter: str, plan: LayerPlan, hidden: Tensor) -> PositionIndex | None:
        """Positions for this forward, or None if it edits none; computed once for all layers of one plan.

        Args:
            adapter: name of the adapter that edits.
            plan: of the layer that asks.
            hidden: what it edits, (batch, seq, d) or (batch * seq, d).
        """
        # By identity: a decode step asks once a layer, and a hash of `plan` costs more.
        index = self._indices[id(plan)] if id(plan) in self._indices else self._compute(plan, hidden)
        if adapter not in self.asked:
            self.asked[adapter] = plan.wanted
            self.source.check_cache(adapter, plan.wanted, self.rows_edited_by(adapter))
        if index is None or index.keep.device == hidden.device:
            return index
        key = id(plan), hidden.device
        if key not in self._moved:  # a model spread over several devices (`device_map`)
            self._moved[key] = index.to(hidden.device)
        return self._moved[key]

    def _compute(self, plan: LayerPlan, hidden: Tensor) -> PositionIndex | None:
        if isinstance(self.source, Unread):
            self.source = self.source.read(hidden)
        slots = self.slots(plan.wanted)
        seq = self.source.shape[1]
        index = None if slots is None else arrange(slots, seq, plan.wanted.layout, plan.groups, plan.by)
        self._indices[id(plan)] = index
        return index

    def rows_edited_by(self, adapter: str) -> Tensor | None:
        """(names given,) bool: which rows `adapter` edits, where the caller names one a row; else None."""
        names = current_names(self.attachment)
        return None if names is None else torch.tensor([name == adapter for name in names])

    def slots(self, wanted: Wanted) -> Tensor | None:
        """(batch, n) columns laid out by `wanted.layout`, or None if this forward edits nothing."""
        if wanted not in self._slots:
            self._slots[wanted] = self.source.slots(wanted)
        return self._slots[wanted]

    @property
    def repeats_rows(self) -> bool:
        """Whether a row of the caller's may stand for several (beams, `num_return_sequences`)."""
        return isinstance(self.source, GenerateStep)

    def names_of_rows(self, adapter_names: Sequence[str], batch: int) -> Sequence[str]:
        """Adapter names, one a row of this forward: beams and `num_return_sequences` repeat each row's."""
        if len(adapter_names) == batch:
            return adapter_names
        if self.repeats_rows and batch % len(adapter_names) == 0:
            return [name for name in adapter_names for _ in range(batch // len(adapter_names))]
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {batch} respectively."
        )

    def rows_of(
        self, scales: Sequence[tuple[str, float]], names: Sequence[str], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """For each row the place of its adapter in `scales`, or 0; and its adapter's scale, or 0 if it is no such.

        Computed once for all layers.
        """
        key = (*scales, device)
        if key not in self._rows:
            at = {name: place for place, (name, _) in enumerate(scales)}
            scale_of = dict(scales)
            self._rows[key] = (
                torch.tensor([at.get(name, 0) for name in names], device=device),
                torch.tensor([scale_of.get(name, 0.0) for name in names], device=device),
            )
        return self._rows[key]

    def keep(self, index: PositionIndex, factors: Factors) -> Tensor:
        """`index.keep`; where the forward was given `subspaces`, ([G,] n, r) with those coordinates of each token."""
        return index.keep if self.subspaces is None else self.within(self.subspaces, index, factors)

    def within(self, subspaces: Tensor, index: PositionIndex, factors: Factors) -> Tensor:
        """([G,] n, r): `index.keep` for the coordinates `subspaces` (batch, n) of each token, 0 for the others."""
        r = factors.rank
        if r is None:
            raise ValueError(f"{SUBSPACES} were given, but the formula of an active adapter has no rank.")
        key = (id(index), r)
        if key not in self._kept or subspaces is not self.subspaces:
            batch, seq = index.shape
            given = subspaces
            if len(given) not in (1, batch):
                if not self.repeats_rows or batch % len(given):
                    raise ValueError(f"{SUBSPACES} has {len(given)} rows for a batch of {batch}.")
                given = given.repeat_interleave(batch // len(given), 0)
            if given.device.type == "cpu" and can_be_read(given) and given.numel():
                low, high = int(given.min()), int(given.max())
                if low < -1 or high >= r:
                    raise ValueError(
                        f"{SUBSPACES} names rows {low} to {high} of R; allowed: 0 to {r - 1}, -1 for none."
                    )
            rows = F.pad(given.to(index.keep.device) + 1, (0, 1))  # 0: none
            chosen = F.one_hot(rows, r + 1).amax(1)[:, 1:].float().expand(batch, r)
            if index.rows is None:
                of_token = chosen.repeat_interleave(seq, 0)
            else:
                of_token = chosen[index.rows.div(seq, rounding_mode="floor")]
            kept = index.keep * of_token
            if subspaces is not self.subspaces:
                return kept
            self._kept[key] = kept
        return self._kept[key]

    def factors(self, weights: Intervention) -> Factors:
        """What one layer's weights compute with: those of all layers are computed together, once a forward.

        Within `generate` once for all its steps.
        """
        trains = weights.trains  # a part of the model may run without gradients first, and again with them
        if (known := self._factors.get((id(weights), trains))) is not None:
            return known
        # What is recomputed must not reach back to what was computed outside of it; a shard is whole in its turn only;
        # a replica's weights are its own.
        if (self.recomputes and trains) or getattr(self.module, "_is_replica", False):
            return weights.current_factors()
        if torch.compiler.is_compiling() or torch.distributed.is_initialized():
            return weights.current_factors()
        alike: dict[Any, dict[int, Intervention]] = {}
        for layer in self.attachment.layers:
            for each in layer.weights_of(current_names(self.attachment)):
                alike.setdefault(each.signature, {})[id(each)] = each
        for group in alike.values():
            if id(weights) in group:
                computed = factors_of(list(group.values()))
                self._factors |= {(key, trains): factors for key, factors in zip(group, computed)}
                return self._factors[id(weights), trains]
        return weights.current_factors()
