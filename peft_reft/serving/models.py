"""The plugin in vLLM's OpenAI server: each adapter is a model there, as LoRA adapters are.

So `/v1/models` lists it with its base as parent, `model="emoji"` chooses it in every route that generates, and
`--lora-modules` and `/v1/load_lora_adapter` load it. All this takes place in the server's table of LoRA adapters
(`engine.openai.offer`); LoRA itself need not be enabled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from . import frontend
from .engine.config import additional_config
from .engine.front import logs_stats, names_adapter, read_lora_request, serves_lora
from .engine.openai import (
    asked_to_load,
    asked_to_unload,
    base_names,
    change_command_line,
    config_on_command_line,
    engine_of,
    extend_server,
    is_offered,
    lora_modules,
    models_of,
    refusal,
    wanted_model,
)
from .finding import find
from .frontend import add_adapter_async, offered_by, refresh_if_shared, remove_adapter_async
from .options import KEY, Options
from .sources import is_loreft


def from_cli_args(inner: Callable[..., Any], args: object, *more: Any, **kwargs: Any) -> Any:
    """Take LoReFT adapters out of `--lora-modules`, and serve them (`AsyncEngineArgs.from_cli_args`).

    They become `adapters` in `additional_config["loreft"]`, which every process of the engine reads at its start.

    Raises:
        ValueError: `adapters` has another one of the same name, or a base model is given.
    """
    ours: dict[str, str] = {}
    for name, path, base in lora_modules(args):
        if is_loreft(path):
            if base is not None:
                raise ValueError(
                    f"--lora-modules {name}: base_model_name={base!r}; the parent of a LoReFT adapter is the first "
                    "served name (allowed: leave it out)."
                )
            ours[name] = path
    if ours:
        config = config_on_command_line(args)
        options = config.get(KEY, {})
        adapters = options.get("adapters", {})
        for name, path in ours.items():
            if adapters.get(name, path) != path:
                raise ValueError(f"--lora-modules {name}={path}: loreft.adapters has {name!r} from {adapters[name]}.")
        options = {**options, "adapters": {**adapters, **ours}}
        change_command_line(args, taken=ours, config={**config, KEY: options})
    return inner(args, *more, **kwargs)


def start(inner: Callable[..., None], processor: object, config: object, *args: Any, **kwargs: Any) -> None:
    """Do what `frontend.init` does, and wrap the OpenAI server, which this process may become."""
    frontend.init(inner, processor, config, *args, **kwargs)
    if Options.read(additional_config(config)) is not None:
        extend_server(init=init, load=load, unload=unload, show=show, check_model=check_model, choose=choose)


def init(inner: Callable[..., None], models: object, *args: Any, **kwargs: Any) -> None:
    """Offer the adapters as models (`OpenAIServingModels.__init__`).

    Raises:
        ValueError: an adapter has the name of the base model.
    """
    inner(models, *args, **kwargs)
    offered = offered_by(engine_of(models))
    if offered is not None:
        if offered.counter is None and logs_stats(engine_of(models)):
            offered.count_in_metrics(base_names(models)[0])
        offered.publish_in(models)


async def load(inner: Callable[..., Any], models: object, request: object, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter, LoReFT or LoRA (`OpenAIServingModels.load_lora_adapter`)."""
    name, path, replace = asked_to_load(request)
    offered = offered_by(engine_of(models))
    if offered is None:
        return await inner(models, request, *args, **kwargs)
    if serves_lora(engine_of(models)) and not await asyncio.to_thread(offered.is_ours, path):
        if name in offered:
            return refusal(f"{name!r} is a LoReFT adapter. Unload it first, or give another name.")
        return await inner(models, request, *args, **kwargs)
    try:
        await add_adapter_async(engine_of(models), name, path, replace)
    except ValueError as error:
        return refusal(str(error))
    return f"Success: LoReFT adapter '{name}' added successfully."


async def unload(inner: Callable[..., Any], models: object, request: object) -> Any:
    """Drop an adapter, LoReFT or LoRA (`OpenAIServingModels.unload_lora_adapter`)."""
    name = asked_to_unload(request)
    offered = offered_by(engine_of(models))
    if offered is None or name not in offered:
        return await inner(models, request)
    try:
        await remove_adapter_async(engine_of(models), name)
    except ValueError as error:
        return refusal(str(error))
    return f"Success: LoReFT adapter '{name}' removed successfully."


async def show(inner: Callable[..., Any], models: object) -> Any:
    """List the models, those that other API servers have loaded among them (`show_available_models`)."""
    if offered_by(engine_of(models)) is not None:
        await refresh_if_shared(engine_of(models))
    return await inner(models)


async def check_model(inner: Callable[..., Any], serving: object, request: object) -> Any:
    """Look for the adapter that a request names, if this server does not know it (`BaseServing._check_model`)."""
    models = models_of(serving)
    name = wanted_model(request)
    offered = None if name is None or is_offered(models, name) else offered_by(engine_of(models))
    if offered is not None:
        try:
            await find(engine_of(models), offered, name)
        except ValueError as error:
            return refusal(str(error))
    return await inner(serving, request)


def choose(inner: Callable[..., Any], serving: object, request: object, *args: Any, **kwargs: Any) -> Any:
    """Let `model` alone choose an adapter of ours (`BaseServing._maybe_get_adapters`).

    vLLM also chooses one by default whose name is a type of content in the messages, such as "text".
    """
    found = inner(serving, request, *args, **kwargs)
    if found is not None and names_adapter(found) and read_lora_request(found)[0] != wanted_model(request):
        return inner(serving, request)
    return found
