"""Everything of vLLM that the plugin touches. No other module imports vLLM or reads an attribute of its objects.

The other modules hold vLLM's objects as `object`, which mypy lets nobody look into, and hand them to the functions
below. vLLM is imported inside functions, because `peft_reft.serving` is imported without vLLM, too.

What is read, called or replaced (tests/test_engine_table.py compares this table with the code):

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.__version__`                                        untested versions are refused                        0.32
`vllm.v1.worker.gpu_worker.Worker`                        wrapped class                                        0.32
`vllm.v1.engine.core.EngineCore`                          wrapped class                                        0.32
`vllm.v1.engine.input_processor.InputProcessor`           wrapped class                                        0.32
`vllm.v1.core.kv_cache_utils`                             module of the function below                         0.32
`vllm.v1.core.block_pool`                                 module that imports it                               0.32
`...kv_cache_utils.generate_block_hash_extra_keys`        wrapped: what is in a block's key but its tokens     0.32
`...chat_completion.protocol.ChatCompletionRequest`       wrapped class (`vllm.entrypoints.openai`)            0.32
`...completion.protocol.CompletionRequest`                wrapped class (`vllm.entrypoints.openai`)            0.32
`vllm.exceptions.VLLMValidationError`                     refuses one request, with status 400 over HTTP       0.32
`vllm.forward_context.get_forward_context`                what the running step can name                       0.32
`ForwardContext.no_compile_layers`                        from a name in a compiled graph to our edits         0.32
`VllmConfig.additional_config`                            our options; part of the key of compiled graphs      0.32
`VllmConfig.model_config`                                 the parts of the config below                        0.32
`VllmConfig.parallel_config`                              the same                                             0.32
`VllmConfig.compilation_config`                           the same                                             0.32
`VllmConfig.speculative_config`                           speculative decoding is refused                      0.32
`VllmConfig.use_v2_model_runner`                          the second model runner is refused                   0.32
`ModelConfig.hf_config`                                   transformers' config of the model                    0.32
`ModelConfig.enforce_eager`                               whether the model is compiled                        0.32
`ModelConfig.runner_type`                                 models that do not generate are refused              0.32
`ModelConfig.is_encoder_decoder`                          encoder-decoders are refused                         0.32
`ModelConfig.model`                                       the model's name, for messages                       0.32
`ParallelConfig.tensor_parallel_size`                     several workers are refused                          0.32
`ParallelConfig.pipeline_parallel_size`                   the same                                             0.32
`ParallelConfig.data_parallel_size`                       the same                                             0.32
`ParallelConfig.enable_dbo`                               dual-batch overlap is refused                        0.32
`CompilationConfig.cudagraph_mode`                        whether steps are captured as graphs                 0.32
`CompilationConfig.static_forward_context`                holds what compiled graphs name                      0.32
`Worker.load_model`                                       wrapped: hooks go into the model                     0.32
`Worker.vllm_config`                                      the engine's config                                  0.32
`Worker.model_runner`                                     runs the model                                       0.32
`GPUModelRunner._model_forward`                           wrapped: each step is prepared                       0.32
`GPUModelRunner.get_model`                                the model that gets hooks                            0.32
`GPUModelRunner.device`                                   where the weights of adapters go                     0.32
`GPUModelRunner.max_num_tokens`                           size of buffers that captured graphs read            0.32
`GPUModelRunner.input_batch`                              the requests of a step                               0.32
`GPUModelRunner.requests`                                 from a request's id to what it was given             0.32
`GPUModelRunner.query_start_loc`                          where each request's tokens begin in a step          0.32
`CpuGpuBuffer.np`                                         `query_start_loc` as an array                        0.32
`InputBatch.num_reqs`                                     number of requests in a step                         0.32
`InputBatch.req_ids`                                      their ids                                            0.32
`InputBatch.num_computed_tokens_cpu`                      how many tokens of each came in earlier steps        0.32
`InputBatch.num_prompt_tokens`                            how many tokens each was given                       0.32
`EngineCore.add_request`                                  wrapped: fails requests of dropped adapters          0.32
`EngineCore.model_executor`                               reaches the worker                                   0.32
`EngineCore.scheduler`                                    knows all requests                                   0.32
`EngineCore._send_error_outputs_to_client`                fails one request of a core in another process       0.32
`Executor.collective_rpc`                                 calls a method of the worker                         0.32
`Scheduler.requests`                                      waiting and running requests                         0.32
`Request.request_id`                                      names the request that fails                         0.32
`Request.client_index`                                    the client that is told                              0.32
`Request.sampling_params`                                 holds `extra_args`; also of CachedRequestState       0.32
`SamplingParams.extra_args`                               names the adapter                                    0.32
`EngineCoreRequest.prompt_token_ids`                      finds prompts and answers; CachedRequestState too    0.32
`EngineCoreRequest.prompt_embeds`                         the same, for requests without token ids             0.32
`EngineCoreRequest.resumable`                             requests that go on with more input are refused      0.32
`InputProcessor.__init__`                                 wrapped: the front end learns the adapters' names    0.32
`InputProcessor.process_inputs`                           wrapped: refuses unknown names, adds block keys      0.32
`LLM.llm_engine`                                          reaches the two below                                0.32
`LLMEngine.input_processor`                               knows the adapters' names; also of AsyncLLM          0.32
`LLMEngine.engine_core`                                   client of the core; also of AsyncLLM                 0.32
`InprocClient.engine_core`                                the core itself, if it is in this process            0.32
`SyncMPClient.call_utility`                               calls a method of the core in another process        0.32
`AsyncMPClient.call_utility_async`                        the same for AsyncLLM                                0.32
`ChatCompletionRequest.to_beam_search_params`             wrapped: refuses beams with an adapter               0.32
`CompletionRequest.to_beam_search_params`                 the same                                             0.32
`ChatCompletionRequest.vllm_xargs`                        names the adapter over HTTP; CompletionRequest too   0.32
`Namespace.api_server_count`                              several API servers are refused                      0.32
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`Worker.loreft_add`                                       method: load an adapter
`Worker.loreft_remove`                                    method: drop an adapter
`Worker.loreft`                                           the worker's `Server`
`CachedRequestState.loreft_answers`                       where the answers in a request are
`EngineCore.loreft_add`                                   method: have the worker load an adapter
`EngineCore.loreft_remove`                                method: have the worker drop an adapter
`EngineCore.loreft_dropped`                               names of the adapters that were dropped
`InputProcessor.loreft_adapters`                          from an adapter's name to its `BlockKeys`
`Request.loreft_map`                                      which of a request's tokens are edited
`Module.loreft_edits`                                     the `Edits` of an edited module of the model
========================================================= ====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..patching import add_method, wrap
from .options import KEY

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests have run with."""


