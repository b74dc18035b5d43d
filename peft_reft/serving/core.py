"""The plugin in the engine's core, between front end and worker. Only the core knows which requests exist.

So the core says which adapter a name means, and writes it into the request when it comes. If the adapter of that name
is replaced or removed, the request goes on with what it chose: weights stay until no request uses them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .blocks import EditedMap, map_of
from .chosen import Choice, Facts
from .engine.config import TESTED, additional_config, is_seen, version
from .engine.core import (
    block_size,
    call_workers,
    config_of_core,
    fail_request,
    id_of,
    keys_of_blocks,
    make_request,
    most_tokens_of_request,
    requests_of_core,
    run_requests,
)
from .engine.request import adapter_of, add_extra_args, extra_args, given_length, keep, kept, params_of, token_ids
from .options import CHOICE, KEY, PROMPT_LENGTH, SCALE, Options, check_name
from .selfcheck import ANSWER, NAME, OTHER_TOKEN, TOKEN
from .sources import Message, from_message, path_of


@dataclass
class Adapters:
    """The adapters of an engine, as its core knows them."""

    most: int
    """How many names there may be."""
    named: dict[str, Facts]
    """From an adapter's name to its facts."""
    paths: dict[str, str]
    """From an adapter's name to the folder, or the name on the Hub, that it was loaded from; or `SENT`."""
    checked: bool = False
    """Whether the engine has begun to check itself."""
    coming: dict[str, str] = field(default_factory=dict)
    """From the id of a request that has its adapter, and that the scheduler does not have yet, to the fingerprint. It
    is filled by the thread that reads requests."""


def start(inner: Callable[..., Any], core: object, *args: Any, **kwargs: Any) -> Any:
    """Note which adapters the workers have loaded, when they have the model (`EngineCore._initialize_kv_caches`).

    In a process of its own a core loads plugins within `__init__`, so that method cannot be wrapped.
    """
    found = inner(core, *args, **kwargs)
    options = Options.read(additional_config(config_of_core(core)))
    if options is not None:
        loaded: dict[str, dict[str, Any]] = call_workers(core, "loreft_at_start")[0]
        named = {name: Facts.read(data) for name, data in loaded.items()}
        keep(core, "loreft", Adapters(options.most_adapters, named, dict(options.adapters)))
    return found


def add(core: object, name: str, message: Message, replace: bool) -> dict[str, Any]:
    """Have the workers load an adapter (`EngineCore.loreft_add`).

    Args:
        core: vLLM's `EngineCore`.
        name: what requests will call it.
        message: a folder, or a name on the Hub; or the files themselves (`sources.to_message`).
        replace: whether it takes the place of the adapter that has its name.

    Returns:
        The fields of its `Facts`; or, as `error`, what is wrong. Then nothing has changed.
    """
    adapters: Adapters = kept(core, "loreft")
    try:
        _check_name(adapters, name, replace)
    except ValueError as error:
        return {"error": str(error)}
    _drop_unused(core, adapters)
    path = path_of(from_message(message))
    answers: list[dict[str, Any]] = call_workers(core, "loreft_add", name, message)
    answer = next((each for each in answers if "error" in each), answers[0])
    if any(each != answers[0] for each in answers) and "error" not in answer:
        answer = {"error": f"{path} changed while it was read. Load it again when it is complete."}
    if "error" not in answer:
        adapters.named[name] = Facts.read(answer)
        adapters.paths[name] = path
    _drop_unused(core, adapters)  # what it replaces; or what only some of the workers could load
    return answer


def _check_name(adapters: Adapters, name: str, replace: bool) -> None:
    """Raise ValueError if no adapter of this name can be added."""
    check_name(name)
    if name in adapters.named:
        if not replace:
            raise ValueError(f"There is an adapter {name!r} already. Replace it, remove it, or give another name.")
    elif len(adapters.named) >= adapters.most:
        raise ValueError(f"There are {adapters.most} adapters already (max_adapters). Remove one first.")


def remove(core: object, name: str) -> str | None:
    """Drop an adapter (`EngineCore.loreft_remove`). Requests that have chosen it go on with it.

    Returns:
        None; or what is wrong.
    """
    adapters: Adapters = kept(core, "loreft")
    if name not in adapters.named:
        return f"There is no adapter {name!r}. There are: {', '.join(sorted(adapters.named)) or 'none'}."
    del adapters.named[name], adapters.paths[name]
    _drop_unused(core, adapters)
    return None


def known(core: object) -> dict[str, dict[str, Any]]:
    """What front ends must know of each adapter, by its name (`EngineCore.loreft_list`).

    Returns:
        The fields of its `Facts`, where it was loaded from, and how many requests use its weights.
    """
    adapters: Adapters = kept(core, "loreft")
    users = Counter(_in_use(core, adapters))
    return {
        name: {"facts": asdict(facts), "path": adapters.paths[name], "users": users[facts.fingerprint]}
        for name, facts in adapters.named.items()
    }


def _in_use(core: object, adapters: Adapters) -> Iterator[str]:
    """The fingerprint of each request's adapter."""
    yield from list(adapters.coming.values())
    for request in requests_of_core(core):
        data = extra_args(params_of(request)).get(CHOICE)
        if data is not None:
            yield data["facts"]["fingerprint"]


