"""In the engine's core, between front end and worker: only here is known which requests there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .options import KEY

_ATTRIBUTE = "loreft_dropped"


def add(core: Any, name: str, source: str) -> dict[str, Any]:
    """`EngineCore.loreft_add`: have the worker load an adapter; returns what `worker.add` does."""
    answer: dict[str, Any] = core.model_executor.collective_rpc("loreft_add", args=(name, source))[0]
    if "error" not in answer:
        _dropped(core).discard(name)
    return answer


def remove(core: Any, name: str) -> int:
    """`EngineCore.loreft_remove`: drop an adapter, unless requests use it; returns how many do.

    Requests wait in the scheduler before a worker hears of them.
    """
    used = sum(adapter_of(request) == name for request in core.scheduler.requests.values())
    if not used:
        core.model_executor.collective_rpc("loreft_remove", args=(name,))
        _dropped(core).add(name)
    return used


def add_request(inner: Callable[..., None], core: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """`EngineCore.add_request`, for a request that the front end let pass just before its adapter was dropped."""
    name = adapter_of(request)
    if name is None or name not in _dropped(core):
        inner(core, request, *args, **kwargs)
    elif hasattr(core, "_send_error_outputs_to_client"):  # in a process of its own, where an exception would end it
        core._send_error_outputs_to_client([request.request_id], request.client_index)
    else:
        raise ValueError(f"{KEY}={name!r}: the adapter was dropped.")


def adapter_of(request: Any) -> str | None:
    """The adapter that a request of the scheduler's, or of the worker's, names."""
    params = request.sampling_params
    return None if params is None or params.extra_args is None else params.extra_args.get(KEY)


def _dropped(core: Any) -> set[str]:
    found: set[str] = core.__dict__.setdefault(_ATTRIBUTE, set())
    return found