def check_version() -> None:
    """Raise RuntimeError if this version of vLLM was not tested."""
    import vllm

    if vllm.__version__.split("+")[0] not in TESTED:
        raise RuntimeError(
            f"peft_reft {version('peft-reft')} serves LoReFT with vLLM {', '.join(TESTED)}, not {vllm.__version__}."
        )


# Our own attributes of vLLM's objects.


def keep(owner: object, name: str, value: object) -> None:
    """Keep a value of ours on one of vLLM's objects, for as long as that object lives."""
    setattr(owner, name, value)


def kept(owner: object, name: str) -> Any:
    """What `keep` put there; None if it put nothing there."""
    return vars(owner).get(name)


# The engine's config (`VllmConfig`).


def additional_config(config: Any) -> object:
    """What the user passed as `additional_config`."""
    return config.additional_config


def add_to_graph_key(config: Any, name: str, value: object) -> None:
    """Make `value` part of the key that compiled graphs are kept by on disk."""
    config.additional_config = {**config.additional_config, name: value}


def transformers_config(config: Any) -> Any:
    """The model's config as transformers reads it."""
    return config.model_config.hf_config


def compiles(config: Any) -> bool:
    """Whether the engine compiles the model."""
    return not config.model_config.enforce_eager


def captures_graphs(config: Any) -> bool:
    """Whether the engine captures its steps as graphs."""
    mode: str = config.compilation_config.cudagraph_mode.name
    return mode != "NONE"


def named_in_graphs(config: Any) -> dict[str, Any]:
    """Objects that compiled graphs can name. What is added here, `find_named` finds while a step runs."""
    found: dict[str, Any] = config.compilation_config.static_forward_context
    return found


def find_named(name: str) -> Any:
    """The object that a compiled graph means by `name`, while a step runs."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[name]


def check_engine(config: Any) -> None:
    """Raise ValueError if the engine does something that LoReFT does not support, or was not tested with."""
    parallel = config.parallel_config
    model = config.model_config
    sizes = {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            raise ValueError(f"{name}={size}: one worker serves LoReFT (allowed: 1).")
    if parallel.enable_dbo:
        raise ValueError("enable_dbo=True: LoReFT needs each step in one batch (allowed: False).")
    if config.speculative_config is not None:
        raise ValueError("speculative_config is set: LoReFT does not support speculative decoding (allowed: None).")
    if model.is_encoder_decoder:
        raise ValueError(f"{model.model} is an encoder-decoder: LoReFT is served with decoder-only models.")
    if model.runner_type != "generate":
        raise ValueError(f"{model.model} is run as {model.runner_type!r}: LoReFT is served with models that generate.")
    if config.use_v2_model_runner:
        raise ValueError("LoReFT is served with vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0.")


# The worker (`Worker`) and its model runner (`GPUModelRunner`).


def extend_worker(load_model: Callable[..., Any], add: Callable[..., Any], remove: Callable[..., Any]) -> None:
    """Wrap `Worker.load_model` and give `Worker` the methods `loreft_add` and `loreft_remove`."""
    from vllm.v1.worker.gpu_worker import Worker

    wrap(Worker, "load_model", load_model)
    add_method(Worker, "loreft_add", add)
    add_method(Worker, "loreft_remove", remove)


def config_of(worker: Any) -> object:
    """The config of a worker's engine."""
    found: object = worker.vllm_config
    return found