def _drop_unused(core: object, adapters: Adapters) -> None:
    """Have the workers free the places of weights that no name means and no request uses."""
    named = (facts.fingerprint for facts in adapters.named.values())
    call_workers(core, "loreft_keep", sorted({*named, *_in_use(core, adapters)}))


def init(inner: Callable[..., None], core: object, *args: Any, **kwargs: Any) -> None:
    """Check an engine whose core has no process of its own (`EngineCore.__init__`)."""
    inner(core, *args, **kwargs)
    check_itself(core)


def run_loop(inner: Callable[..., None], core: object, *args: Any, **kwargs: Any) -> None:
    """Check the engine before its core takes requests (`EngineCoreProc.run_busy_loop`)."""
    check_itself(core)
    inner(core, *args, **kwargs)


def check_itself(core: object) -> None:
    """See whether a vLLM that the tests have not seen does what the plugin relies on (`selfcheck`).

    Raises:
        RuntimeError: it does not, or could not be looked at.
    """
    adapters: Adapters | None = kept(core, "loreft")
    if adapters is None or adapters.checked or is_seen(version()):
        return
    adapters.checked = True
    unseen = f"peft_reft was not tested with vLLM {version()} (tested: {TESTED})"
    warnings.warn(f"{unseen}: the engine checks itself before it serves.", stacklevel=2)
    advice = "Install a tested version of vLLM."
    try:
        wrong = _find_wrong(core, adapters)
    except Exception as error:
        raise RuntimeError(f"{unseen}, and the engine cannot check itself: {error!r}. {advice}") from error
    if wrong is not None:
        raise RuntimeError(f"{unseen}, and it would edit wrongly: {wrong}. {advice}")


def _find_wrong(core: object, adapters: Adapters) -> str | None:
    """What is wrong with two requests, one of them under a random adapter; None if nothing is."""
    # More than a cached block, if the model can read as many.
    length = max(8, min(block_size(core) + 5, most_tokens_of_request(core) - ANSWER))
    adapters.named[NAME] = Facts.read(call_workers(core, "loreft_begin_check", length)[0])
    try:
        chosen = make_request(core, "loreft-1", [TOKEN] * length, ANSWER, {KEY: NAME})
        other = make_request(core, "loreft-2", [OTHER_TOKEN] * (length - 2), ANSWER, {})
        same_text = make_request(core, "loreft-3", [TOKEN] * length, ANSWER, {})
        run_requests(core, [chosen, other])
        found: list[str | None] = call_workers(core, "loreft_end_check")
    finally:
        del adapters.named[NAME]
        _drop_unused(core, adapters)
    if {*keys_of_blocks(chosen)} & {*keys_of_blocks(same_text)}:
        found.append("cached blocks with edited tokens have the base model's keys")
    return next((wrong for wrong in found if wrong is not None), None)


def preprocess(inner: Callable[..., Any], core: object, request: object, *args: Any, **kwargs: Any) -> Any:
    """Write into a request which adapter its name means (`EngineCore.preprocess_add_request`).

    vLLM makes the keys of the request's blocks here. As a rule this runs in the thread that reads requests.
    """
    adapters: Adapters | None = kept(core, "loreft")
    name = adapter_of(request)
    if adapters is None or name is None:
        return inner(core, request, *args, **kwargs)
    facts = adapters.named.get(name)
    if facts is None:  # `add_request` fails it
        return inner(core, request, *args, **kwargs)
    chosen = extra_args(params_of(request))
    choice = Choice(facts, float(chosen.get(SCALE, 1.0)), chosen.get(PROMPT_LENGTH))
    adapters.coming[id_of(request)] = facts.fingerprint
    try:
        add_extra_args(request, {CHOICE: asdict(choice)})
        return inner(core, request, *args, **kwargs)
    except BaseException:
        del adapters.coming[id_of(request)]
        raise


def add_request(inner: Callable[..., None], core: object, request: object, *args: Any, **kwargs: Any) -> None:
    """Add a request to the core (`EngineCore.add_request`) unless there was no adapter of the name that it gives.

    The front end refuses unknown names, but it may let a request pass just before an adapter is removed.
    """
    adapters: Adapters | None = kept(core, "loreft")
    name = adapter_of(request)
    if name is None or CHOICE in extra_args(params_of(request)):
        inner(core, request, *args, **kwargs)
        if adapters is not None:
            adapters.coming.pop(id_of(request), None)  # the scheduler has it now
        return
    # An exception would end a core that runs in a process of its own.
    if not fail_request(core, request):
        raise ValueError(f"{KEY}={name!r}: there is no adapter of that name.")


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
    data = extra_args(params_of(request)).get(CHOICE)
    if data is None:
        return keys, number
    edited: EditedMap | None = kept(request, "loreft_map")
    if edited is None:
        edited = map_of(Choice.read(data), token_ids(request), given_length(request))
        keep(request, "loreft_map", edited)
    element = edited.element(start, stop)
    return keys if element is None else (*(keys or ()), (KEY, element)), number
