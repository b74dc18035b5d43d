"""The plugin in the front end: adapters are added and dropped, requests for unknown ones refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from .chosen import Facts
from .engine.config import additional_config
from .engine.front import (
    call_core,
    call_core_async,
    call_cores_async,
    has_other_front_ends,
    http_args,
    invalid_request,
    names_adapter,
    processor_of,
    read_lora_request,
    wrap_beam_search,
)
from .engine.request import add_extra_args, extra_args, given_length, is_session, keep, kept
from .offered import Offered
from .options import KEY, PROMPT_LENGTH, Options, check_request, shorten
from .sources import Source, fetch_early, is_loreft, path_of, read_facts, to_message

_HOW_TO_START = f"Start it with additional_config={{'{KEY}': {{'adapters': {{NAME: FOLDER}}}}}}."
_BEAMS = "beam search cannot be combined with an adapter, because its steps are requests of their own."


def init(inner: Callable[..., None], processor: object, config: object, *args: Any, **kwargs: Any) -> None:
    """Note which adapters the engine's config names (`InputProcessor.__init__`)."""
    inner(processor, config, *args, **kwargs)
    options = Options.read(additional_config(config))
    if options is not None:
        facts = {name: read_facts(path_or_name) for name, path_or_name in options.adapters.items()}
        keep(processor, "loreft", Offered(options, facts, paths=dict(options.adapters)))
        wrap_beam_search(body=_refuse_body, online=_refuse_beams, offline=_refuse_offline_beams)


def _refuse_body(inner: Callable[..., Any], body: object, *args: Any, **kwargs: Any) -> Any:
    """Refuse a beam search with an adapter (`to_beam_search_params`): its steps do not carry `extra_args`."""
    if KEY in http_args(body):
        raise _invalid(http_args(body)[KEY], _BEAMS)
    return inner(body, *args, **kwargs)


def _refuse_beams(inner: Callable[..., Any], serving: object, *args: Any, **kwargs: Any) -> Any:
    """Refuse a beam search whose `model` is an adapter (`BeamSearchOnlineMixin.beam_search`)."""
    lora_request = kwargs.get("lora_request")
    if lora_request is not None and names_adapter(lora_request):
        raise _invalid(read_lora_request(lora_request)[0], _BEAMS)
    return inner(serving, *args, **kwargs)


