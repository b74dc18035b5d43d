"""The plugin in vLLM's worker: hooks go into the loaded model, each step is prepared, adapters come and go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import is_
from typing import Any

import numpy as np
from torch import nn

from .. import __version__
from ..tuner.architectures import skeleton
from .chosen import Choice
from .engine.config import (
    add_to_graph_key,
    additional_config,
    captures_graphs,
    check_engine,
    compiles,
    named_in_graphs,
    transformers_config,
)
from .engine.request import extra_args, given_length, keep, kept, params_of, token_ids
from .engine.runners import Step, runner_of
from .engine.worker import config_of, is_placeholder
from .options import CHOICE, Options
from .schedule import NO_TURNS, NONE, Ints, Pieces, Turns, turns_of
from .selfcheck import SelfCheck
from .server import Server
from .sources import Message, from_message


def load_model(inner: Callable[..., None], worker: object, *args: Any, **kwargs: Any) -> None:
    """Load the model (`Worker.load_model`) and put LoReFT's hooks into it."""
    config = config_of(worker)
    options = Options.read(additional_config(config))
    if options is None:
        inner(worker, *args, **kwargs)
        return
    check_engine(config)
    # Build this before vLLM loads: for models that it does not implement itself, vLLM changes classes of transformers.
    empty = skeleton(copy.deepcopy(transformers_config(config)))
    inner(worker, *args, **kwargs)
    _install(worker, options, empty)


def _install(worker: object, options: Options, empty: nn.Module) -> None:
    config = config_of(worker)
    runner = runner_of(worker)
    server = Server(
        runner.loaded_model,
        empty,
        options,
        named_in_graphs(config),
        runner.device,
        compiles=compiles(config),
        graph_tokens=runner.most_tokens if captures_graphs(config) else 0,
        elsewhere=_blocks_elsewhere(runner.loaded_model),
    )
    keep(worker, "loreft", server)
    # vLLM keeps compiled graphs on disk. It must not take one that was compiled without these hooks.
    add_to_graph_key(config, "loreft_hooks", {"version": __version__, "edited_modules": sorted(server.edits)})

    batch = Batch(server)

    def begin(step: Step) -> bool:
        return server.prepare(batch.pieces(step))

    runner.wrap_steps(begin, end=server.clear)


def _blocks_elsewhere(model: nn.Module) -> set[str]:
    """The names of the blocks that other stages of a pipeline hold. Blocks are numbered."""
    placeholders = {name for name, module in model.named_modules() if is_placeholder(module)}
    return {name for name in placeholders if name.rpartition(".")[2].isdecimal()}


@dataclass(frozen=True)
class _Served:
    """What a step must know of a request."""

    place: int
    """The place of its adapter, -1 for none."""
    scale: float
    """What multiplies its edits."""
    turns: Ints
    """(3, turns) its turns, as `turns_of` finds them."""


_BASE = _Served(NONE, 1.0, NO_TURNS)


class Batch:
    """The requests of the last step, and what is known of them: most steps have the requests of the step before."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._look([])

    def pieces(self, step: Step) -> Pieces:
        """The pieces of a step's requests."""
        same = len(step.requests) == len(self.requests) and all(map(is_, step.requests, self.requests))
        if not same:
            self._look(step.requests)
        return Pieces(
            start=step.starts[:-1],
            count=np.diff(step.starts),
            computed=step.computed,
            given=step.given,
            place=self.place,
            scale=self.scale,
            turns=self.turns,
        )

    def _look(self, requests: Sequence[object]) -> None:
        """Look at each request."""
        served = [_served(request, self.server) for request in requests]
        self.requests = requests
        self.place = np.array([each.place for each in served], dtype=np.int64)
        self.scale = np.array([each.scale for each in served])
        self.turns = Turns.of([each.turns for each in served])


def _served(request: object, server: Server) -> _Served:
    """What a step must know of a request. Found when it arrives, and kept with it."""
    found: _Served | None = kept(request, "loreft_served")
    if found is None:
        found = _find(request, server)
        keep(request, "loreft_served", found)
    return found


def _find(request: object, server: Server) -> _Served:
    data = extra_args(params_of(request)).get(CHOICE)
    if data is None:
        return _BASE
    choice = Choice.read(data)
    turns = turns_of(choice.answers(token_ids(request), given_length(request)))
    return _Served(server.places[choice.facts.fingerprint], choice.scale, turns)


def add(worker: object, name: str, message: Message) -> dict[str, Any]:
    """Load an adapter (`Worker.loreft_add`).

    Returns:
        The fields of its `Facts`; or, as `error`, what is wrong. An exception would count as the worker's failure.
    """
    server: Server = kept(worker, "loreft")
    try:
        adapter = server.reader.read(from_message(message))
        server.add(name, adapter)
    except Exception as error:
        return {"error": str(error)}
    return asdict(adapter.facts)


def keep_only(worker: object, fingerprints: list[str]) -> None:
    """Drop all adapters but these; no request uses the others (`Worker.loreft_keep`)."""
    server: Server = kept(worker, "loreft")
    server.keep(fingerprints)


def at_start(worker: object) -> dict[str, dict[str, Any]]:
    """From the name of each adapter that the options name to the fields of its `Facts` (`Worker.loreft_at_start`)."""
    server: Server = kept(worker, "loreft")
    return {name: asdict(facts) for name, facts in server.at_start.items()}


def begin_check(worker: object, length: int) -> dict[str, Any]:
    """Begin the self-check (`Worker.loreft_begin_check`). Returns the fields of the random adapter's `Facts`."""
    captured = captures_graphs(config_of(worker))
    check = SelfCheck(kept(worker, "loreft"), length, captured)
    keep(worker, "loreft_check", check)
    return asdict(check.facts)


def end_check(worker: object) -> str | None:
    """End the self-check (`Worker.loreft_end_check`). Returns what is wrong, or None."""
    check: SelfCheck = kept(worker, "loreft_check")
    keep(worker, "loreft_check", None)
    return check.finish()
