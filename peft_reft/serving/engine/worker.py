"""The worker (`Worker`) and its model runner (`GPUModelRunner`).

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.worker.gpu_worker.Worker`                        wrapped class                                        0.28
`vllm.model_executor.models.utils.PPMissingLayer`         stands for a block of another pipeline stage         0.28
`Worker.load_model`                                       wrapped: hooks go into the model                     0.28
`Worker.vllm_config`                                      the engine's config                                  0.28
`Worker.model_runner`                                     runs the model                                       0.28
`GPUModelRunner._model_forward`                           wrapped: each step is prepared                       0.28
`GPUModelRunner.get_model`                                the model that gets hooks                            0.28
`GPUModelRunner.device`                                   where the weights of adapters go                     0.28
`GPUModelRunner.max_num_tokens`                           size of buffers that captured graphs read            0.28
`GPUModelRunner.input_batch`                              the requests of a step                               0.28
`GPUModelRunner.requests`                                 from a request's id to what it was given             0.28
`GPUModelRunner.query_start_loc`                          where each request's tokens begin in a step          0.28
`CpuGpuBuffer.np`                                         `query_start_loc` as an array                        0.28
`InputBatch.num_reqs`                                     number of requests in a step                         0.28
`InputBatch.req_ids`                                      their ids                                            0.28
`InputBatch.num_computed_tokens_cpu`                      how many tokens of each came in earlier steps        0.28
`InputBatch.num_prompt_tokens`                            how many tokens each was given                       0.28
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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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


def runner_of(worker: Any) -> object:
    """The model runner of a worker."""
    found: object = worker.model_runner
    return found


def model_of(runner: Any) -> nn.Module:
    """The model that a runner has loaded."""
    model: nn.Module = runner.get_model()
    return model


def is_placeholder(module: nn.Module) -> bool:
    """Whether a module stands for one that another stage of a pipeline holds."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(module, PPMissingLayer)


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
