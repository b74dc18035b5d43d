"""The adapters of one worker: their places in the tables of weights, and what each step edits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..tuner.architectures import find_targets
from .adapters import Reader, ServedAdapter
from .chosen import Facts
from .edits import Edits, FixedSteps, hook, send
from .engine.worker import share_of_input
from .options import KEY, Options
from .schedule import NONE, Ints, Pieces, Plans, ServedPlan, TurnPieces, Work, edited, group_by_weights
from .tables import LINEAR, DeviceWork, FormulaKey, Table, formula_key

_AT_START = "Name an adapter like it when the engine starts, or start it with enforce_eager."
_ANSWERS = (
    f'Start the engine with additional_config={{"{KEY}": {{"edit_answers": true, ...}}}}, or with enforce_eager.'
)


@dataclass(frozen=True)
class _Alike:
    """Modules in which every adapter does the same, so that a step is prepared once for all of them."""

    plans: Plans
    edits: list[Edits]
    """Of those modules that are here."""
    work: list[tuple[FormulaKey, DeviceWork]] = field(default_factory=list)
    """What the running step edits; the same list as `Edits.work` of each module."""


class Server:
    """Adapters, and the modules that they edit.

    Each adapter has a place: a number up to `max_adapters`. The adapter at place n has the sets of weights from
    `n * max_positions` on, in the table of every module. There is one place more than adapters, because replaced
    weights stay until their last request ends.

    Args:
        model: the model as vLLM built it, with its weights loaded.
        empty: the transformers model of the same config, without weights.
        options: what to serve.
        named: the objects that compiled graphs can name (`engine.named_in_graphs`). The edits are added.
        device: the model's device.
        compiles: whether the model is compiled. Then it takes no new hooks once it has run.
        graph_tokens: the largest number of tokens in a step if steps are captured as graphs, else 0. The graphs hold
            edits if adapters edit answers. If not, a step that edits tokens runs without a graph.
        elsewhere: the names of the blocks that other stages of a pipeline hold. They edit there.

    Raises:
        ValueError: an adapter cannot be served, see `add`.
    """

    def __init__(
        self,
        model: nn.Module,
        empty: Any,
        options: Options,
        named: dict[str, Any],
        device: torch.device,
        compiles: bool,
        graph_tokens: int,
        elsewhere: Collection[str] = (),
    ) -> None:
        self.model = model
        self.elsewhere = elsewhere
        self.empty = empty
        self.named = named
        self.device = device
        self.modules = {name for name, _ in model.named_modules()}
        self.reader = Reader(empty)
        at_start = {name: self.reader.read(path_or_name) for name, path_or_name in options.adapters.items()}
        ranks = [adapter.rank for adapter in at_start.values()]
        sets = [adapter.sets for adapter in at_start.values()]
        self.max_places = options.most_adapters + 1
        self.max_rank = options.max_rank or max([8, *ranks])
        self.max_positions = options.max_positions or max([1, *sets])
        self.places: dict[str, int] = {}
        """From an adapter's fingerprint to its place."""
        self.at_start: dict[str, Facts] = {name: adapter.facts for name, adapter in at_start.items()}
        """The adapters that the options name."""
        # What adapters do, and their formulas, are numbered, so that a step compares numbers.
        self.plans: dict[ServedPlan, int] = {}
        """The number of everything that an adapter has done in a module so far."""
        self.plan_of: dict[str, Ints] = {}
        """From a module's name to (places,) the number of what each adapter does there, -1 for nothing."""
        self.formulas: dict[FormulaKey, int] = {}
        """The number of each formula so far."""
        self.formula_of = np.full(self.max_places, NONE)
        """For each place the number of the adapter's formula, -1 if it is free."""
        self.edits_answers = np.zeros(self.max_places, dtype=bool)
        """For each place whether its adapter edits generated tokens."""
        self.edits: dict[str, Edits] = {}
        """From a module's name to its edits."""
        self.alike: list[_Alike] = []
        self.fixed: FixedSteps | None = None
        self.takes_hooks = True
        edit_answers = options.edit_answers
        if edit_answers is None:
            edit_answers = any(adapter.edits_answers for adapter in at_start.values())
        self.graphs_lack_edits = graph_tokens > 0 and not edit_answers
        for target in find_targets(empty, "block"):  # also the blocks that no adapter edits yet
            if not self._is_elsewhere(target.name):
                self._hook(target.name, target.d)
        for name, adapter in at_start.items():
            self.add(name, adapter)
        self.takes_hooks = not compiles
        if graph_tokens and not self.graphs_lack_edits:
            distinct = list(dict.fromkeys([LINEAR, *self.formulas]))
            self.fixed = FixedSteps([*self.edits.values()], distinct, graph_tokens, device)

    def _hook(self, name: str, d: int, of_input: bool = False) -> None:
        """Prepare a module, whose output or input is (..., d), for edits."""
        table = Table(d=d, r=self.max_rank, sets=self.max_places * self.max_positions, device=self.device)
        edits = Edits(name, table, of_input)
        self.edits[name] = edits
        self.named[edits.name] = edits
        hook(self.model.get_submodule(self._served_name(name)), edits)

    def _served_name(self, name: str) -> str:
        """vLLM's name for a module of the transformers model.

        The two differ only for models that vLLM runs with transformers' own code.
        """
        if name in self.modules or _is_in(name, self.elsewhere):
            return name
        return f"model.{name.removeprefix(f'{self.empty.base_model_prefix}.')}"

    def _is_elsewhere(self, name: str) -> bool:
        """Whether another stage of the pipeline holds a module of the transformers model."""
        return _is_in(self._served_name(name), self.elsewhere)

    def add(self, name: str, adapter: ServedAdapter) -> None:
        """Give an adapter a place, and write its weights there. Adapters of one fingerprint share a place.

        Args:
            name: what the user calls it, for messages.
            adapter: what to serve.

        Raises:
            ValueError: the adapter does not fit the model or the limits. Nothing has changed then.
        """
        if adapter.facts.fingerprint in self.places:
            return
        key = formula_key(next(iter(adapter.factors.values())))
        own = [module for module in adapter.plans if not self._is_elsewhere(module)]
        new_modules = [module for module in own if module not in self.edits]
        self._check(name, adapter, key, new_modules)
        for module in new_modules:
            self._hook(module, adapter.factors[module].d, adapter.edits_inputs)
        place = min({*range(self.max_places)} - {*self.places.values()})
        for module in own:
            self.edits[module].table.write(place * self.max_positions, adapter.factors[module])
        self.places[adapter.facts.fingerprint] = place
        self._set(place, {module: adapter.plans[module] for module in own}, key)

    def _check(self, name: str, adapter: ServedAdapter, key: FormulaKey, new_modules: list[str]) -> None:
        """Raise ValueError if an adapter cannot be added."""
        if len(self.places) == self.max_places:
            raise ValueError(
                f"{name!r} finds no place: requests still use adapters that were replaced or removed. Try again when "
                "these requests have ended, or start the engine with a larger max_adapters."
            )
        if adapter.rank > self.max_rank:
            raise ValueError(f"{name!r} needs max_rank={adapter.rank}, and the engine has max_rank={self.max_rank}.")
        if adapter.sets > self.max_positions:
            raise ValueError(
                f"{name!r} needs max_positions={adapter.sets}, and the engine has max_positions={self.max_positions}."
            )
        for module in new_modules:
            if self._served_name(module) not in self.modules:
                raise ValueError(
                    f"{name!r} edits {module}, and vLLM's {type(self.model).__name__} has no module of that name."
                )
            if adapter.edits_inputs:
                self._check_input(name, module, adapter.factors[module].d)
        for module in adapter.plans:
            if module in self.edits and self.edits[module].of_input is not adapter.edits_inputs:
                here, there = ("input", "output") if adapter.edits_inputs else ("output", "input")
                raise ValueError(f"{name!r} edits the {here} of {module}, whose {there} another adapter edits.")
        if new_modules and not self.takes_hooks:
            raise ValueError(f"{name!r} edits {new_modules[0]}, and a compiled model takes no new hooks. {_AT_START}")
        if self.graphs_lack_edits and adapter.edits_answers:
            raise ValueError(f"{name!r} edits answers, and captured graphs hold no edits. {_ANSWERS}")
        if self.fixed is not None and key not in self.fixed.keys:
            raise ValueError(f"{name!r} has a formula that captured graphs do not compute. {_AT_START}")

    def _check_input(self, name: str, module: str, d: int) -> None:
        """Raise ValueError if this worker gives a module a part of its input only."""
        share = share_of_input(self.model.get_submodule(self._served_name(module)))
        if share not in (None, d):
            raise ValueError(
                f"{name!r} edits the input of {module} (component='heads'), of which this worker has {share} of {d} "
                "dimensions (allowed: tensor_parallel_size=1)."
            )

    def keep(self, fingerprints: Collection[str]) -> None:
        """Free the places of all adapters but these. No request may be using the others."""
        for fingerprint in self.places.keys() - {*fingerprints}:
            self._set(self.places.pop(fingerprint), {}, None)

    def _set(self, place: int, plans: dict[str, ServedPlan], key: FormulaKey | None) -> None:
        """Note what the adapter at a place does, and group the modules anew."""
        self.formula_of[place] = NONE if key is None else self.formulas.setdefault(key, len(self.formulas))
        self.edits_answers[place] = any(plan.edits_answers for plan in plans.values())
        # Also the modules that other stages of a pipeline hold: all stages must say alike which steps avoid graphs.
        for module in (*self.edits, *plans):
            if module not in self.plan_of:
                self.plan_of[module] = np.full(self.max_places, NONE)
        alike: dict[bytes, list[str]] = {}
        for module, of_place in self.plan_of.items():
            plan = plans.get(module)
            of_place[place] = NONE if plan is None else self.plans.setdefault(plan, len(self.plans))
            alike.setdefault(of_place.tobytes(), []).append(module)
        self.alike = []
        for modules in alike.values():
            plans_of_all = Plans([*self.plans], self.plan_of[modules[0]])
            together = _Alike(plans_of_all, [self.edits[each] for each in modules if each in self.edits])
            self.alike.append(together)
            for edits in together.edits:
                edits.work = together.work

    def prepare(self, pieces: Pieces) -> bool:
        """Note what the coming step edits.

        Args:
            pieces: all requests of the step.

        Returns:
            Whether the step must run without a captured graph, because it edits tokens, and graphs hold no edits.
        """
        self.clear()
        if self.fixed is not None:
            self.fixed.begin()
        has_adapter = pieces.place != NONE
        in_prompt = pieces.computed < pieces.given
        may_edit = has_adapter & (in_prompt | self.edits_answers[pieces.place])  # (requests,)
        edits_tokens = may_edit.any() and self._prepare(pieces.by_turn(may_edit))
        if self.fixed is not None:
            self.fixed.send()
        return bool(edits_tokens and self.graphs_lack_edits)

    def _prepare(self, turns: TurnPieces) -> bool:
        """Note the edits of a step's turns. Returns whether there are any."""
        edits_tokens = False
        formulas = [*self.formulas]
        in_step = np.unique(self.formula_of[turns.place]).tolist()
        for alike in self.alike:
            rows, sets, piece = edited(turns, alike.plans, self.max_positions)  # each (n,)
            edits_tokens = edits_tokens or len(rows) > 0
            if not alike.edits:
                continue
            scale = turns.scale[piece]  # (n,)
            formula = self.formula_of[turns.place[piece]]  # (n,)
            for number in in_step:
                own = formula == number
                if own.any():
                    key = formulas[number]
                    work = group_by_weights(rows=rows[own], sets=sets[own], scale=scale[own])
                    alike.work.append((key, self._send(work)))
                    if self.fixed is not None:
                        self.fixed.note(key, alike.edits, rows=rows[own], sets=sets[own], scale=scale[own])
        return edits_tokens

    def _send(self, work: Work) -> DeviceWork:
        return DeviceWork(
            sets=send(work.sets, self.device),
            rows=send(work.rows, self.device),
            valid=send(work.valid, self.device),
            scale=None if work.scale is None else send(work.scale, self.device),
        )

    def clear(self) -> None:
        """Edit nothing until the next step is prepared."""
        for alike in self.alike:
            alike.work.clear()


def _is_in(name: str, blocks: Collection[str]) -> bool:
    """Whether a module is one of these blocks, or in one of them."""
    return any(f"{name}.".startswith(f"{block}.") for block in blocks)
