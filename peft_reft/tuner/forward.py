"""`Forward`: what the LoReFT layers share during one forward of their model. No hooks here.

A `Forward` is made when a forward of the model begins and dropped when it ends. It is current in the thread that runs
the forward, and in no other. Code that runs a part of the forward elsewhere or later captures the `Forward` and makes
it current while that part runs (`resumed`). Activation checkpointing does so, in a backward. Nothing that belongs to
one forward lives on the model.

Forwards nest: a model may call another one, or itself. Each thread has three stacks, linked by `outer`: its forwards,
its calls of `generate`, and its calls that name an adapter for each row. An entry is found by its attachment, from the
innermost outwards.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..edits.factors import Factors
from ..edits.intervention import Intervention
from ..positions.batch import SUBSPACES, can_be_read
from ..positions.generation import GenerateStep, Generation
from ..positions.index import PositionIndex, Sharing, make_index
from ..positions.layout import Layout
from ..positions.memory import CacheMemory
from ..positions.rollouts import Rollouts
from ..positions.sources import PositionSource, Unread
from ..positions.wanted import Wanted
from ..shapes import Bool, Float, Int
from .beginnings import Beginnings
from .factors_cache import FactorsCache, HoldsWeights

if TYPE_CHECKING:
    from ..runtime_config import LoReftRuntimeConfig
    from .two_parts import Cut, Impossible

ATTRIBUTE = "peft_reft_attachment"
"""Attribute of a model, and of each hooked part of it, that holds its `Attachment`."""


Scales = tuple[tuple[str, float], ...]
"""Adapters and the scale of each."""


@dataclass(frozen=True)
class LayerPlan:
    """What one adapter does at one layer, read from its config at injection. Layers that do the same share one."""

    wanted: Wanted
    """What the layer asks a forward: where the groups of all the config's specs are."""
    groups: Layout
    """Groups that are edited at this layer."""
    sharing: Sharing
    dropout: float


@lru_cache(maxsize=256)
def share_plan(plan: LayerPlan) -> LayerPlan:
    """The one object for all layers and adapters with that plan: a forward computes its positions once."""
    return plan


class Attachment:
    """What a base model and all its LoReFT layers have in common. It holds nothing that belongs to one forward.

    The decoder of an encoder-decoder model reads other tokens than the encoder. It has an attachment of its own.

    Args:
        model: the base model; not kept.
        has_answers: whether its rows hold prompt and answer, with one label for each token (causal language models).
        decoder: the attachment of the model's decoder, if the model has an encoder too.
    """

    def __init__(self, model: nn.Module, has_answers: bool, decoder: Attachment | None = None) -> None:
        self.has_answers = has_answers
        self.decoder = decoder
        self.layers: list[HoldsWeights] = []
        self.argument_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.source_runs: list[Any] = []
        """Runs that `peft_reft.interchange` takes hidden states from (`SourceRun`), the innermost last."""
        self.first_batch: Callable[[dict[str, Any]], None] | None = None
        """Called with the inputs of each training forward until it is None (see `integrations.trainer`)."""
        self.edit_norms: dict[str, float] = {}
        """What `integrations.edit_norms` has measured, until it is logged."""
        self.runtime: dict[str, LoReftRuntimeConfig] = {}
        """How each adapter is run."""
        self.ways: dict[Hashable, str | Impossible] = {}
        """What trials have shown of running a forward in two parts (`TwoParts.ways`)."""
        self.beginnings = Beginnings()
        """What the base has computed of beginnings that rows share."""
        self.managers: list[weakref.ref[Any]] = []
        """transformers' managers of continuous batching for this model (`paged`)."""
        self.rollouts: Rollouts | None = None
        """Prompts of rollouts, while a Trainer trains on them (see `integrations.trainer`)."""

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"source_runs": [], "first_batch": None, "beginnings": Beginnings(), "managers": []}
        return {**self.__dict__, **fresh, "rollouts": None}


class _Current(threading.local):
    """The innermost entry of each stack of this thread. `torch.compile` can trace it, but not a context variable."""

    forward: Forward | None = None
    generation: GenerationFrame | None = None
    names: NamesOfRows | None = None


_current = _Current()


@dataclass
class NamesOfRows:
    """A call of a model that names an adapter for each row (`adapter_names`)."""

    attachment: Attachment
    names: Sequence[str]
    outer: NamesOfRows | None


