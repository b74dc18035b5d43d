"""In the front end: a request's adapter is known or refused, and cached blocks of one are never read under another.

Also how adapters are added and dropped while serving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..patching import wrap
from .adapters import facts
from .options import KEY, Options, check_name
from .turns import Reading, token_ids

_ATTRIBUTE = "loreft_adapters"
_POLL_SECONDS = 0.05
_HOW_TO_START = f"Start it with additional_config={{'{KEY}': {{'adapters': {{NAME: FOLDER}}}}}}."


@dataclass(frozen=True)
class Known:
    """What the front end knows of an adapter."""

    fingerprint: str
    reading: Reading

    @staticmethod
    def of(answer: dict[str, Any]) -> Known:
        """From `adapters.facts`."""
        return Known(answer["fingerprint"], Reading(**answer["reading"]))

    def salt(self, request: Any) -> str:
        """For whom the cached blocks of a request are.

        Edits change keys and values, so blocks belong to the adapter that they were made under. Where the edits depend
        on the prompt's end, and no mark in the prompt says where that is, they belong to prompts of that length, too:
        the next turn of a chat begins with the same tokens, and edits others.
        """
        ids = token_ids(request)
        length = len(request.prompt_embeds if ids is None else ids)
        salt = f"{KEY}:{self.fingerprint}"
        return f"{salt}:{length}" if self.reading.depends_on_length(ids, length) else salt


def init(inner: Callable[..., None], processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """`InputProcessor.__init__`, noting the adapters that are named at the start: name -> `Known`."""
    inner(processor, vllm_config, *args, **kwargs)
    options = Options.read(vllm_config.additional_config)
    if options is not None:
        known = {name: Known.of(facts(source)) for name, source in options.adapters.items()}
        setattr(processor, _ATTRIBUTE, known)
        refuse_beam_search()


def refuse_beam_search() -> None:
    """Have vLLM's server refuse a request with an adapter and beams, whose steps know nothing of `extra_args`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _to_beam_search_params)


def _to_beam_search_params(inner: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if KEY in (request.vllm_xargs or {}):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"use_beam_search=True: not with an adapter ({KEY}=...).", parameter="use_beam_search"
        )
    return inner(request, *args, **kwargs)


def process_inputs(
    inner: Callable[..., Any], processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """`InputProcessor.process_inputs`, for a request that names an adapter.

    Raises:
        VLLMValidationError: there is no adapter of that name; over HTTP the status 400, for that request alone.
    """
    chosen = getattr(params, "extra_args", None) or {}
    if KEY not in chosen:
        return inner(processor, request_id, prompt, params, *args, **kwargs)
    from vllm.exceptions import VLLMValidationError

    name, known = chosen[KEY], getattr(processor, _ATTRIBUTE, None)
    if known is None:
        raise VLLMValidationError(
            f"{KEY}={name!r}: this engine serves no LoReFT adapters. {_HOW_TO_START}",
            parameter=KEY,
            value=name,
        )
    if not isinstance(name, str) or name not in known:
        raise VLLMValidationError(
            f"{KEY}={name!r}: there is no adapter of that name. There are: {', '.join(sorted(known)) or 'none'}.",
            parameter=KEY,
            value=name,
        )
    request = inner(processor, request_id, prompt, params, *args, **kwargs)
    salt = known[name].salt(request)
    request.cache_salt = salt if request.cache_salt is None else f"{salt}:{request.cache_salt}"
    return request


def _known(engine: Any) -> dict[str, Known]:
    """The adapters of an `LLM`, `LLMEngine` or `AsyncLLM`, by name."""
    engine = getattr(engine, "llm_engine", engine)
    known: dict[str, Known] | None = getattr(engine.input_processor, _ATTRIBUTE, None)
    if known is None:
        raise ValueError(f"This engine serves no LoReFT adapters. {_HOW_TO_START}")
    return known


def _check_new(engine: Any, name: str) -> dict[str, Known]:
    known = _known(engine)
    if check_name(name) in known:
        raise ValueError(f"There is an adapter {name!r} already. Remove it first, or give another name.")
    return known


def _added(known: dict[str, Known], name: str, answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise ValueError(answer["error"])
    known[name] = Known.of(answer)


def _call(llm: Any, method: str, *args: Any) -> Any:
    """Call a method of the engine's core, which is in this process or, as a rule, in another."""
    client = llm.llm_engine.engine_core
    core = getattr(client, "engine_core", None)
    return getattr(core, method)(*args) if core is not None else client.call_utility(method, *args)


def _check_there(engine: Any, name: str) -> dict[str, Known]:
    known = _known(engine)
    if name not in known:
        raise ValueError(f"There is no adapter {name!r}. There are: {', '.join(sorted(known)) or 'none'}.")
    return known


def list_adapters(engine: Any) -> list[str]:
    """Names of the adapters that requests can choose.

    Args:
        engine: vLLM's `LLM` or `AsyncLLM`.
    """
    return sorted(_known(engine))


def add_adapter(llm: Any, name: str, source: str) -> None:
    """Load an adapter into a running engine.

    Args:
        llm: vLLM's `LLM`.
        name: what requests choose it by.
        source: folder that `save_pretrained` wrote, or its name on the Hub.

    Raises:
        ValueError: it is damaged, does not fit the model or the engine's limits, or the name is taken; the engine goes
            on as before.
    """
    known = _check_new(llm, name)
    _added(known, name, _call(llm, "loreft_add", name, source))


def remove_adapter(llm: Any, name: str) -> None:
    """Drop an adapter from a running engine.

    Args:
        llm: vLLM's `LLM`.
        name: of the adapter.

    Raises:
        ValueError: there is no such adapter, or requests still use it; it stays then.
    """
    known = _check_there(llm, name)
    if used := _call(llm, "loreft_remove", name):
        raise ValueError(f"{used} requests still use the adapter {name!r}. Remove it when they have ended.")
    del known[name]


async def add_adapter_async(engine: Any, name: str, source: str) -> None:
    """`add_adapter` for vLLM's `AsyncLLM`, which the server runs on."""
    known = _check_new(engine, name)
    _added(known, name, await engine.engine_core.call_utility_async("loreft_add", name, source))


async def remove_adapter_async(engine: Any, name: str) -> None:
    """`remove_adapter` for vLLM's `AsyncLLM`: takes no new requests at once, and waits for those that use it."""
    known = _check_there(engine, name)
    taken_out = known.pop(name)
    try:
        while await engine.engine_core.call_utility_async("loreft_remove", name):
            await asyncio.sleep(_POLL_SECONDS)
    except BaseException:  # also if the caller gave up waiting: the adapter is there still, and can be asked for
        known[name] = taken_out
        raise
