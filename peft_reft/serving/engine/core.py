"""The core (`EngineCore`), between front end and worker.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.engine.core.EngineCore`                          wrapped class                                        0.28
`vllm.v1.engine.core.EngineCoreProc`                      wrapped class: a core in a process of its own        0.28
`vllm.v1.engine.core.DPEngineCoreProc`                    the same, one of several                             0.28
`EngineCoreProc.run_busy_loop`                            wrapped: the same                                    0.28
`vllm.v1.core.kv_cache_utils`                             module of the function below                         0.28
`vllm.v1.core.block_pool`                                 module that imports it                               0.28
`...kv_cache_utils.generate_block_hash_extra_keys`        wrapped: what is in a block's key but its tokens     0.28
`EngineCore._initialize_kv_caches`                        wrapped: notes what the workers have loaded          0.28
`EngineCore.__init__`                                     wrapped: see `EngineCore.step_fn`                    0.28
`EngineCore.preprocess_add_request`                       wrapped: writes into a request what its name means   0.28
`EngineCore.add_request`                                  wrapped: fails requests of dropped adapters          0.28
`EngineCore.vllm_config`                                  the engine's config                                  0.28
`EngineCore.model_executor`                               reaches the workers                                  0.28
`EngineCore.scheduler`                                    knows all requests                                   0.28
`EngineCore._send_error_outputs_to_client`                fails one request of a core in another process       0.28
`Executor.collective_rpc`                                 calls a method of the workers                        0.28
`Scheduler.requests`                                      waiting and running requests                         0.28
`EngineCore.step_fn`                                      runs the requests of the self-check                  0.28
`EngineCore.batch_queue`                                  steps that have begun                                0.28
`Scheduler.has_requests`                                  whether they still run                               0.28
`vllm.v1.engine.EngineCoreRequest`                        one of them                                          0.28
`vllm.SamplingParams`                                     its parameters                                       0.28
`VllmConfig.cache_config`                                 its `block_size`                                     0.28
`VllmConfig.model_config`                                 its `max_model_len`                                  0.28
`CacheConfig.block_size`                                  tokens in a cached block                             0.28
`ModelConfig.max_model_len`                               most tokens of a request                             0.28
`Request.block_hashes`                                    the keys of its cached blocks                        0.28
`Request.request_id`                                      names a request                                      0.28
`Request.client_index`                                    the client that is told                              0.28
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`EngineCore.loreft_add`                                   method: have the workers load an adapter
`EngineCore.loreft_remove`                                method: drop an adapter
`EngineCore.loreft_list`                                  method: all adapters
`EngineCore.loreft`                                       the core's `Adapters`
========================================================= ====================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...patching import add_method, wrap


def extend_core(
    start: Callable[..., Any],
    init: Callable[..., Any],
    run_loop: Callable[..., Any],
    preprocess: Callable[..., Any],
    add_request: Callable[..., Any],
    block_keys: Callable[..., Any],
    methods: Mapping[str, Callable[..., Any]],
) -> None:
    """Wrap methods of `EngineCore`, and what makes the keys of blocks; give `EngineCore` further methods."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc

    for module in (kv_cache_utils, block_pool):
        wrap(module, "generate_block_hash_extra_keys", block_keys)
    wrap(EngineCore, "_initialize_kv_caches", start)
    wrap(EngineCore, "__init__", init)
    for owner in (EngineCoreProc, DPEngineCoreProc):
        wrap(owner, "run_busy_loop", run_loop)
    wrap(EngineCore, "preprocess_add_request", preprocess)
    wrap(EngineCore, "add_request", add_request)
    for name, method in methods.items():
        add_method(EngineCore, name, method)


def config_of_core(core: Any) -> object:
    """The config of a core's engine."""
    found: object = core.vllm_config
    return found


def call_workers(core: Any, method: str, *args: object) -> list[Any]:
    """Call a method of all workers of a core. Returns the answer of each."""
    answers: list[Any] = core.model_executor.collective_rpc(method, args=args)
    return answers


def block_size(core: Any) -> int:
    """How many tokens a cached block has."""
    size: int = core.vllm_config.cache_config.block_size
    return size


def most_tokens_of_request(core: Any) -> int:
    """How many tokens the prompt and the answer of a request may have together."""
    tokens: int = core.vllm_config.model_config.max_model_len
    return tokens


def make_request(core: Any, name: str, ids: list[int], tokens: int, more: Mapping[str, object]) -> object:
    """A request that no client has sent (`selfcheck`).

    Args:
        core: vLLM's `EngineCore`.
        name: its id.
        ids: the token ids of its prompt.
        tokens: how many it generates, each of them the first token of its prompt.
        more: its `extra_args`.
    """
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        allowed_token_ids=ids[:1],
        extra_args=dict(more),
    )
    sent = EngineCoreRequest(
        request_id=name,
        prompt_token_ids=ids,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request, _ = core.preprocess_add_request(sent)
    found: object = request
    return found


def run_requests(core: Any, requests: Sequence[object]) -> None:
    """Run requests in one batch, and drop their outputs."""
    from vllm.v1.engine.core import EngineCore

    for request in requests:
        # Not the method of a subclass, which is not complete when its base is.
        EngineCore.add_request(core, request)
    while core.scheduler.has_requests() or core.batch_queue:
        core.step_fn()


def keys_of_blocks(request: Any) -> Sequence[object]:
    """The keys of the cached blocks of a request's prompt."""
    keys: Sequence[object] = request.block_hashes
    return keys


def requests_of_core(core: Any) -> Iterable[object]:
    """All requests that wait or run. The worker does not know of those that wait."""
    requests: Mapping[str, object] = core.scheduler.requests
    return requests.values()


def id_of(request: Any) -> str:
    """The id of a request."""
    found: str = request.request_id
    return found


def fail_request(core: Any, request: Any) -> bool:
    """Tell the client that its request has failed. False if core and client are in one process: raise there."""
    if not hasattr(core, "_send_error_outputs_to_client"):
        return False
    core._send_error_outputs_to_client([request.request_id], request.client_index)
    return True
