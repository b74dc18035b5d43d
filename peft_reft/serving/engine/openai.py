"""The OpenAI server: which models it lists, how a request's `model` is looked up, its routes for LoRA.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`...models.serving.OpenAIServingModels`                   wrapped class (`vllm.entrypoints.openai`)            0.28
`...models.serving.create_error_response`                 refuses one request                                  0.28
`vllm.entrypoints.serve.engine.serving.BaseServing`       wrapped class: the routes that generate              0.28
`vllm.engine.arg_utils.AsyncEngineArgs`                   wrapped class                                        0.28
`AsyncEngineArgs.from_cli_args`                           wrapped: takes our adapters out of `--lora-modules`  0.28
`Namespace.lora_modules`                                  the adapters on the command line                     0.28
`Namespace.additional_config`                             where they go                                        0.28
`LoRAModulePath.path`                                     its folder, or its name on the Hub                   0.28
`LoRAModulePath.base_model_name`                          is refused: the parent is the first served name       0.28
`OpenAIServingModels.__init__`                            wrapped: our adapters become models                  0.28
`OpenAIServingModels.lora_requests`                       gains an entry for each of our adapters              0.28
`OpenAIServingModels.base_model_paths`                    names that an adapter must not have                  0.28
`OpenAIServingModels.engine_client`                       the engine                                           0.28
`OpenAIServingModels.load_lora_adapter`                   wrapped: loads our adapters, too                     0.28
`OpenAIServingModels.unload_lora_adapter`                 wrapped: drops our adapters, too                     0.28
`OpenAIServingModels.show_available_models`               wrapped: knows what other servers loaded             0.28
`LoadLoRAAdapterRequest.lora_name`                        name of an adapter to load; also of one to unload    0.28
`LoadLoRAAdapterRequest.lora_path`                        its folder, or its name on the Hub                   0.28
`LoadLoRAAdapterRequest.load_inplace`                     whether it may replace one                           0.28
`BaseServing._check_model`                                wrapped: finds adapters that are not known yet       0.28
`BaseServing._maybe_get_adapters`                         wrapped: no adapter of ours is chosen by default     0.28
`BaseServing.models`                                      the models that it serves                            0.28
`CompletionRequest.model`                                 names the adapter; also in bodies of other routes    0.28
========================================================= ==================================================== =====
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...patching import wrap
from .front import make_lora_request, names_adapter


def extend_command_line(from_cli_args: Callable[..., Any]) -> None:
    """Wrap `AsyncEngineArgs.from_cli_args`, by which servers read their command line."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    wrap(AsyncEngineArgs, "from_cli_args", from_cli_args)


def extend_server(
    init: Callable[..., Any],
    load: Callable[..., Any],
    unload: Callable[..., Any],
    show: Callable[..., Any],
    check_model: Callable[..., Any],
    choose: Callable[..., Any],
) -> None:
    """Wrap what lists models, looks up the `model` of a request, and loads and drops LoRA adapters."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    wrap(OpenAIServingModels, "__init__", init)
    wrap(OpenAIServingModels, "load_lora_adapter", load)
    wrap(OpenAIServingModels, "unload_lora_adapter", unload)
    wrap(OpenAIServingModels, "show_available_models", show)
    wrap(BaseServing, "_check_model", check_model)
    wrap(BaseServing, "_maybe_get_adapters", choose)


# The command line.


def lora_modules(args: Any) -> list[tuple[str, str, str | None]]:
    """Of each adapter on the command line: its name, its folder or name on the Hub, its base model if one is given."""
    return [(each.name, each.path, each.base_model_name) for each in getattr(args, "lora_modules", None) or []]


def config_on_command_line(args: Any) -> dict[str, Any]:
    """The `additional_config` on the command line."""
    return args.additional_config or {}


def change_command_line(args: Any, taken: Iterable[str], config: dict[str, Any]) -> None:
    """Take adapters out of `--lora-modules`, and set `--additional-config`."""
    left = [each for each in args.lora_modules if each.name not in taken]
    args.lora_modules = left or None
    args.additional_config = config


# The models of a server.


def engine_of(models: Any) -> object:
    """The engine behind the models of a server, an `AsyncLLM`. None for a server that only renders prompts."""
    found: object = getattr(models, "engine_client", None)
    return found


def base_names(models: Any) -> list[str]:
    """The names of the base model."""
    return [each.name for each in models.base_model_paths]


def lora_names(models: Any) -> list[str]:
    """The names of vLLM's own LoRA adapters."""
    return [name for name, request in models.lora_requests.items() if not names_adapter(request)]


def offer(models: Any, adapters: dict[str, str]) -> None:
    """Have a server offer these adapters as models, and no others of ours.

    Args:
        models: the models of a server.
        adapters: from each adapter's name to its folder, or its name on the Hub.
    """
    offered = models.lora_requests
    for name, request in [*offered.items()]:
        if names_adapter(request) and name not in adapters:
            del offered[name]
    for name, path in adapters.items():
        offered[name] = make_lora_request(name, path)


def asked_to_load(body: Any) -> tuple[str, str, bool]:
    """What the body of a call of `/v1/load_lora_adapter` says: a name, a path, and whether it may replace one."""
    return body.lora_name, body.lora_path, body.load_inplace


def asked_to_unload(body: Any) -> str:
    """The name in the body of a call of `/v1/unload_lora_adapter`."""
    name: str = body.lora_name
    return name


def refusal(message: str) -> Any:
    """What a route returns to answer with status 400."""
    from vllm.entrypoints.openai.models.serving import create_error_response

    return create_error_response(message)


# A request.


def wanted_model(body: Any) -> str | None:
    """The `model` of a request."""
    name: str | None = body.model
    return name


def models_of(serving: Any) -> Any:
    """The models that a route serves."""
    return serving.models


def is_offered(models: Any, name: str) -> bool:
    """Whether a server offers a model of this name: the base, or an adapter of any kind."""
    return name in base_names(models) or name in models.lora_requests