@dataclass
class GenerationFrame:
    """A call of `generate` that runs in this thread."""

    attachment: Attachment
    generation: Generation
    factors: FactorsCache
    """What the layers compute with in all its steps."""
    outer: GenerationFrame | None


def current(attachment: Attachment) -> Forward | None:
    """The innermost forward of that attachment's model in this thread."""
    frame = _current.forward
    while frame is not None and frame.attachment is not attachment:
        frame = frame.outer
    return frame


def innermost() -> Forward | None:
    """The innermost forward in this thread, of whatever model."""
    return _current.forward


def _current_frame(attachment: Attachment) -> GenerationFrame | None:
    frame = _current.generation
    while frame is not None and frame.attachment is not attachment:
        frame = frame.outer
    return frame


def current_generation(attachment: Attachment) -> Generation | None:
    """The innermost call of `generate` of that attachment's model in this thread."""
    frame = _current_frame(attachment)
    return None if frame is None else frame.generation


def current_adapter_names(attachment: Attachment) -> Sequence[str] | None:
    """The `adapter_names` of the innermost call of that attachment's model in this thread."""
    frame = _current.names
    while frame is not None and frame.attachment is not attachment:
        frame = frame.outer
    return None if frame is None else frame.names


@contextmanager
def generating(attachment: Attachment, generation: Generation) -> Iterator[None]:
    """Make `generation` current while a call of `generate` runs."""
    outer = _current.generation
    _current.generation = GenerationFrame(attachment, generation, FactorsCache(attachment.layers), outer)
    try:
        yield
    finally:
        _current.generation = outer


@contextmanager
def naming_rows(attachment: Attachment, names: Sequence[str]) -> Iterator[None]:
    """Make `names` current while a call runs that names an adapter for each row."""
    outer = _current.names
    _current.names = NamesOfRows(attachment, names, outer)
    if attachment.decoder is not None:
        _current.names = NamesOfRows(attachment.decoder, names, _current.names)
    try:
        yield
    finally:
        _current.names = outer


def begin(
    attachment: Attachment,
    source: PositionSource,
    module: nn.Module,
    subspaces: Int[Tensor, "rows chosen"] | None = None,
) -> Forward:
    """Make a new `Forward` current. `end(module)` ends it.

    Args:
        attachment: of the model.
        source: where the positions come from.
        module: the module whose forward begins.
        subspaces: rows of R that edits stay within, -1 for none.
    """
    frame = _current_frame(attachment) if isinstance(source, GenerateStep) else None
    _current.forward = Forward(attachment, source, module, subspaces, outer=_current.forward, frame=frame)
    return _current.forward


def end(module: nn.Module) -> None:
    """Drop all forwards that `module` began in this thread, and all that began inside them.

    ::

        innermost            outermost
        c  ->  b  ->  b  ->  a             end(b) leaves a
    """
    frame, below = _current.forward, None
    found = False
    begun: list[Forward] = []
    while frame is not None:
        begun.append(frame)
        if frame.module is module:
            below, found = frame.outer, True
        elif found:
            break
        frame = frame.outer
    if not found:
        return
    for dropped in begun:
        if dropped is below:
            break
        if dropped.cut is not None:
            dropped.cut.finish()
    _current.forward = below


@contextmanager
def resumed(forward: Forward | None) -> Iterator[None]:
    """Make `forward` current while a part of it runs again, perhaps in another thread."""
    before = _current.forward
    _current.forward = forward
    try:
        yield
    finally:
        _current.forward = before


