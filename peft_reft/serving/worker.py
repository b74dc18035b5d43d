"""In vLLM's worker: LoReFT put into the model that was loaded, each step prepared, adapters added and dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import __version__
from ..patching import wrap
from ..tuner.architectures import skeleton
from .adapters import read_adapter
from .core import adapter_of
from .options import Options
from .plugin import check_version
from .schedule import NONE, Pieces, Spans
from .server import Server
from .turns import Reading, token_ids

_ANSWERS = "loreft_answers"


def load_model(inner: Callable[..., None], worker: Any, *args: Any, **kwargs: Any) -> None:
    """`Worker.load_model`, and LoReFT's hooks in what it loaded."""
    options = Options.read(worker.vllm_config.additional_config)
    if options is None:
        return inner(worker, *args, **kwargs)
    check_version()
    check_engine(worker.vllm_config)
    # Before vLLM loads: it changes classes of transformers where it has no model of its own.
    empty = skeleton(copy.deepcopy(worker.vllm_config.model_config.hf_config))
    inner(worker, *args, **kwargs)
    _install(worker, options, empty)


def captures_graphs(vllm_config: Any) -> bool:
    """Whether the engine captures its steps as graphs."""
    return vllm_config.compilation_config.cudagraph_mode.name != "NONE"


def _install(worker: Any, options: Options, empty: nn.Module) -> None:
    config, runner = worker.vllm_config, worker.model_runner
    server = worker.loreft = Server(
        runner.get_model(),
        empty,
        options,
        config.compilation_config.static_forward_context,
        torch.device(runner.device),
        compiles=not config.model_config.enforce_eager,
        graph_tokens=runner.max_num_tokens if captures_graphs(config) else 0,
    )
    # Compiled graphs are kept on disk by a hash that has this in it: one without these hooks must not be taken.
    hooks = {"version": __version__, "edited_modules": sorted(server.edits)}
    config.additional_config = {**config.additional_config, "loreft_hooks": hooks}

    def edited_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        server.prepare(_pieces(runner, server))
        try:
            return forward(*args, **kwargs)
        finally:
            server.clear()  # warm-up and dummy runs call the model without passing here

    wrap(runner, "_model_forward", edited_forward)


def _pieces(runner: Any, server: Server) -> Pieces:
    """The requests of the step that a model runner is about to run."""
    batch, n = runner.input_batch, runner.input_batch.num_reqs
    requests = [runner.requests[request] for request in batch.req_ids[:n]]
    names = [adapter_of(request) for request in requests]
    # One that has been dropped was used by a request that has ended, but was in this step already.
    chosen = [NONE if name is None else server.slots.get(name, NONE) for name in names]
    starts = runner.query_start_loc.np[: n + 1].astype(np.int64)
    computed, prompt = (
        values[:n].astype(np.int64) for values in (batch.num_computed_tokens_cpu, batch.num_prompt_tokens)
    )
    answers = [_answers(request, server.readings.get(slot)) for request, slot in zip(requests, chosen)]
    return Pieces(starts[:-1], np.diff(starts), computed, prompt, np.array(chosen, dtype=np.int64), answers)


def _answers(request: Any, reading: Reading | None) -> Spans:
    """The answers in what a request was given: found when it arrives, and kept with it."""
    if reading is None:
        return ()
    known: tuple[int, Spans] | None = vars(request).get(_ANSWERS)
    length: int = request.num_prompt_tokens
    if known is None or known[0] != length:  # a session goes on with more that is given
        known = length, reading.answers(token_ids(request), length)
        setattr(request, _ANSWERS, known)
    return known[1]


def check_engine(vllm_config: Any) -> None:
    """Raise ValueError if the engine has something that LoReFT does not go together with, or was not tested with."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name in ("tensor", "pipeline", "data"):
        if (size := getattr(parallel, f"{name}_parallel_size")) > 1:
            raise ValueError(f"{name}_parallel_size={size}: LoReFT is served by one worker (allowed: 1).")
    if parallel.enable_dbo:
        raise ValueError("enable_dbo=True: LoReFT needs each step in one batch (allowed: False).")
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative_config: LoReFT is not served with speculative decoding (allowed: None).")
    if model.runner_type != "generate" or model.is_encoder_decoder:
        what = "an encoder-decoder" if model.is_encoder_decoder else f"run as {model.runner_type!r}"
        raise ValueError(f"{model.model} is {what}: LoReFT is served with models that generate from one text.")
    if vllm_config.use_v2_model_runner:
        raise ValueError("LoReFT is served with vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0.")


def add(worker: Any, name: str, source: str) -> dict[str, Any]:
    """For `collective_rpc("loreft_add", args=(name, source))`: load an adapter.

    Returns:
        Its `adapters.facts`, or what is wrong as `error`: an exception here would count as the worker's failure.
    """
    server: Server = worker.loreft
    try:
        adapter = read_adapter(source, server.empty)
        server.add(name, adapter)
    except Exception as error:
        return {"error": str(error)}
    return {"fingerprint": adapter.fingerprint, "reading": asdict(adapter.reading)}


def remove(worker: Any, name: str) -> None:
    """For `collective_rpc("loreft_remove", args=(name,))`: drop an adapter that no request uses."""
    worker.loreft.remove(name)
