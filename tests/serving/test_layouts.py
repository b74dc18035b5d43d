"""Several workers, several cores, drafts: the answers are those of transformers, as with one worker."""

import asyncio
import os

import pytest
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from peft_reft.serving import (
    AdapterFiles,
    add_adapter,
    add_adapter_async,
    list_adapters,
    remove_adapter,
    remove_adapter_async,
)
from serving.engines import answer, ask, check, engine, padded, params, prompt_of, steps

NAMES = ["f7+l7", "f+l+g", "gN", "all", "by position", "per layer", "attention", "mlp", "by name", "red"]


@pytest.fixture
def two_workers(monkeypatch):
    """Two workers on one machine, which do not claim processors of their own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # An engine that was here before may have had vLLM keep what it read of the environment.
    monkeypatch.setattr("vllm.envs.VLLM_CPU_OMP_THREADS_BIND", "nobind", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_buffers(worker):
    """What vLLM's worker on a CPU leaves out if nothing is compiled: the buffers between the stages of a pipeline."""
    runner = worker.model_runner
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )


TENSORS = dict(tensor_parallel_size=2)
STAGES = dict(pipeline_parallel_size=2)
COMPILED = dict(enforce_eager=False)
TENSORS_CELL = pytest.mark.cell("Serving with vLLM", "several workers: tensor parallel")
STAGES_CELL = pytest.mark.cell("Serving with vLLM", "several workers: pipeline parallel")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(TENSORS, id="tensors", marks=[TENSORS_CELL, pytest.mark.slow]),
        pytest.param(STAGES, id="stages", marks=[STAGES_CELL, pytest.mark.slow]),
        pytest.param(COMPILED | TENSORS, id="tensors, compiled", marks=[TENSORS_CELL, pytest.mark.slow]),
        pytest.param(COMPILED | STAGES, id="stages, compiled", marks=[STAGES_CELL, pytest.mark.slow]),
    ],
)
def test_two_workers(llama, two_workers, layout):
    """Each tensor-parallel rank edits alike; each stage of a pipeline edits its own blocks. Adapters come and go."""
    llama.add("later", seed=50, positions="f1+l1", component="mlp")
    # vLLM has no such module; only the second stage of the pipeline has the block.
    llama.add("misfit", seed=51, positions="l1", target_modules=["model.layers.2.self_attn.q_proj"])
    with engine(llama, NAMES, loreft={"max_adapters": len(NAMES) + 1}, **layout) as llm:
        if layout is STAGES:
            llm.collective_rpc(make_buffers)
        requests = [(prompt_of(4 + 5 * n, n), name) for n, name in enumerate([None, *NAMES])]
        check(llama, requests, ask(llm, requests, 6), 6)
        check(llama, requests[::2], steps(llm, requests[::2], 6), 6)
        for _ in range(2):  # what one worker has loaded in vain takes no place
            with pytest.raises(ValueError, match="has no module of that name"):
                add_adapter(llm, "misfit", llama.adapters["misfit"])
        add_adapter(llm, "later", llama.adapters["later"])
        requests = [(prompt_of(30, 9), name) for name in ("later", "all", None)]
        check(llama, requests, ask(llm, requests, 6), 6)
        # Files that are sent, larger than a piece of the memory (24 MiB) by which vLLM's processes share messages.
        add_adapter(llm, "later", padded(llama.adapters["all"], 30_000_000), replace=True)
        requests = [(prompt_of(30, 9), "later"), (prompt_of(31, 9), "all"), (prompt_of(32, 9), "later")]
        check(llama, [(prompt, "all") for prompt, _ in requests], ask(llm, requests, 6), 6)
        remove_adapter(llm, "later")
        assert list_adapters(llm) == sorted(NAMES)


@pytest.mark.slow
def test_a_module_that_no_stage_has_is_refused_at_the_start(llama, two_workers):
    llama.add("misfit", seed=51, positions="l1", target_modules=["model.layers.2.self_attn.q_proj"])
    with pytest.raises(Exception, match=r"(?i)initialization failed|no module of that name"):  # noqa: SIM117
        with engine(llama, ["misfit"], **STAGES):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [3, 1])