def _refuse_offline_beams(
    inner: Callable[..., Any],
    llm: object,
    prompts: object,
    params: object,
    lora_request: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse a beam search with an adapter (`LLM.beam_search`)."""
    offered = offered_by(llm)
    for each in lora_request if isinstance(lora_request, list) else [lora_request]:
        if offered is not None and each is not None and offered.is_ours(read_lora_request(each)[1]):
            raise _invalid(read_lora_request(each)[0], _BEAMS)
    return inner(llm, prompts, params, lora_request, *args, **kwargs)


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

    A `LoRARequest` that means an adapter of ours is taken out, before vLLM looks whether LoRA is enabled, and its name
    is put into `extra_args`. So the core and the workers know one way to choose an adapter.

    Raises:
        VLLMValidationError: something is wrong. Only this request fails; over HTTP with status 400.
    """
    offered: Offered | None = kept(processor, "loreft")
    chosen = dict(extra_args(params))
    model = _model_of(offered, kwargs.get("lora_request"))
    if model is not None:
        if chosen.setdefault(KEY, model) != model:
            raise _invalid(chosen[KEY], f"the request names {model!r} as its model (leave one of the two out).")
        kwargs["lora_request"] = None
    wrong = check_request(chosen)
    if wrong is not None:
        key, message, value = wrong
        raise invalid_request(f"{key}={shorten(value)}: {message}.", parameter=key)
    if KEY not in chosen:
        return inner(processor, request_id, prompt, params, *args, **kwargs)
    name = chosen[KEY]
    if offered is None:
        raise _invalid(name, f"this engine serves no LoReFT adapters. {_HOW_TO_START}")
    facts = offered.facts.get(name) if isinstance(name, str) else None
    if facts is None:
        raise unknown(name, offered)
    request = inner(processor, request_id, prompt, params, *args, **kwargs)
    if is_session(request):
        raise _invalid(
            name, "a request that goes on with more input is served without an adapter (send the whole text anew)."
        )
    if PROMPT_LENGTH in chosen:
        _check_prompt_length(chosen[PROMPT_LENGTH], given_length(request), facts)
    add_extra_args(request, {KEY: name})
    offered.count(name)
    return request


def _model_of(offered: Offered | None, lora_request: object | None) -> str | None:
    """The adapter of ours that a `LoRARequest` means; None if it means none.

    Raises:
        VLLMValidationError: it means an adapter that is not loaded.
    """
    if lora_request is None:
        return None
    name, path, _ = read_lora_request(lora_request)
    if names_adapter(lora_request):
        return name
    if offered is None:
        if os.path.isdir(path) and _is_loreft_once(path):
            raise _invalid(name, f"{path} is a LoReFT adapter, and this engine serves none. {_HOW_TO_START}")
        return None
    if offered.paths.get(name) == path:
        return name
    if offered.is_ours(path):
        raise _invalid(name, f"the LoReFT adapter {path} is not loaded under this name. There are: {offered}.")
    return None


_is_loreft_once = cache(is_loreft)


def unknown(name: object, offered: Offered) -> Exception:
    """The exception that refuses a request for an adapter that is not there."""
    return _invalid(name, f"there is no adapter of that name. There are: {offered}.")


def _invalid(name: object, message: str) -> Exception:
    """The exception that refuses a request for the adapter that it names."""
    return invalid_request(f"{KEY}={shorten(name)}: {message}", parameter=KEY)


def _check_prompt_length(length: int, given: int, facts: Facts) -> None:
    """Refuse a request that says wrongly, or needlessly, where its prompt ends."""
    if facts.reading.response:
        message = "the adapter's response_template says where prompts end (leave it out)"
    elif length > given:
        message = f"the request has {given} tokens (allowed: 1 to {given})"
    else:
        return
    raise invalid_request(f"{PROMPT_LENGTH}={length}: {message}.", parameter=PROMPT_LENGTH)


def list_adapters(engine: object) -> list[str]:
    """The names of the adapters that requests can choose.

    Args:
        engine: vLLM's `LLM` or `AsyncLLM`.
    """
    return sorted(_offered(engine).facts)


def add_adapter(llm: object, adapter_name: str, source: Source, replace: bool = False) -> None:
    """Load an adapter into a running engine.

    Args:
        llm: vLLM's `LLM`.
        adapter_name: the name by which requests choose it.
        source: the folder that `save_pretrained` wrote, or the adapter's name on the Hub; or the content of its two
            files (`AdapterFiles`), if the engine cannot read them.
        replace: whether it takes the place of the adapter that has its name. Requests that run go on with the old one.

    Raises:
        ValueError: the name is taken, or the adapter is damaged, does not fit the model or exceeds the engine's
            limits. The engine goes on as before.
    """
    offered = _offered(llm)
    offered.check_new(adapter_name)
    answer = call_core(llm, "loreft_add", adapter_name, to_message(source), replace)
    _note_added(offered, adapter_name, source, answer)


def remove_adapter(llm: object, adapter_name: str) -> None:
    """Drop an adapter from a running engine. Requests that run go on with it; new ones cannot choose it.

    Args:
        llm: vLLM's `LLM`.
        adapter_name: the adapter's name.

    Raises:
        ValueError: there is no such adapter.
    """
    offered = _offered(llm)
    _note_removed(offered, adapter_name, call_core(llm, "loreft_remove", adapter_name))


async def add_adapter_async(engine: object, adapter_name: str, source: Source, replace: bool = False) -> None:
    """Do what `add_adapter` does, for vLLM's `AsyncLLM`, on which the server runs."""
    offered = _offered(engine)
    offered.check_new(adapter_name)

    async def load() -> None:
        await asyncio.to_thread(fetch_early, source)
        answer = await _load(engine, adapter_name, source, replace)
        if "error" in answer:  # the one that was to be replaced may be gone
            await refresh(engine)
        _note_added(offered, adapter_name, source, answer)

    # The core goes on loading if the caller gives up waiting, so this goes on, too.
    await asyncio.shield(asyncio.ensure_future(load()))


async def _load(engine: object, name: str, source: Source, replace: bool) -> dict[str, Any]:
    """Have every core of an `AsyncLLM` load an adapter, or none. Returns what `core.add` returns."""
    answers: list[dict[str, Any]] = await call_cores_async(engine, "loreft_add", name, to_message(source), replace)
    answer = next((each for each in answers if "error" in each), answers[0])
    loaded = [each for each in answers if "error" not in each]
    if loaded and any(each != answers[0] for each in answers):
        await call_cores_async(engine, "loreft_remove", name)
        if "error" not in answer:
            answer = {"error": f"{path_of(source)} changed while it was read. Load it again when it is complete."}
    return answer


async def remove_adapter_async(engine: object, adapter_name: str) -> None:
    """Do what `remove_adapter` does, for vLLM's `AsyncLLM`."""
    offered = _offered(engine)
    offered.forget([adapter_name])  # also if the caller gives up waiting
    _note_removed(offered, adapter_name, await call_core_async(engine, "loreft_remove", adapter_name))


async def list_adapters_async(engine: object) -> list[str]:
    """Do what `list_adapters` does, for vLLM's `AsyncLLM`."""
    _offered(engine)
    await refresh_if_shared(engine)
    return list_adapters(engine)


async def refresh(engine: object) -> None:
    """Ask the core which adapters there are: other front ends may have added and removed some."""
    _offered(engine).follow(await call_core_async(engine, "loreft_list"))


async def refresh_if_shared(engine: object) -> None:
    """Ask the core which adapters there are, if there are other front ends."""
    if has_other_front_ends(engine):
        await refresh(engine)


def offered_by(engine: object | None) -> Offered | None:
    """What an `LLM`, `LLMEngine` or `AsyncLLM` offers; None if it serves no LoReFT adapters."""
    found: Offered | None = None if engine is None else kept(processor_of(engine), "loreft")
    return found


def _offered(engine: object) -> Offered:
    offered = offered_by(engine)
    if offered is None:
        raise ValueError(f"This engine serves no LoReFT adapters. {_HOW_TO_START}")
    return offered


def _note_added(offered: Offered, name: str, source: Source, answer: dict[str, Any]) -> None:
    """Let requests choose an adapter that the engine has loaded; ValueError if it could not load it."""
    if "error" in answer:
        raise ValueError(answer["error"])
    offered.note(name, Facts.read(answer), path_of(source))


def _note_removed(offered: Offered, name: str, error: str | None) -> None:
    """Refuse new requests for an adapter that the engine has dropped; ValueError if there was none."""
    offered.forget([name])
    if error is not None:
        raise ValueError(error)
