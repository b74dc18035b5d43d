"""The front end (`LLM`, `LLMEngine`, `AsyncLLM`) and the OpenAI server.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.engine.input_processor.InputProcessor`           wrapped class                                        0.28
`...chat_completion.protocol.ChatCompletionRequest`       wrapped class (`vllm.entrypoints.openai`)            0.28
`...completion.protocol.CompletionRequest`                wrapped class (`vllm.entrypoints.openai`)            0.28
`vllm.exceptions.VLLMValidationError`                     refuses one request, with status 400 over HTTP       0.28
`InputProcessor.__init__`                                 wrapped: the front end learns the adapters' names    0.28
`InputProcessor.process_inputs`                           wrapped: refuses unknown names                       0.28
`LLM.llm_engine`                                          reaches the two below                                0.28
`LLMEngine.input_processor`                               knows the adapters' names; also of AsyncLLM          0.28
`LLMEngine.engine_core`                                   client of the core; also of AsyncLLM                 0.28
`InprocClient.engine_core`                                the core itself, if it is in this process            0.28
`SyncMPClient.call_utility`                               calls a method of the core in another process        0.28
`AsyncMPClient.call_utility_async`                        the same for AsyncLLM                                0.28
`AsyncMPClient._call_utility_async`                       the same for one core of several                     0.28
`AsyncMPClient.core_engines`                              its cores, if data parallel several                  0.28
`ChatCompletionRequest.to_beam_search_params`             wrapped: refuses beams with an adapter               0.28
`CompletionRequest.to_beam_search_params`                 the same                                             0.28
`ChatCompletionRequest.vllm_xargs`                        names the adapter over HTTP; CompletionRequest too   0.28
`vllm.v1.engine.async_llm.AsyncLLM`                       wrapped class                                        0.28
`vllm.v1.engine.llm_engine.LLMEngine`                     wrapped class                                        0.28
`vllm.lora.request.LoRARequest`                           base of the requests by which `model=` chooses ours  0.28
`AsyncLLM.generate`                                       wrapped: adapters that are not known yet are found   0.28
`LLMEngine.add_request`                                   the same for LLM                                     0.28
`AsyncLLM.add_lora`                                       wrapped: loads our adapters, too; also of LLMEngine  0.28
`AsyncLLM._client_count`                                  whether other front ends may load adapters           0.28
`AsyncLLM.log_stats`                                      whether the server has metrics                       0.28
`AsyncLLM.vllm_config`                                    the engine's config                                  0.28
`VllmConfig.lora_config`                                  whether vLLM serves LoRA                             0.28
`...beam_search.online.BeamSearchOnlineMixin`             wrapped class                                        0.28
`...beam_search.offline.BeamSearchOfflineMixin`           wrapped class                                        0.28
`BeamSearchOnlineMixin.beam_search`                       wrapped: refuses beams with an adapter; offline too  0.28
`LoRARequest.lora_name`                                   the name of an adapter                               0.28
`LoRARequest.lora_path`                                   its folder, or its name on the Hub                   0.28
`LoRARequest.load_inplace`                                whether it may replace one                           0.28
`RequestOutput.outputs`                                   tells that the core has failed a request             0.28
`CompletionOutput.finish_reason`                          the same                                             0.28
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`InputProcessor.loreft`                                   what the front end knows of the adapters (`Offered`)
========================================================= ====================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ...patching import wrap


def extend_front_end(init: Callable[..., Any], process_inputs: Callable[..., Any]) -> None:
    """Wrap `InputProcessor.__init__` and `InputProcessor.process_inputs`."""
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(InputProcessor, "__init__", init)
    wrap(InputProcessor, "process_inputs", process_inputs)


def extend_engines(
    generate: Callable[..., Any],
    add_request: Callable[..., Any],
    add_lora: Callable[..., Any],
    add_lora_async: Callable[..., Any],
) -> None:
    """Wrap what takes requests, and what loads LoRA adapters: of `AsyncLLM`, and of `LLMEngine`, which `LLM` has."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    wrap(AsyncLLM, "generate", generate)
    wrap(AsyncLLM, "add_lora", add_lora_async)
    wrap(LLMEngine, "add_request", add_request)
    wrap(LLMEngine, "add_lora", add_lora)