def runner_of(worker: Any) -> object:
    """The model runner of a worker."""
    found: object = worker.model_runner
    return found


def model_of(runner: Any) -> nn.Module:
    """The model that a runner has loaded."""
    model: nn.Module = runner.get_model()
    return model


def device_of(runner: Any) -> torch.device:
    """The device that a runner computes on."""
    return torch.device(runner.device)


def most_tokens(runner: Any) -> int:
    """The largest number of tokens in a step."""
    tokens: int = runner.max_num_tokens
    return tokens


def wrap_forward(runner: object, wrapper: Callable[..., Any]) -> None:
    """Have every step of a runner call `wrapper(forward, *args)` instead of its forward."""
    wrap(runner, "_model_forward", wrapper)


@dataclass(frozen=True)
class Step:
    """The n requests of a step."""

    requests: Sequence[object]
    starts: NDArray[np.int64]
    """(n + 1,) index in the step of each request's first token, and the number of tokens in the step."""
    computed: NDArray[np.int64]
    """(n,) how many tokens of each request came in earlier steps."""
    given: NDArray[np.int64]
    """(n,) how many tokens each request was given."""


def requests_of_step(runner: Any) -> Step:
    """The requests of the step that a model runner is about to run."""
    batch = runner.input_batch
    n = batch.num_reqs
    return Step(
        requests=[runner.requests[request_id] for request_id in batch.req_ids[:n]],
        starts=runner.query_start_loc.np[: n + 1].astype(np.int64),
        computed=batch.num_computed_tokens_cpu[:n].astype(np.int64),
        given=batch.num_prompt_tokens[:n].astype(np.int64),
    )


# The core (`EngineCore`), between front end and worker.


def extend_core(
    add_request: Callable[..., Any],
    add: Callable[..., Any],
    remove: Callable[..., Any],
    block_keys: Callable[..., Any],
) -> None:
    """Wrap `EngineCore.add_request` and what makes the keys of blocks; give `EngineCore` two methods.

    The methods are `loreft_add` and `loreft_remove`.
    """
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    for module in (kv_cache_utils, block_pool):
        wrap(module, "generate_block_hash_extra_keys", block_keys)
    wrap(EngineCore, "add_request", add_request)
    add_method(EngineCore, "loreft_add", add)
    add_method(EngineCore, "loreft_remove", remove)


def call_worker(core: Any, method: str, *args: object) -> Any:
    """Call a method of the core's only worker."""
    return core.model_executor.collective_rpc(method, args=args)[0]


def requests_of_core(core: Any) -> Iterable[object]:
    """All requests that wait or run. The worker does not know of those that wait."""
    requests: Mapping[str, object] = core.scheduler.requests
    return requests.values()


def fail_request(core: Any, request: Any) -> bool:
    """Tell the client that its request has failed. False if core and client are in one process: raise there."""
    if not hasattr(core, "_send_error_outputs_to_client"):
        return False
    core._send_error_outputs_to_client([request.request_id], request.client_index)
    return True


# A request, as front end, core or worker hold it.


def extra_args(params: object) -> Mapping[str, Any]:
    """The `extra_args` of sampling parameters; empty for other parameters, such as those of a pooling model."""
    return getattr(params, "extra_args", None) or {}


def adapter_of(request: Any) -> str | None:
    """The name of the adapter that a request has chosen, None for the base model."""
    return extra_args(request.sampling_params).get(KEY)


def token_ids(request: Any) -> Sequence[int] | None:
    """The token ids that a request was given; None if some of what it was given are embeddings."""
    if request.prompt_embeds is not None:
        return None
    ids: Sequence[int] = request.prompt_token_ids
    return ids


def given_length(request: Any) -> int:
    """How many tokens or embeddings a request was given."""
    ids = token_ids(request)
    return len(request.prompt_embeds if ids is None else ids)


def params_of(request: Any) -> object:
    """The sampling parameters of a request; None for a pooling model's."""
    params: object = request.sampling_params
    return params


def add_extra_args(request: Any, more: Mapping[str, object]) -> None:
    """Give a request further `extra_args`. Its parameters are a copy of the user's."""
    request.sampling_params.extra_args = {**extra_args(request.sampling_params), **more}


def is_session(request: Any) -> bool:
    """Whether more input may be added to a request while it runs."""
    resumable: bool = request.resumable
    return resumable


# The front end (`LLM`, `LLMEngine`, `AsyncLLM`), the OpenAI server.


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
    """Call a method of the core of an `AsyncLLM`."""
    return await engine.engine_core.call_utility_async(method, *args)


def count_api_servers(args: object) -> int:
    """How many processes serve HTTP, by the arguments of `vllm serve`; 1 if they do not say."""
    count: int | None = getattr(args, "api_server_count", None)
    return 1 if count is None else count
