"""The adapter that a request chooses is found before the request goes on.

A front end may not know it yet: another API server has loaded it, a `LoRARequest` gives its path, or it is to be
loaded on its first use (`resolve_from`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from .engine.front import (
    call_core,
    call_core_async,
    has_failed,
    invalid_request,
    names_adapter,
    read_lora_request,
)
from .engine.request import extra_args
from .frontend import (
    add_adapter,
    add_adapter_async,
    offered_by,
    refresh,
    refresh_if_shared,
    remove_adapter,
    remove_adapter_async,
    unknown,
)
from .offered import Offered
from .options import KEY

_TRIES = 3
"""How often a request is sent whose adapter was loaded on its first use, and dropped for another one on the way."""


@dataclass(frozen=True)
class Load:
    """An adapter that is to be loaded."""

    name: str
    path_or_name: str
    replace: bool = False


# A `LoRARequest`.


def add_lora(inner: Callable[..., bool], engine: object, lora_request: object) -> bool:
    """Load the adapter of a `LoRARequest`, LoReFT or LoRA (`LLMEngine.add_lora`)."""
    offered = offered_by(engine)
    if offered is None or not is_ours(offered, lora_request):
        return inner(engine, lora_request)
    load = _load_of(offered, lora_request)
    if load is not None:
        add_adapter(engine, load.name, load.path_or_name, load.replace)
    return True


async def add_lora_async(inner: Callable[..., Any], engine: object, lora_request: object) -> bool:
    """Do what `add_lora` does (`AsyncLLM.add_lora`)."""
    offered = offered_by(engine)
    if offered is None or not await asyncio.to_thread(is_ours, offered, lora_request):
        added: bool = await inner(engine, lora_request)
        return added
    load = _load_of(offered, lora_request)
    if load is not None:
        await add_adapter_async(engine, load.name, load.path_or_name, load.replace)
    return True


def is_ours(offered: Offered, lora_request: object) -> bool:
    """Whether a `LoRARequest` means a LoReFT adapter."""
    return names_adapter(lora_request) or offered.is_ours(read_lora_request(lora_request)[1])


def _load_of(offered: Offered, lora_request: object) -> Load | None:
    """What must be loaded for a `LoRARequest` that means a LoReFT adapter; None if nothing.

    Raises:
        ValueError: the name is another adapter's.
    """
    name, path, replace = read_lora_request(lora_request)
    if names_adapter(lora_request):
        return None
    if name in offered and not replace:
        loaded = offered.paths[name]
        if loaded != path:
            raise ValueError(
                f"There is an adapter {name!r} already, from {loaded}. Replace it (load_inplace=True), or give "
                f"another name to {path}."
            )
        return None
    return Load(name, path, replace)


# A request.


def add_request(
    inner: Callable[..., str],
    engine: object,
    request_id: str,
    prompt: object,
    params: object,
    *args: Any,
    **kwargs: Any,
) -> str:
    """Find the adapter that a request chooses (`LLMEngine.add_request`)."""
    offered = offered_by(engine)
    lora_request = kwargs.get("lora_request")
    if offered is not None:
        try:
            if lora_request is not None and is_ours(offered, lora_request):
                load = _load_of(offered, lora_request)
                name: Any = read_lora_request(lora_request)[0]
            else:
                name = extra_args(params).get(KEY)
                load = _first_use(offered, name)
            if load is not None:
                _make_room(engine, offered, load)
                add_adapter(engine, load.name, load.path_or_name, load.replace)
                offered.loaded_on_use(load.name)
        except ValueError as error:
            raise invalid_request(str(error), parameter=KEY) from error
        offered.used(name)
    return inner(engine, request_id, prompt, params, *args, **kwargs)


def _first_use(offered: Offered, name: object) -> Load | None:
    """What must be loaded because a request is the first to choose it; None if nothing."""
    if name in offered:
        return None
    path = offered.resolve(name)
    return None if path is None else Load(str(name), path)


def _make_room(engine: object, offered: Offered, load: Load) -> None:
    """Drop an adapter that was loaded on first use if there is no place for another one."""
    name = _to_drop(offered, load, call_core(engine, "loreft_list"))
    if name is not None:
        remove_adapter(engine, name)


def _to_drop(offered: Offered, load: Load, listed: dict[str, dict[str, Any]]) -> str | None:
    if load.name in listed or len(listed) < offered.options.most_adapters:
        return None
    return offered.least_recently_used({name: data["users"] for name, data in listed.items()})


def generate(
    inner: Callable[..., AsyncGenerator[Any, None]],
    engine: object,
    prompt: object,
    sampling_params: object,
    request_id: str,
    **kwargs: Any,
) -> AsyncGenerator[Any, None]:
    """Find the adapter that a request chooses (`AsyncLLM.generate`)."""
    offered = offered_by(engine)
    lora_request = kwargs.get("lora_request")
    begin = partial(inner, engine, prompt, sampling_params, request_id, **kwargs)
    if offered is None or (lora_request is None and KEY not in extra_args(sampling_params)):
        return begin()
    return _generate(begin, engine, offered, sampling_params, lora_request)


async def _generate(
    begin: Callable[[], AsyncGenerator[Any, None]],
    engine: object,
    offered: Offered,
    params: object,
    lora_request: object | None,
) -> AsyncGenerator[Any, None]:
    for _ in range(_TRIES):
        try:
            name = await _find_for_request(engine, offered, params, lora_request)
        except ValueError as error:
            raise invalid_request(str(error), parameter=KEY) from error
        async with aclosing(begin()) as outputs:
            async for output in outputs:
                if name is not None and has_failed(output):
                    # The core fails requests whose adapter was removed on their way to it.
                    await refresh(engine)
                    if name not in offered:
                        break
                yield output
            else:
                return
    raise unknown(name, offered)


async def _find_for_request(engine: object, offered: Offered, params: object, lora_request: object) -> Any:
    """Find the adapter that a request chooses. Returns what it calls the adapter; None if it chooses none."""
    if lora_request is not None and (
        names_adapter(lora_request) or await asyncio.to_thread(is_ours, offered, lora_request)
    ):
        name: Any = read_lora_request(lora_request)[0]
        await _load(engine, offered, _load_of(offered, lora_request))
    else:
        name = extra_args(params).get(KEY)
    await find(engine, offered, name)
    return name


async def find(engine: object, offered: Offered, name: Any) -> None:
    """Have an adapter known here if it is known elsewhere, or may be loaded on its first use.

    Raises:
        ValueError: it cannot be loaded.
    """
    if name not in offered:
        await refresh_if_shared(engine)
    await _load(engine, offered, _first_use(offered, name))
    offered.used(name)


async def _load(engine: object, offered: Offered, load: Load | None) -> None:
    if load is None:
        return
    async with offered.loading:
        if load.name in offered and not load.replace:  # another request was faster
            return
        victim = _to_drop(offered, load, await call_core_async(engine, "loreft_list"))
        if victim is not None:
            await remove_adapter_async(engine, victim)
        try:
            await add_adapter_async(engine, load.name, load.path_or_name, load.replace)
        except ValueError:
            await refresh_if_shared(engine)
            if load.name not in offered or load.replace:
                raise
            return  # another front end was faster, or a request that did not wait for the end
        offered.loaded_on_use(load.name)