def wrap_beam_search(body: Callable[..., Any], online: Callable[..., Any], offline: Callable[..., Any]) -> None:
    """Wrap the beam search: what reads its parameters over HTTP, and the search, of the server and of `LLM`."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    wrap(ChatCompletionRequest, "to_beam_search_params", body)
    wrap(CompletionRequest, "to_beam_search_params", body)
    wrap(BeamSearchOnlineMixin, "beam_search", online)
    wrap(BeamSearchOfflineMixin, "beam_search", offline)


def http_args(body: Any) -> Mapping[str, object]:
    """The `vllm_xargs` in the body of a request over HTTP."""
    given: Mapping[str, object] | None = body.vllm_xargs
    return given or {}


def invalid_request(message: str, parameter: str) -> Exception:
    """The exception that refuses one request (over HTTP: status 400) and leaves the engine running.

    The message has the value; vLLM would say it a second time, however long it is.
    """
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(message, parameter=parameter)
    return error


def processor_of(engine: object) -> object:
    """The input processor of an `LLM`, `LLMEngine` or `AsyncLLM`."""
    inner: Any = getattr(engine, "llm_engine", engine)
    found: object = inner.input_processor
    return found


def call_core(llm: Any, method: str, *args: object) -> Any:
    """Call a method of the core of an `LLM` or `LLMEngine`. The core is in this process or, as a rule, in another."""
    client = getattr(llm, "llm_engine", llm).engine_core
    core = getattr(client, "engine_core", None)
    if core is None:
        return client.call_utility(method, *args)
    return getattr(core, method)(*args)


async def call_core_async(engine: Any, method: str, *args: object) -> Any:
    """Call a method of each core of an `AsyncLLM`. Returns what the first returns."""
    return (await call_cores_async(engine, method, *args))[0]


async def call_cores_async(engine: Any, method: str, *args: object) -> list[Any]:
    """Call a method of each core of an `AsyncLLM`, and return what each returns."""
    client = engine.engine_core
    cores = getattr(client, "core_engines", ())
    if len(cores) < 2:
        return [await client.call_utility_async(method, *args)]
    return await asyncio.gather(*(client._call_utility_async(method, *args, engine=core) for core in cores))


def has_other_front_ends(engine: Any) -> bool:
    """Whether an `AsyncLLM` shares its core with those of other API servers."""
    count: int = engine._client_count
    return count > 1


def logs_stats(engine: Any) -> bool:
    """Whether an `AsyncLLM` has metrics."""
    found: bool = engine.log_stats
    return found


def serves_lora(engine: Any) -> bool:
    """Whether vLLM's own LoRA is enabled in an `AsyncLLM`."""
    return engine.vllm_config.lora_config is not None


def has_failed(output: Any) -> bool:
    """Whether the core has failed a request: what is known of it so far is `output`."""
    return any(completion.finish_reason == "error" for completion in output.outputs)


# `LoRARequest`: vLLM's way to say which adapter a request chooses.


@cache
def _our_request() -> Any:
    """The class of the `LoRARequest`s that we make. Their names are those of our adapters."""
    from vllm.lora.request import LoRARequest

    class LoReftRequest(LoRARequest):
        """Chooses a LoReFT adapter by its name."""

    return LoReftRequest


def make_lora_request(name: str, path_or_name: str) -> object:
    """A `LoRARequest` that means our adapter of this name. It never reaches vLLM's LoRA."""
    made: object = _our_request()(lora_name=name, lora_int_id=1, lora_path=path_or_name)
    return made


def names_adapter(lora_request: object) -> bool:
    """Whether `make_lora_request` made this `LoRARequest`."""
    return isinstance(lora_request, _our_request())


def read_lora_request(lora_request: Any) -> tuple[str, str, bool]:
    """The name and path in a `LoRARequest`, and whether it may replace the adapter that has the name."""
    return lora_request.lora_name, lora_request.lora_path, lora_request.load_inplace