@pytest.mark.cell("Serving with vLLM", "speculative decoding, drafts of n-grams")
def test_drafts(llama, drafts):
    """Drafts that are verified are edited as answers are; after others the next step counts as if they had not been.

    The second holds for adapters that count an answer's tokens (`gN`, weights by position). The worker has a process
    of its own: it compiles with numba, and in a process that has done so vLLM 0.32 on a CPU makes no other engine.
    """
    names = [None, *NAMES, "by position, answers", "p+g by group", "g", "gated"]
    settings = dict(method="ngram", num_speculative_tokens=drafts, prompt_lookup_max=2, prompt_lookup_min=1)
    adapters = [name for name in names if name]
    with engine(llama, adapters, speculative_config=settings, distributed_executor_backend="mp") as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        drafted, rows = [], []
        schedule = scheduler.schedule

        def note(*args, **kwargs):
            output = schedule(*args, **kwargs)
            drafted.extend(len(tokens) for tokens in output.scheduled_spec_decode_tokens.values())
            rows.extend(output.num_scheduled_tokens)
            return output

        scheduler.schedule = note
        # Prompts that repeat themselves, so that there is something to draft from.
        requests = [(prompt_of(4, n) * 3 + prompt_of(2 + n, 70 + n), name) for n, name in enumerate(names)]
        check(llama, requests, ask(llm, requests, 24), 24)
        accepted = 24 * len(names) - len(rows)
        assert 0 < accepted < sum(drafted)
        check(llama, requests[:6], steps(llm, requests[:6], 24), 24)


@pytest.mark.slow
@pytest.mark.cell("Serving with vLLM", "several workers: data parallel")
def test_two_cores(llama, two_workers, monkeypatch):
    """Data parallel: each core has the adapters, also those that are added and removed while the engine runs."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llama.add("later", seed=50, positions="f1+l1", component="mlp")
    names = ["f7+l7", "f+l+g", "all"]
    arguments = AsyncEngineArgs(
        model=llama.folder,
        data_parallel_size=2,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        block_size=32,
        seed=0,
        generation_config="vllm",
        additional_config={"loreft": {"adapters": {name: llama.adapters[name] for name in names}}},
    )

    async def one(engine, number, prompt, name, rank):
        given = {"prompt_token_ids": prompt}
        async for output in engine.generate(given, params(name, 6), f"{number}-{rank}", data_parallel_rank=rank):
            last = output
        assert answer(last.outputs[0])[0] == llama.expected(prompt, name, 6)[0], (name, rank)
        assert answer(last.outputs[0])[1] == pytest.approx(llama.expected(prompt, name, 6)[1], abs=2e-4), (name, rank)

    async def all_of(engine, tag, names):
        requests = [(f"{tag}{n}", prompt_of(9 + 8 * n, n), name) for n, name in enumerate(names)]
        await asyncio.gather(*(one(engine, *each, rank) for each in requests for rank in (0, 1)))

    async def run():
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            await all_of(engine, "a", [None, *names])
            await add_adapter_async(engine, "later", llama.adapters["later"])
            await all_of(engine, "b", ["later", None, "all"])
            await add_adapter_async(engine, "later", padded(llama.adapters["later"], 30_000_000), replace=True)
            await all_of(engine, "d", ["later", None, "all"])
            cut = AdapterFiles(b'{"peft_type": "LOREFT"}', b"cut")
            with pytest.raises(ValueError, match="damaged or cut short"):
                await add_adapter_async(engine, "later", cut, replace=True)
            assert list_adapters(engine) == sorted(["later", *names])
            await all_of(engine, "e", ["later"])
            broken = os.path.join(llama.folder, "nothing")
            with pytest.raises(ValueError, match="nothing"):
                await add_adapter_async(engine, "broken", broken)
            await remove_adapter_async(engine, "later")
            assert list_adapters(engine) == sorted(names)
            await all_of(engine, "c", names)
        finally:
            engine.shutdown()

    for name in [None, *names, "later"]:
        for n in range(4):
            llama.expected(prompt_of(9 + 8 * n, n), name, 6)
    asyncio.run(run())
