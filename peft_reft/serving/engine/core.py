"""The core (`EngineCore`), between front end and worker.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.engine.core.EngineCore`                          wrapped class                                        0.32
`vllm.v1.core.kv_cache_utils`                             module of the function below                         0.32
`vllm.v1.core.block_pool`                                 module that imports it                               0.32
`...kv_cache_utils.generate_block_hash_extra_keys`        wrapped: what is in a block's key but its tokens     0.32
`EngineCore._initialize_kv_caches`                        wrapped: notes what the workers have loaded          0.28
`EngineCore.preprocess_add_request`                       wrapped: writes into a request what its name means   0.32
`EngineCore.add_request`                                  wrapped: fails requests of dropped adapters          0.32
`EngineCore.vllm_config`                                  the engine's config                                  0.32
`EngineCore.model_executor`                               reaches the workers                                  0.32
`EngineCore.scheduler`                                    knows all requests                                   0.32
`EngineCore._send_error_outputs_to_client`                fails one request of a core in another process       0.32
`Executor.collective_rpc`                                 calls a method of the workers                        0.32
`Scheduler.requests`                                      waiting and running requests                         0.32
`Request.request_id`                                      names a request                                      0.32
`Request.client_index`                                    the client that is told                              0.32
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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...patching import add_method, wrap


def extend_core(
    start: Callable[..., Any],
    preprocess: Callable[..., Any],
    add_request: Callable[..., Any],
    block_keys: Callable[..., Any],
    methods: Mapping[str, Callable[..., Any]],
) -> None:
    """Wrap three methods of `EngineCore`, and what makes the keys of blocks; give `EngineCore` further methods."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    for module in (kv_cache_utils, block_pool):
        wrap(module, "generate_block_hash_extra_keys", block_keys)
    wrap(EngineCore, "_initialize_kv_caches", start)
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
