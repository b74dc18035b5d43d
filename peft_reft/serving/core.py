"""The plugin in the engine's core, between front end and worker. Only the core knows which requests exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .blocks import BlockKeys, EditedMap
from .engine.core import call_worker, fail_request, requests_of_core
from .engine.request import adapter_of, extra_args, given_length, keep, kept, params_of, token_ids
from .options import BLOCKS, KEY


def add(core: object, name: str, path_or_name: str) -> dict[str, Any]:
    """Have the worker load an adapter (`EngineCore.loreft_add`). Returns what `worker.add` returns."""
    answer: dict[str, Any] = call_worker(core, "loreft_add", name, path_or_name)
    if "error" not in answer:
        _dropped(core).discard(name)
    return answer


def remove(core: object, name: str) -> int:
    """Drop an adapter if no request uses it (`EngineCore.loreft_remove`).

    The core decides because requests wait here before a worker hears of them.

    Returns:
        How many requests use the adapter. It is dropped if there are none.
    """
    users = sum(adapter_of(request) == name for request in requests_of_core(core))
    if users == 0:
        call_worker(core, "loreft_remove", name)
        _dropped(core).add(name)
    return users


def add_request(inner: Callable[..., None], core: object, request: object, *args: Any, **kwargs: Any) -> None:
    """Add a request to the core (`EngineCore.add_request`) unless its adapter has been dropped.

    The front end refuses unknown adapters, but it may let a request pass just before its adapter is dropped.
    """
    name = adapter_of(request)
    if name is None or name not in _dropped(core):
        inner(core, request, *args, **kwargs)
        return
    # An exception would end a core that runs in a process of its own.
    if not fail_request(core, request):
        raise ValueError(f"{KEY}={name!r}: the adapter was dropped.")


def block_keys(
    inner: Callable[..., tuple[tuple[Any, ...] | None, int]],
    request: object,
    start: int,
    stop: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[tuple[Any, ...] | None, int]:
    """Add what is edited in a block to the extra elements of its key (`generate_block_hash_extra_keys`)."""
    keys, number = inner(request, start, stop, *args, **kwargs)
    data = extra_args(params_of(request)).get(BLOCKS)
    if data is None:
        return keys, number
    edited: EditedMap | None = kept(request, "loreft_map")
    if edited is None:
        edited = BlockKeys.read(data).map_of(token_ids(request), given_length(request))
        keep(request, "loreft_map", edited)
    element = edited.element(start, stop)
    return keys if element is None else (*(keys or ()), (KEY, element)), number


def _dropped(core: object) -> set[str]:
    """The names of the adapters that were dropped and not added again."""
    found: set[str] | None = kept(core, "loreft_dropped")
    if found is None:
        found = set()
        keep(core, "loreft_dropped", found)
    return found
