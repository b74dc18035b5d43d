"""The worker (`Worker`), whose model runner is in `runners`.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.worker.gpu_worker.Worker`                        wrapped class                                        0.28
`vllm.model_executor.models.utils.PPMissingLayer`         stands for a block of another pipeline stage         0.28
`Worker.load_model`                                       wrapped: hooks go into the model                     0.28
`Worker.vllm_config`                                      the engine's config                                  0.28
`RowParallelLinear.input_size_per_partition`              its share of a linear map's input (tensor parallel)  0.28
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`Worker.loreft_begin_check`                               method: begin the self-check
`Worker.loreft_end_check`                                 method: end it
`Worker.loreft_check`                                     the `SelfCheck` that is running
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

from torch import nn

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


def is_placeholder(module: nn.Module) -> bool:
    """Whether a module stands for one that another stage of a pipeline holds."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(module, PPMissingLayer)


def share_of_input(module: nn.Module) -> int | None:
    """Size of what this worker gives a linear map that several workers share; None if they do not share its input."""
    size: int | None = getattr(module, "input_size_per_partition", None)
    return size
