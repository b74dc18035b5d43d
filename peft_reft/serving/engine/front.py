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
`InputProcessor.process_inputs`                           wrapped: refuses unknown names, adds block keys      0.28
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
`Namespace.api_server_count`                              several API servers are refused                      0.28
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`InputProcessor.loreft_adapters`                          from an adapter's name to its `BlockKeys`
========================================================= ====================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ...patching import wrap


def extend_front_end(init: Callable[..., Any], process_inputs: Callable[..., Any]) -> None:
    """Wrap `InputProcessor.__init__` and `InputProcessor.process_inputs`."""
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(InputProcessor, "__init__", init)
    wrap(InputProcessor, "process_inputs", process_inputs)


def wrap_beam_search(wrapper: Callable[..., Any]) -> None:
    """Wrap the method by which the OpenAI server reads the parameters of a beam search, `to_beam_search_params`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    wrap(ChatCompletionRequest, "to_beam_search_params", wrapper)
    wrap(CompletionRequest, "to_beam_search_params", wrapper)


def http_args(body: Any) -> Mapping[str, object]:
    """The `vllm_xargs` in the body of a request over HTTP."""
    given: Mapping[str, object] | None = body.vllm_xargs
    return given or {}


def invalid_request(message: str, parameter: str, value: object = None) -> Exception:
    """The exception that refuses one request (over HTTP: status 400) and leaves the engine running."""
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(message, parameter=parameter, value=value)
    return error


def processor_of(engine: object) -> object:
    """The input processor of an `LLM`, `LLMEngine` or `AsyncLLM`."""
    inner: Any = getattr(engine, "llm_engine", engine)
    found: object = inner.input_processor
    return found


def call_core(llm: Any, method: str, *args: object) -> Any:
    """Call a method of the core of an `LLM`. The core is in this process or, as a rule, in another."""
    client = llm.llm_engine.engine_core
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


def count_api_servers(args: object) -> int:
    """How many processes serve HTTP, by the arguments of `vllm serve`; 1 if they do not say."""
    count: int | None = getattr(args, "api_server_count", None)
    return 1 if count is None else count
