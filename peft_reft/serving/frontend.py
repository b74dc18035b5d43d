"""The plugin in the front end: adapters are added and dropped, requests for unknown ones refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .adapters import read_facts
from .chosen import Facts
from .engine.config import additional_config
from .engine.front import (
    call_core,
    call_core_async,
    call_cores_async,
    http_args,
    invalid_request,
    processor_of,
    wrap_beam_search,
)
from .engine.request import extra_args, given_length, is_session, keep, kept
from .options import KEY, PROMPT_LENGTH, Options, check_request, shorten

_HOW_TO_START = f"Start it with additional_config={{'{KEY}': {{'adapters': {{NAME: FOLDER}}}}}}."


def init(inner: Callable[..., None], processor: object, config: object, *args: Any, **kwargs: Any) -> None:
    """Note which adapters the engine's config names (`InputProcessor.__init__`)."""
    inner(processor, config, *args, **kwargs)
    options = Options.read(additional_config(config))
    if options is not None:
        known = {name: read_facts(path_or_name) for name, path_or_name in options.adapters.items()}
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
    """Check what a request says about adapters (`InputProcessor.process_inputs`).

    Raises:
        VLLMValidationError: something is wrong. Only this request fails; over HTTP with status 400.
    """
    chosen = extra_args(params)
    wrong = check_request(chosen)
    if wrong is not None:
        key, message, value = wrong
        raise invalid_request(f"{key}={shorten(value)}: {message}.", parameter=key, value=value)
    if KEY not in chosen:
        return inner(processor, request_id, prompt, params, *args, **kwargs)
    name = chosen[KEY]
    known: dict[str, Facts] | None = kept(processor, "loreft_adapters")
    if known is None:
        raise _invalid(name, f"this engine serves no LoReFT adapters. {_HOW_TO_START}")
    if not isinstance(name, str) or name not in known:
        raise _invalid(name, f"there is no adapter of that name. There are: {_names(known)}.")
    request = inner(processor, request_id, prompt, params, *args, **kwargs)
    if is_session(request):
        raise _invalid(
            name, "a request that goes on with more input is served without an adapter (send the whole text anew)."
        )
    if PROMPT_LENGTH in chosen:
        _check_prompt_length(chosen[PROMPT_LENGTH], given_length(request), known[name])
    return request


def _invalid(name: object, message: str) -> Exception:
    """The exception that refuses a request for the adapter that it names."""
    return invalid_request(f"{KEY}={shorten(name)}: {message}", parameter=KEY, value=name)


def _check_prompt_length(length: int, given: int, facts: Facts) -> None:
    """Refuse a request that says wrongly, or needlessly, where its prompt ends."""
    if facts.reading.response:
        message = "the adapter's response_template says where prompts end (leave it out)"
    elif length > given:
        message = f"the request has {given} tokens (allowed: 1 to {given})"
    else:
        return
    raise invalid_request(f"{PROMPT_LENGTH}={length}: {message}.", parameter=PROMPT_LENGTH, value=length)


def list_adapters(engine: object) -> list[str]:
    """The names of the adapters that requests can choose.

    Args:
        engine: vLLM's `LLM` or `AsyncLLM`.
    """
    return sorted(_known(engine))


def add_adapter(llm: object, adapter_name: str, path_or_name: str, replace: bool = False) -> None:
    """Load an adapter into a running engine.

    Args:
        llm: vLLM's `LLM`.
        adapter_name: the name by which requests choose it.
        path_or_name: the folder that `save_pretrained` wrote, or the adapter's name on the Hub.
        replace: whether it takes the place of the adapter that has its name. Requests that run go on with the old one.

    Raises:
        ValueError: the name is taken, or the adapter is damaged, does not fit the model or exceeds the engine's
            limits. The engine goes on as before.
    """
    known = _known(llm)
    _note_added(known, adapter_name, call_core(llm, "loreft_add", adapter_name, path_or_name, replace))


def remove_adapter(llm: object, adapter_name: str) -> None:
    """Drop an adapter from a running engine. Requests that run go on with it; new ones cannot choose it.

    Args:
        llm: vLLM's `LLM`.
        adapter_name: the adapter's name.

    Raises:
        ValueError: there is no such adapter.
    """
    known = _known(llm)
    _note_removed(known, adapter_name, call_core(llm, "loreft_remove", adapter_name))


async def add_adapter_async(engine: object, adapter_name: str, path_or_name: str, replace: bool = False) -> None:
    """Do what `add_adapter` does, for vLLM's `AsyncLLM`, on which the server runs."""
    known = _known(engine)

    async def load() -> None:
        answer = await _load(engine, adapter_name, path_or_name, replace)
        _note_added(known, adapter_name, answer)

    # The core goes on loading if the caller gives up waiting, so this goes on, too.
    await asyncio.shield(asyncio.ensure_future(load()))


async def _load(engine: object, name: str, path_or_name: str, replace: bool) -> dict[str, Any]:
    """Have every core of an `AsyncLLM` load an adapter, or none. Returns what `core.add` returns."""
    answers: list[dict[str, Any]] = await call_cores_async(engine, "loreft_add", name, path_or_name, replace)
    answer = next((each for each in answers if "error" in each), answers[0])
    loaded = [each for each in answers if "error" not in each]
    if loaded and any(each != answers[0] for each in answers):
        await call_cores_async(engine, "loreft_remove", name)
        if "error" not in answer:
            answer = {"error": f"{path_or_name} changed while it was read. Load it again when it is complete."}
    return answer


async def remove_adapter_async(engine: object, adapter_name: str) -> None:
    """Do what `remove_adapter` does, for vLLM's `AsyncLLM`."""
    known = _known(engine)
    known.pop(adapter_name, None)  # also if the caller gives up waiting
    _note_removed(known, adapter_name, await call_core_async(engine, "loreft_remove", adapter_name))


def _known(engine: object) -> dict[str, Facts]:
    """The adapters of an `LLM`, `LLMEngine` or `AsyncLLM`, by name."""
    known: dict[str, Facts] | None = kept(processor_of(engine), "loreft_adapters")
    if known is None:
        raise ValueError(f"This engine serves no LoReFT adapters. {_HOW_TO_START}")
    return known


def _note_added(known: dict[str, Facts], name: str, answer: dict[str, Any]) -> None:
    """Let requests choose an adapter that the engine has loaded; ValueError if it could not load it."""
    if "error" in answer:
        raise ValueError(answer["error"])
    known[name] = Facts.read(answer)


def _note_removed(known: dict[str, Facts], name: str, error: str | None) -> None:
    """Refuse new requests for an adapter that the engine has dropped; ValueError if there was none."""
    known.pop(name, None)
    if error is not None:
        raise ValueError(error)


def _names(known: dict[str, Facts]) -> str:
    return ", ".join(sorted(known)) or "none"
