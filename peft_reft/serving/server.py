"""The adapters of one worker: their place in the served model, and what each step edits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..tuner.architectures import find_targets
from .adapters import ServedAdapter, read_adapter
from .edits import Edits, FixedSteps, hook, send
from .options import Options, check_name
from .schedule import NONE, Pieces, ServedPlan, Turns, Work, arrange, edited, same_plans
from .tables import LINEAR, DeviceWork, Kind, Table, kind_of
from .turns import Reading

_AT_START = "Name an adapter like it when the engine starts, or start it with enforce_eager."


class Server:
    """Adapters in slots, and the modules that they edit.

    Args:
        model: as vLLM built it, its weights loaded.
        empty: transformers' model of the same config, without weights.
        options: what to serve.
        layers: where compiled graphs look for what they name (vLLM's `static_forward_context`).
        compiles: whether the model is compiled: then it takes no new hooks once it has run.
        graph_tokens: most tokens a step if steps are captured as graphs, else 0.

    Raises:
        ValueError: an adapter cannot be served, as for `add`.
    """

    def __init__(
        self,
        model: nn.Module,
        empty: Any,
        options: Options,
        layers: dict[str, Any],
        device: torch.device,
        compiles: bool,
        graph_tokens: int,
    ) -> None:
        self.model, self.empty, self.layers, self.device = model, empty, layers, device
        self.modules = {name for name, _ in model.named_modules()}
        named = {name: read_adapter(source, empty) for name, source in options.adapters.items()}
        self.max_adapters = options.max_adapters or max(8, len(named))
        self.max_rank = options.max_rank or max([8, *(adapter.rank for adapter in named.values())])
        self.max_positions = options.max_positions or max([1, *(adapter.sets for adapter in named.values())])
        self.slots: dict[str, int] = {}
        self.plans: list[dict[str, ServedPlan]] = [{} for _ in range(self.max_adapters)]
        self.kinds: list[Kind | None] = [None] * self.max_adapters
        self.readings: dict[int, Reading] = {}
        """By slot."""
        self.edits_answers = np.zeros(self.max_adapters, dtype=bool)
        self.edits: dict[str, Edits] = {}
        self.groups: list[tuple[tuple[ServedPlan | None, ...], list[Edits], list[tuple[Kind, DeviceWork]]]] = []
        self.fixed: FixedSteps | None = None
        self.closed = False  # to hooks
        for target in find_targets(empty, "block"):  # those that no adapter edits yet, too
            self._hook(target.name, target.d)
        for name, adapter in named.items():
            self.add(name, adapter)
        self.closed = compiles
        if graph_tokens:
            kinds = list(dict.fromkeys([LINEAR, *(kind for kind in self.kinds if kind is not None)]))
            self.fixed = FixedSteps([*self.edits.values()], kinds, graph_tokens, device)

    def _hook(self, name: str, d: int) -> None:
        table = Table(d, self.max_rank, self.max_adapters * self.max_positions, self.device)
        edits = self.edits[name] = Edits(name, table)
        self.layers[edits.name] = edits
        hook(self.model.get_submodule(self._served(name)), edits)

    def _served(self, name: str) -> str:
        """vLLM's name for a module of transformers' model; they differ where vLLM runs transformers' own code."""
        below = name.removeprefix(f"{self.empty.base_model_prefix}.")
        return name if name in self.modules else f"model.{below}"

    def add(self, name: str, adapter: ServedAdapter) -> None:
        """Give an adapter a slot.

        Raises:
            ValueError: it does not fit the model or the limits, or the name is taken; nothing has changed then.
        """
        check_name(name)
        if name in self.slots:
            raise ValueError(f"There is an adapter {name!r} already. Remove it first, or give another name.")
        if len(self.slots) == self.max_adapters:
            raise ValueError(f"There are {self.max_adapters} adapters already (max_adapters). Remove one first.")
        needed = {"max_rank": adapter.rank, "max_positions": adapter.sets}
        for limit, value in needed.items():
            if value > getattr(self, limit):
                raise ValueError(f"{name!r} needs {limit}={value}, and the engine has {limit}={getattr(self, limit)}.")
        if missing := [module for module in adapter.plans if self._served(module) not in self.modules]:
            raise ValueError(
                f"{name!r} edits {missing[0]}, and vLLM's {type(self.model).__name__} has no module of that name."
            )
        new = [module for module in adapter.plans if module not in self.edits]
        if new and self.closed:
            raise ValueError(f"{name!r} edits {new[0]}, and a compiled model takes no new hooks. {_AT_START}")
        kind = kind_of(next(iter(adapter.factors.values())))
        if self.fixed is not None and kind not in self.fixed.kinds:
            raise ValueError(f"{name!r} has a formula that captured graphs do not compute. {_AT_START}")
        for module in new:
            self._hook(module, adapter.factors[module].d)
        slot = min({*range(self.max_adapters)} - {*self.slots.values()})
        for module, factors in adapter.factors.items():
            self.edits[module].table.write(slot * self.max_positions, factors)
        self.slots[name] = slot
        self.readings[slot] = adapter.reading
        self._set(slot, adapter.plans, kind)

    def remove(self, name: str) -> None:
        """Free an adapter's slot. No request may be using it."""
        slot = self.slots.pop(name)
        del self.readings[slot]
        self._set(slot, {}, None)

    def _set(self, slot: int, plans: dict[str, ServedPlan], kind: Kind | None) -> None:
        self.plans[slot] = plans
        self.kinds[slot] = kind
        self.edits_answers[slot] = any(plan.edits_answers for plan in plans.values())
        self.groups = []
        for of_slots, modules in same_plans(self.edits, self.plans).items():
            work: list[tuple[Kind, DeviceWork]] = []
            alike = [self.edits[module] for module in modules]
            self.groups.append((of_slots, alike, work))
            for each in alike:
                each.work = work

    def prepare(self, pieces: Pieces) -> None:
        """Note what the coming step edits.

        Args:
            pieces: all requests of the step.
        """
        self.clear()
        if self.fixed is not None:
            self.fixed.begin()
        some = pieces.slot != NONE
        some &= (pieces.computed < pieces.prompt) | self.edits_answers[pieces.slot]
        if some.any():
            self._prepare(pieces[some].by_turn())
        if self.fixed is not None:
            self.fixed.send()

    def _prepare(self, turns: Turns) -> None:
        kinds = {kind for slot in np.unique(turns.slot) if (kind := self.kinds[slot]) is not None}
        for of_slots, alike, work in self.groups:
            rows, sets, slots = edited(turns, of_slots, self.max_positions)
            for kind in kinds:
                own = np.isin(slots, [slot for slot, each in enumerate(self.kinds) if each == kind])
                if own.any():
                    work.append((kind, self._send(arrange(rows[own], sets[own]))))
                    if self.fixed is not None:
                        self.fixed.note(kind, alike, rows[own], sets[own])

    def _send(self, work: Work) -> DeviceWork:
        return DeviceWork(*(send(array, self.device) for array in (work.sets, work.rows, work.kept)))

    def clear(self) -> None:
        """Edit nothing, until the next step is prepared."""
        for _, _, work in self.groups:
            work.clear()
