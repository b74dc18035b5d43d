"""Graphs that hold no edits: steps that edit tokens run without them. What a GPU captures is simulated here.

A step that vLLM runs in a graph runs its operations here as they would have been captured: without the step's own
edits. `record` notes the operations of each step, and whether it ran in a graph.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from peft_reft.serving import add_adapter
from serving.engines import SECOND_RUNNER, ask, check, engine, prompt_of, steps

PROMPTS_ONLY = ["f7+l7", "l", "l~", "by position", "mlp of prompts"]


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Have vLLM choose a graph for every step that it may run in one."""
    monkeypatch.setattr("peft_reft.serving.worker.captures_graphs", lambda config: True)
    monkeypatch.setattr("peft_reft.serving.edits.is_capturing", lambda hidden: in_graph())

    def first(self, num_tokens, uniform_decode=False, *, valid_modes=None, **kwargs):
        if valid_modes == {CUDAGraphMode.NONE}:
            return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)
        mode = CUDAGraphMode.FULL if uniform_decode else CUDAGraphMode.PIECEWISE
        return mode, BatchDescriptor(num_tokens, uniform=uniform_decode)

    monkeypatch.setattr(CudagraphDispatcher, "dispatch", first)
    if SECOND_RUNNER:
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

        def second(self, num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len=None, **kwargs):
            return BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, num_tokens, num_reqs=None)

        monkeypatch.setattr(CudaGraphManager, "dispatch", second)


def in_graph():
    return get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.NONE


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def record(llm):
    """A list that grows by (ran in a graph, tokens, operations) with each step."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    recorded, running = [], []

    def begin(module, args, kwargs):
        running.append(Operations())
        running[-1].__enter__()

    def end(module, args, kwargs, output):
        operations = running.pop()
        operations.__exit__(None, None, None)
        recorded.append((in_graph(), len(kwargs["positions"]), operations.names))

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def test_a_decode_step_has_the_operations_of_the_base(llama):
    """With adapters that edit prompts. All their decode steps run in graphs, and no step that edits."""
    llama.add("mlp of prompts", positions="f2+l2", component="mlp", seed=50)
    requests = [(prompt_of(4 + 5 * n, n), name) for n, name in enumerate([None, *PROMPTS_ONLY])]
    with engine(llama, additional_config={}) as llm, record(llm) as base:
        ask(llm, requests[:1], 4)
        ask(llm, [(prompt, None) for prompt, _ in requests], 6)
    decoded = {tokens: names for graph, tokens, names in base if tokens in (1, len(requests))}
    with engine(llama, PROMPTS_ONLY) as llm, record(llm) as ours:
        check(llama, requests[1:2], ask(llm, requests[1:2], 4), 4)
        check(llama, requests, ask(llm, requests, 6), 6)
    assert [graph for graph, _, _ in ours] == [False] + [True] * 3 + [False] + [True] * 5
    for graph, tokens, names in ours:
        assert (names == decoded.get(tokens)) is graph  # a step that edits has more


def test_the_last_token_of_a_prompt_alone(llama):
    """Behind a cache hit, a prompt of n blocks and one token is scheduled as a decode is, but its step edits."""
    lengths = (33, 65, 97, 129)
    with engine(llama, ["l", "f7+l7"]) as llm, record(llm) as recorded:
        for seed, length in enumerate(lengths):
            prompt = prompt_of(length, 400 + seed)
            ask(llm, [(prompt, None)], 1)
            recorded.clear()
            output = ask(llm, [(prompt, "l")], 4)
            check(llama, [(prompt, "l")], output, 4)
            assert output[0].num_cached_tokens == length - 1
            assert [(graph, tokens) for graph, tokens, _ in recorded] == [(False, 1)] + [(True, 1)] * 3
        # The same beside requests that decode: all of them have one token in that step.
        prompts = [prompt_of(length, 400 + seed) for seed, length in enumerate(lengths)]
        for waiting in ([None, "f7+l7"], ["l", None], ["l", "l"]):
            requests = [(prompts[0], None), (prompts[1], "l"), *zip(prompts[2:], waiting)]
            check(llama, requests, steps(llm, requests, 6), 6)


@pytest.mark.slow
def test_steps_that_mix_prompts_and_answers(llama):
    names = [None, *[name for name in PROMPTS_ONLY if name in llama.adapters], None]
    requests = [(prompt_of(5 + 9 * n, 30 + n), name) for n, name in enumerate(names)]
    with engine(llama, names, max_num_batched_tokens=16, max_num_seqs=4) as llm, record(llm) as recorded:
        check(llama, requests, steps(llm, requests, 8), 8)
    mixed = [graph for graph, tokens, _ in recorded if tokens > 4]
    assert True in mixed and False in mixed  # chunks between prefix and suffix edit nothing


@pytest.mark.slow
def test_adapters_that_edit_answers_are_declared(llama):
    with engine(llama, ["l"]) as llm:
        with pytest.raises(ValueError, match='"edit_answers": true'):
            add_adapter(llm, "g", llama.adapters["g"])
        add_adapter(llm, "relu", llama.adapters["relu"])  # graphs without edits take every formula
        request = (prompt_of(20, 1), "relu")
        check(llama, [request], ask(llm, [request], 4), 4)
    names = [None, "l", "all", "g", "f+l+g"]
    requests = [(prompt_of(5 + 9 * n, 30 + n), name) for n, name in enumerate(names)]
    with engine(llama, ["l"], loreft={"edit_answers": True, "max_positions": 3}) as llm, record(llm) as recorded:
        for name in names[2:]:
            add_adapter(llm, name, llama.adapters[name])
        check(llama, requests, steps(llm, requests, 6), 6)
    assert all(graph for graph, _, _ in recorded)
