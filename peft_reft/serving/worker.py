"""The plugin in vLLM's worker: hooks go into the loaded model, each step is prepared, adapters come and go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from .. import __version__
from ..tuner.architectures import skeleton
from .adapters import read_adapter
from .engine.config import (
    add_to_graph_key,
    additional_config,
    captures_graphs,
    check_engine,
    check_version,
    compiles,
    named_in_graphs,
    transformers_config,
)
from .engine.request import adapter_of, given_length, keep, kept, token_ids
from .engine.worker import config_of, device_of, model_of, most_tokens, requests_of_step, runner_of, wrap_forward
from .options import Options
from .schedule import NONE, Pieces, Spans
from .server import Server
from .turns import Reading


def load_model(inner: Callable[..., None], worker: object, *args: Any, **kwargs: Any) -> None:
    """Load the model (`Worker.load_model`) and put LoReFT's hooks into it."""
    config = config_of(worker)
    options = Options.read(additional_config(config))
    if options is None:
        inner(worker, *args, **kwargs)
        return
    check_version()
    check_engine(config)
    # Build this before vLLM loads: for models that it does not implement itself, vLLM changes classes of transformers.
    empty = skeleton(copy.deepcopy(transformers_config(config)))
    inner(worker, *args, **kwargs)
    _install(worker, options, empty)


def _install(worker: object, options: Options, empty: nn.Module) -> None:
    config = config_of(worker)
    runner = runner_of(worker)
    server = Server(
        model_of(runner),
        empty,
        options,
        named_in_graphs(config),
        device_of(runner),
        compiles=compiles(config),
        graph_tokens=most_tokens(runner) if captures_graphs(config) else 0,
    )
    keep(worker, "loreft", server)
    # vLLM keeps compiled graphs on disk. It must not take one that was compiled without these hooks.
    add_to_graph_key(config, "loreft_hooks", {"version": __version__, "edited_modules": sorted(server.edits)})

    def edited_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        server.prepare(_pieces(runner, server))
        try:
            return forward(*args, **kwargs)
        finally:
            server.clear()  # warm-up and dummy runs call the model without this function

    wrap_forward(runner, edited_forward)


def _pieces(runner: object, server: Server) -> Pieces:
    """The requests of the step that a model runner is about to run."""
    step = requests_of_step(runner)
    places: list[int] = []
    answers: list[Spans] = []
    for request in step.requests:
        name = adapter_of(request)
        # A request that has ended may still stand in this step, and its adapter may have been dropped since.
        place = NONE if name is None else server.places.get(name, NONE)
        places.append(place)
        answers.append(_answers(request, server.readings.get(place)))
    return Pieces(
        start=step.starts[:-1],
        count=np.diff(step.starts),
        computed=step.computed,
        given=step.given,
        place=np.array(places, dtype=np.int64),
        answers=answers,
    )


def _answers(request: object, reading: Reading | None) -> Spans:
    """The answers in what a request was given. They are found when the request arrives, and kept with it."""
    if reading is None:
        return ()
    length = given_length(request)
    known: tuple[int, Spans] | None = kept(request, "loreft_answers")
    if known is not None and known[0] == length:
        return known[1]
    # The request is new, or its session goes on and more tokens were given.
    spans = reading.answers(token_ids(request), length)
    keep(request, "loreft_answers", (length, spans))
    return spans


def add(worker: object, name: str, path_or_name: str) -> dict[str, Any]:
    """Load an adapter (`Worker.loreft_add`).

    Returns:
        The fields of its `BlockKeys`; or, as `error`, what is wrong. An exception would count as the worker's failure.
    """
    server: Server = kept(worker, "loreft")
    try:
        adapter = read_adapter(path_or_name, server.empty)
        server.add(name, adapter)
    except Exception as error:
        return {"error": str(error)}
    return asdict(adapter.keys)


def remove(worker: object, name: str) -> None:
    """Drop an adapter that no request uses (`Worker.loreft_remove`)."""
    server: Server = kept(worker, "loreft")
    server.remove(name)
