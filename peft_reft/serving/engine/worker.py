"""The worker (`Worker`), whose model runner is in `runners`.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.worker.gpu_worker.Worker`                        wrapped class                                        0.32
`Worker.load_model`                                       wrapped: hooks go into the model                     0.32
`Worker.vllm_config`                                      the engine's config                                  0.32
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`Worker.loreft_add`                                       method: load an adapter
`Worker.loreft_keep`                                      method: drop all adapters but some
`Worker.loreft_at_start`                                  method: the adapters that the options name
`Worker.loreft`                                           the worker's `Server`
`Module.loreft_edits`                                     the `Edits` of an edited module of the model
========================================================= ====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...patching import add_method, wrap


def extend_worker(load_model: Callable[..., Any], methods: Mapping[str, Callable[..., Any]]) -> None:
    """Wrap `Worker.load_model` and give `Worker` further methods."""
    from vllm.v1.worker.gpu_worker import Worker

    wrap(Worker, "load_model", load_model)
    for name, method in methods.items():
        add_method(Worker, name, method)


def config_of(worker: Any) -> object:
    """The config of a worker's engine."""
    found: object = worker.vllm_config
    return found
