"""The core (`EngineCore`), between front end and worker.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.engine.core.EngineCore`                          wrapped class                                        0.32
`vllm.v1.core.kv_cache_utils`                             module of the function below                         0.32
`vllm.v1.core.block_pool`                                 module that imports it                               0.32
`...kv_cache_utils.generate_block_hash_extra_keys`        wrapped: what is in a block's key but its tokens     0.32
`EngineCore.add_request`                                  wrapped: fails requests of dropped adapters          0.32
`EngineCore.model_executor`                               reaches the worker                                   0.32
`EngineCore.scheduler`                                    knows all requests                                   0.32
`EngineCore._send_error_outputs_to_client`                fails one request of a core in another process       0.32
`Executor.collective_rpc`                                 calls a method of the worker                         0.32
`Scheduler.requests`                                      waiting and running requests                         0.32
`Request.request_id`                                      names the request that fails                         0.32
`Request.client_index`                                    the client that is told                              0.32
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`EngineCore.loreft_add`                                   method: have the worker load an adapter
`EngineCore.loreft_remove`                                method: have the worker drop an adapter
`EngineCore.loreft_dropped`                               names of the adapters that were dropped
========================================================= ====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...patching import add_method, wrap


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
