"""The two model runners of vLLM, both called `GPUModelRunner`, behind one interface.

The first is in `vllm.v1.worker.gpu_model_runner`. The second is in `vllm.v1.worker.gpu.model_runner`; vLLM takes it by
default where Triton runs, that is, on GPUs.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`Worker.model_runner`                                     the worker's model runner                            0.28
`GPUModelRunner.get_model`                                the model that gets hooks                            0.28
`GPUModelRunner.device`                                   where the weights of adapters go                     0.28
`GPUModelRunner.max_num_tokens`                           size of buffers that captured graphs read            0.28
========================================================= ==================================================== =====

Of the first:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`GPUModelRunner._determine_batch_execution_and_padding`   wrapped: each step is prepared, and may avoid graphs 0.32
`GPUModelRunner._model_forward`                           wrapped: ends the step                               0.28
`GPUModelRunner.input_batch`                              the requests of a step                               0.28
`GPUModelRunner.requests`                                 from a request's id to what it was given             0.28
`GPUModelRunner.query_start_loc`                          where each request's tokens begin in a step          0.28
`CpuGpuBuffer.np`                                         `query_start_loc` as an array                        0.28
`InputBatch.num_reqs`                                     number of requests in a step                         0.28
`InputBatch.req_ids`                                      their ids                                            0.28
`InputBatch.num_computed_tokens_cpu`                      how many tokens of each came in earlier steps        0.28
`InputBatch.num_prompt_tokens`                            how many tokens each was given                       0.28
========================================================= ==================================================== =====

Of the second:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.v1.worker.gpu.model_runner`                         module of the function below                         0.28
`...gpu.model_runner.dispatch_cg_and_sync_dp`             wrapped: a step may avoid graphs                     0.28
`GPUModelRunner.gather_batch_req_state`                   wrapped: each step is prepared                       0.28
`GPUModelRunner.execute_model`                            wrapped: ends the step                               0.28
`GPUModelRunner.cudagraph_manager`                        holds our note about the running step                0.28
`GPUModelRunner.max_num_reqs`                             number of a runner's places for requests             0.28
`GPUModelRunner.model_state`                              the object of the method below                       0.28
`ModelState.add_request`                                  wrapped: what each request was given is kept         0.28
`GPUModelRunner.req_states`                               the arrays below; the first runner has none          0.28
`RequestState.num_computed_tokens_np`                     how many tokens of each came in earlier steps        0.28
`RequestState.prompt_len`                                 how many tokens each was given                       0.28
`UvaBackedTensor.np`                                      `prompt_len` as an array                             0.28
`BatchReqState.idx_mapping_np`                            the places of the requests of a step                 0.28
`BatchReqState.num_scheduled_tokens`                      how many tokens each has in it                       0.28
`BatchExecutionDescriptor.cg_mode`                        whether the step runs in a graph                     0.28
========================================================= ==================================================== =====

What is added to vLLM's objects:

========================================================= ====================================================
attribute                                                 what it is
========================================================= ====================================================
`ModelCudaGraphManager.loreft_avoids_graphs`              whether the running step must run without a graph
========================================================= ====================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...patching import wrap
from .request import keep, kept


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


Begin = Callable[[Step], bool]
"""Prepares a step, and returns whether it must run without a captured graph."""


class Runner(ABC):
    """What the plugin uses of a model runner.

    A step must have been prepared before vLLM chooses the graph that it runs in. All ranks of a layout prepare the
    same steps, so they choose alike.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    @property
    def loaded_model(self) -> nn.Module:
        """The model that the runner has loaded."""
        model: nn.Module = self.runner.get_model()
        return model

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return torch.device(self.runner.device)

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens in a step."""
        tokens: int = self.runner.max_num_tokens
        return tokens

    @abstractmethod
    def wrap_steps(self, begin: Begin, end: Callable[[], None]) -> None:
        """Have every step call `begin` before vLLM chooses its graph, and `end` behind it.

        Warm-up, dummy and capture runs call neither.
        """


class FirstRunner(Runner):
    """The first model runner."""

    def wrap_steps(self, begin: Begin, end: Callable[[], None]) -> None:
        """See `Runner`."""

        def choose(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("force_uniform_decode") is not None:  # dummy runs say what they are
                return inner(*args, **kwargs)
            avoids_graphs = begin(self._step())
            chosen = inner(*args, **{**kwargs, "force_eager": avoids_graphs})
            if avoids_graphs:
                _check_mode(chosen[0])
            return chosen

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            finally:
                end()

        wrap(self.runner, "_determine_batch_execution_and_padding", choose)
        wrap(self.runner, "_model_forward", forward)

    def _step(self) -> Step:
        """The requests of the step that is about to run."""
        batch = self.runner.input_batch
        n = batch.num_reqs
        return Step(
            requests=[self.runner.requests[request_id] for request_id in batch.req_ids[:n]],
            starts=self.runner.query_start_loc.np[: n + 1].astype(np.int64),
            computed=batch.num_computed_tokens_cpu[:n].astype(np.int64),
            given=batch.num_prompt_tokens[:n].astype(np.int64),
        )


class SecondRunner(Runner):
    """The second model runner."""

    def wrap_steps(self, begin: Begin, end: Callable[[], None]) -> None:
        """See `Runner`."""
        from vllm.v1.worker.gpu import model_runner

        requests: list[object] = [None] * self.runner.max_num_reqs  # by its place; a preempted one gets a new place

        def add_request(inner: Callable[..., None], place: int, request: object) -> None:
            requests[place] = request
            inner(place, request)

        def gather(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            batch, uniform = inner(*args, **kwargs)
            avoids_graphs = batch is not None and begin(self._step(batch, requests))  # dummy runs have no batch
            manager = self.runner.cudagraph_manager
            if manager is not None:  # there is none while memory is profiled
                keep(manager, "loreft_avoids_graphs", avoids_graphs)
            return batch, uniform

        def execute(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            finally:
                end()

        wrap(model_runner, "dispatch_cg_and_sync_dp", _dispatch)
        wrap(self.runner.model_state, "add_request", add_request)
        wrap(self.runner, "gather_batch_req_state", gather)
        wrap(self.runner, "execute_model", execute)

    def _step(self, batch: Any, requests: Sequence[object]) -> Step:
        """The requests of the step that is about to run.

        `prompt_len` is what the user gave. The runner's `prefill_len` also counts tokens that were generated before a
        request was preempted.
        """
        places = batch.idx_mapping_np
        states = self.runner.req_states
        return Step(
            requests=[requests[place] for place in places],
            starts=np.concatenate([[0], np.cumsum(batch.num_scheduled_tokens, dtype=np.int64)]),
            computed=states.num_computed_tokens_np[places].astype(np.int64),
            given=states.prompt_len.np[places].astype(np.int64),
        )


def _dispatch(inner: Callable[..., Any], manager: object, *args: Any, **kwargs: Any) -> Any:
    """Choose the graph of a step (`dispatch_cg_and_sync_dp`); none if the step must run without one."""
    avoids_graphs = manager is not None and kept(manager, "loreft_avoids_graphs")
    if not avoids_graphs:
        return inner(manager, *args, **kwargs)
    chosen = inner(manager, *args, **{**kwargs, "need_eager": True})
    _check_mode(chosen[0].cg_mode)
    return chosen


def _check_mode(mode: Any) -> None:
    """Raise RuntimeError if a step that must run without a captured graph was given one: it would lose its edits."""
    if mode.name != "NONE":
        raise RuntimeError(f"vLLM runs a step in a graph ({mode.name}) that LoReFT has kept out of graphs.")


def runner_of(worker: Any) -> Runner:
    """The model runner of a worker."""
    runner = worker.model_runner
    return SecondRunner(runner) if hasattr(runner, "req_states") else FirstRunner(runner)