class Forward:
    """One forward: where its positions come from, and what is computed once for all layers.

    Args:
        attachment: of the model.
        source: where the positions come from.
        module: the module whose forward began it.
        subspaces: rows of R that edits stay within, -1 for none; one row for all rows of the batch, or one for each.
        outer: the forward that was current before.
        frame: the call of `generate` that this forward is a step of.
    """

    def __init__(
        self,
        attachment: Attachment,
        source: PositionSource,
        module: nn.Module,
        subspaces: Int[Tensor, "rows chosen"] | None,
        outer: Forward | None,
        frame: GenerationFrame | None,
    ) -> None:
        self.attachment = attachment
        self.source = source
        self.module = module
        self.subspaces = subspaces
        self.outer = outer
        self.generation = None if frame is None else frame.generation
        self.past: int | None = 0
        """Number of columns in the cache that the forward was given; None if the cache does not say."""
        self.memory: CacheMemory | None = None
        """What is known of that cache."""
        self.entered = False
        """Whether the module's own `forward` runs: `__call__` runs it after the hook that began this object."""
        self.recomputes = False
        """Whether parts of the forward run again in the backward."""
        self.in_training = False
        """Whether the model was in training mode, with gradients on."""
        self.cut: Cut | None = None
        """If the forward runs in two parts: what the first part left. This is then the forward of the second."""
        self.may_cut_backbone = False
        """Whether the model's backbone may be run in two parts, because the model itself cannot."""
        self.asked: dict[str, Wanted] = {}
        """What the layers asked, by adapter."""
        self.known_slots: dict[Wanted, Tensor | None] = {}
        """What the source answered."""
        self._indices: dict[int, PositionIndex | None] = {}
        """By the id of a `LayerPlan`: each layer asks in each decode step, and a hash of the plan costs more."""
        self._moved: dict[tuple[int, torch.device], PositionIndex] = {}
        """The same on other devices, if a model is spread over several (`device_map`)."""
        self._adapters_of_rows: dict[tuple[Scales, torch.device], tuple[Tensor, Tensor]] = {}
        self._within: dict[tuple[int, int], Tensor] = {}
        """Results of `within`, by the id of an index and the rank of the factors."""
        self._factors = FactorsCache(attachment.layers) if frame is None else frame.factors

    def index(self, adapter: str, plan: LayerPlan, hidden: Float[Tensor, "*tokens d"]) -> PositionIndex | None:
        """Positions for this forward, or None if it edits none. Computed once for all layers of one plan.

        Args:
            adapter: name of the adapter that edits.
            plan: of the layer that asks.
            hidden: what the layer edits, (batch, seq, d) or (batch * seq, d).
        """
        index = self._indices[id(plan)] if id(plan) in self._indices else self._compute(plan, hidden)
        if adapter not in self.asked:
            self.asked[adapter] = plan.wanted
            self.source.check_cache(adapter, plan.wanted, self.rows_edited_by(adapter))
        if index is None or index.valid.device == hidden.device:
            return index
        key = id(plan), hidden.device
        if key not in self._moved:
            self._moved[key] = index.to(hidden.device)
        return self._moved[key]

    def _compute(self, plan: LayerPlan, hidden: Tensor) -> PositionIndex | None:
        if isinstance(self.source, Unread):
            self.source = self.source.read(hidden)
        slots = self.slots(plan.wanted)
        seq = self.source.shape[1]
        index = None if slots is None else make_index(slots, seq, plan.wanted.layout, plan.groups, plan.sharing)
        self._indices[id(plan)] = index
        return index

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"] | None:
        """Columns to edit, laid out by `wanted.layout`, or None if this forward edits nothing."""
        if wanted not in self.known_slots:
            self.known_slots[wanted] = self.source.slots(wanted)
        return self.known_slots[wanted]

    def rows_edited_by(self, adapter: str) -> Bool[Tensor, " names"] | None:
        """Which rows `adapter` edits, if the caller names an adapter for each row; else None."""
        names = current_adapter_names(self.attachment)
        return None if names is None else torch.tensor([name == adapter for name in names])

    @property
    def repeats_rows(self) -> bool:
        """Whether several rows may stand for one row of the caller's (beams, `num_return_sequences`)."""
        return isinstance(self.source, GenerateStep)

    def names_of_rows(self, adapter_names: Sequence[str], rows: int) -> Sequence[str]:
        """Adapter names, one for each of this forward's `rows`. `generate` may have repeated each row.

        Raises:
            ValueError: the number of names does not fit the number of rows.
        """
        if len(adapter_names) == rows:
            return adapter_names
        if self.repeats_rows and rows % len(adapter_names) == 0:
            times = rows // len(adapter_names)
            return [name for name in adapter_names for _ in range(times)]
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {rows} respectively."
        )

    def adapters_of_rows(
        self, scales: Scales, names: Sequence[str], device: torch.device
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Which adapter each row has, and with which scale. Computed once for all layers.

        ::

            scales  ("a", 1.0), ("b", 0.5)
            names   "b"   "__base__"   "a"
            place    1        0         0       (the place in `scales`; 0 if the adapter is not in it)
            scale   0.5       0        1.0      (0 drops the edit then)

        Args:
            scales: adapters that edit alike, each with its scale.
            names: adapter of each row.
            device: of the results.
        """
        key = (scales, device)
        if key not in self._adapters_of_rows:
            place_of = {name: place for place, (name, _) in enumerate(scales)}
            scale_of = dict(scales)
            self._adapters_of_rows[key] = (
                torch.tensor([place_of.get(name, 0) for name in names]).to(device, non_blocking=True),
                torch.tensor([scale_of.get(name, 0.0) for name in names]).to(device, non_blocking=True),
            )
        return self._adapters_of_rows[key]

    def keep(self, index: PositionIndex, factors: Factors) -> Float[Tensor, "*G n _"]:
        """What multiplies edits: 1 or 0 for each slot; if the forward was given `subspaces`, for each coordinate."""
        return index.valid if self.subspaces is None else self.within(self.subspaces, index, factors)

    def within(
        self, subspaces: Int[Tensor, "rows chosen"], index: PositionIndex, factors: Factors
    ) -> Float[Tensor, "*G n r"]:
        """`index.valid` for the chosen coordinates of each slot, 0 for the others.

        ::

            r = 4   subspaces [[0, 2], [3, -1]]
                    of the slots of row 0: 1 0 1 0
                    of the slots of row 1: 0 0 0 1

        Args:
            subspaces: coordinates of each row, -1 for none; one row stands for all.
            index: of the slots.
            factors: of the edit; they say how many coordinates there are.

        Raises:
            ValueError: the formula has no coordinates, or `subspaces` does not fit.
        """
        r = factors.rank
        if r is None:
            raise ValueError(f"{SUBSPACES} were given, but the formula of an active adapter has no rank.")
        if subspaces is not self.subspaces:
            return self._choose(subspaces, index, r)
        key = id(index), r
        if key not in self._within:
            self._within[key] = self._choose(subspaces, index, r)
        return self._within[key]

    def _choose(self, subspaces: Tensor, index: PositionIndex, r: int) -> Tensor:
        """`within`, computed."""
        batch, seq = index.shape
        if len(subspaces) not in (1, batch):
            if not self.repeats_rows or batch % len(subspaces):
                raise ValueError(f"{SUBSPACES} has {len(subspaces)} rows for a batch of {batch}.")
            subspaces = subspaces.repeat_interleave(batch // len(subspaces), 0)
        looks_cost_nothing = subspaces.device.type == "cpu" and can_be_read(subspaces)
        if looks_cost_nothing and subspaces.numel():
            low, high = int(subspaces.min()), int(subspaces.max())
            if low < -1 or high >= r:
                raise ValueError(f"{SUBSPACES} names rows {low} to {high} of R; allowed: 0 to {r - 1}, -1 for none.")
        # Class 0 stands for none; one more column of it, so that no row is empty.
        classes = F.pad(subspaces.to(index.valid.device) + 1, (0, 1))  # (batch or 1, chosen + 1)
        chosen = F.one_hot(classes, r + 1).amax(1)[:, 1:].float()  # (batch or 1, r), 1 or 0
        chosen = chosen.expand(batch, r)  # (batch, r)
        if index.rows is None:
            of_slot = chosen.repeat_interleave(seq, 0)  # (batch * seq, r)
        else:
            row = index.rows.div(seq, rounding_mode="floor")  # ([G,] n)
            of_slot = chosen[row]  # ([G,] n, r)
        return index.valid * of_slot  # ([G,] n, r)

    def factors(self, weights: Intervention) -> Factors:
        """What one layer's weights compute with; within `generate` computed once for all steps."""
        trains = weights.trains
        known = self._factors.known(weights, trains)
        if known is not None:
            return known
        if not self._may_share(trains):
            return weights.current_factors()
        return self._factors.compute(weights, trains, current_adapter_names(self.attachment))

    def _may_share(self, trains: bool) -> bool:
        """Whether the factors of all layers may be computed by the first layer that asks."""
        if self.recomputes and trains:
            return False  # what runs again in the backward must not reach back to what was computed outside of it
        if getattr(self.module, "_is_replica", False):
            return False  # a replica of `nn.DataParallel` has weights of its own
        # A graph holds each layer's own; FSDP and ZeRO-3 gather a layer's weights only while that layer runs.
        return not torch.compiler.is_compiling() and not torch.distributed.is_initialized()
