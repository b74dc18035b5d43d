"""The plugin in the front end: adapters are added and dropped, unknown names refused, requests given their keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .adapters import facts
from .blocks import BlockKeys
from .engine.config import additional_config
from .engine.front import call_core, call_core_async, http_args, invalid_request, processor_of, wrap_beam_search
from .engine.request import add_extra_args, extra_args, is_session, keep, kept
from .options import BLOCKS, KEY, Options, check_name

_POLL_SECONDS = 0.05
_HOW_TO_START = f"Start it with additional_config={{'{KEY}': {{'adapters': {{NAME: FOLDER}}}}}}."


def init(inner: Callable[..., None], processor: object, config: object, *args: Any, **kwargs: Any) -> None:
    """Note which adapters the engine's config names (`InputProcessor.__init__`)."""
    inner(processor, config, *args, **kwargs)
    options = Options.read(additional_config(config))
    if options is not None:
        known = {name: facts(path_or_name) for name, path_or_name in options.adapters.items()}
        keep(processor, "loreft_adapters", known)
        wrap_beam_search(_refuse_beam_search)


def _refuse_beam_search(inner: Callable[..., Any], body: object, *args: Any, **kwargs: Any) -> Any:
    """Refuse a beam search with an adapter (`to_beam_search_params`): its steps do not carry `extra_args`."""
    if KEY in http_args(body):
        raise invalid_request(
            f"use_beam_search=True: an adapter ({KEY}=...) cannot be combined with beam search (allowed: False).",
            parameter="use_beam_search",
        )
    return inner(body, *args, **kwargs)


def process_inputs(
    inner: Callable[..., Any],
    processor: object,
    request_id: str,
    prompt: object,
    params: object,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Check the adapter that a request names, and give the request the keys of its blocks.

    It wraps `InputProcessor.process_inputs`.

    Raises:
        VLLMValidationError: there is no adapter of that name. Only this request fails; over HTTP with status 400.
    """
    chosen = extra_args(params)
    if BLOCKS in chosen:
        raise invalid_request(f"{BLOCKS} is set by the server (allowed: leave it out).", parameter=BLOCKS)
    if KEY not in chosen:
        return inner(processor, request_id, prompt, params, *args, **kwargs)
    name = chosen[KEY]
    known: dict[str, BlockKeys] | None = kept(processor, "loreft_adapters")
    if known is None:
        raise invalid_request(
            f"{KEY}={name!r}: this engine serves no LoReFT adapters. {_HOW_TO_START}", parameter=KEY, value=name
        )
    if not isinstance(name, str) or name not in known:
        raise invalid_request(
            f"{KEY}={name!r}: there is no adapter of that name. There are: {_names(known)}.", parameter=KEY, value=name
        )
    request = inner(processor, request_id, prompt, params, *args, **kwargs)
    if is_session(request):
        raise invalid_request(
            f"{KEY}={name!r}: a request that goes on with more input is served without an adapter (send the whole "
            "text as a new request).",
            parameter=KEY,
            value=name,
        )
    add_extra_args(request, {BLOCKS: asdict(known[name])})
    return request


def list_adapters(engine: object) -> list[str]:
    """The names of the adapters that requests can choose.

    Args:
        engine: vLLM's `LLM` or `AsyncLLM`.
    """
    return sorted(_known(engine))


def add_adapter(llm: object, adapter_name: str, path_or_name: str) -> None:
    """Load an adapter into a running engine.

    Args:
        llm: vLLM's `LLM`.
        adapter_name: the name by which requests choose it.
        path_or_name: the folder that `save_pretrained` wrote, or the adapter's name on the Hub.

    Raises:
        ValueError: the name is taken, or the adapter is damaged, does not fit the model or exceeds the engine's
            limits. The engine goes on as before.
    """
    known = _check_new(engine=llm, name=adapter_name)
    answer: dict[str, Any] = call_core(llm, "loreft_add", adapter_name, path_or_name)
    _note_added(known, adapter_name, answer)


def remove_adapter(llm: object, adapter_name: str) -> None:
    """Drop an adapter from a running engine.

    Args:
        llm: vLLM's `LLM`.
        adapter_name: the adapter's name.

    Raises:
        ValueError: there is no such adapter, or requests still use it; then it stays.
    """
    known = _check_known(engine=llm, name=adapter_name)
    users: int = call_core(llm, "loreft_remove", adapter_name)
    if users > 0:
        raise ValueError(f"{users} requests still use the adapter {adapter_name!r}. Remove it when they have ended.")
    del known[adapter_name]


async def add_adapter_async(engine: object, adapter_name: str, path_or_name: str) -> None:
    """Do what `add_adapter` does, for vLLM's `AsyncLLM`, on which the server runs."""
    known = _check_new(engine, adapter_name)
    answer: dict[str, Any] = await call_core_async(engine, "loreft_add", adapter_name, path_or_name)
    _note_added(known, adapter_name, answer)


async def remove_adapter_async(engine: object, adapter_name: str) -> None:
    """Drop an adapter from vLLM's `AsyncLLM`: refuse new requests at once, and wait for those that use it."""
    known = _check_known(engine, adapter_name)
    taken_out = known.pop(adapter_name)
    try:
        while await call_core_async(engine, "loreft_remove", adapter_name) > 0:
            await asyncio.sleep(_POLL_SECONDS)
    except BaseException:  # also if the caller gives up waiting: then the adapter stays, and requests can choose it
        known[adapter_name] = taken_out
        raise


def _known(engine: object) -> dict[str, BlockKeys]:
    """The adapters of an `LLM`, `LLMEngine` or `AsyncLLM`, by name."""
    known: dict[str, BlockKeys] | None = kept(processor_of(engine), "loreft_adapters")
    if known is None:
        raise ValueError(f"This engine serves no LoReFT adapters. {_HOW_TO_START}")
    return known


def _check_new(engine: object, name: str) -> dict[str, BlockKeys]:
    known = _known(engine)
    if check_name(name) in known:
        raise ValueError(f"There is an adapter {name!r} already. Remove it first, or give another name.")
    return known


def _check_known(engine: object, name: str) -> dict[str, BlockKeys]:
    known = _known(engine)
    if name not in known:
        raise ValueError(f"There is no adapter {name!r}. There are: {_names(known)}.")
    return known


def _note_added(known: dict[str, BlockKeys], name: str, answer: dict[str, Any]) -> None:
    """Let requests choose an adapter that the worker has loaded; ValueError if the worker could not load it."""
    if "error" in answer:
        raise ValueError(answer["error"])
    known[name] = BlockKeys.read(answer)


def _names(known: dict[str, BlockKeys]) -> str:
    return ", ".join(sorted(known)) or "none"
