"""What only a GPU can show of serving: graphs that are really captured. On a machine with one, in an environment with
`pip install -e ".[vllm,test]"`:

    python -m pytest tests/serving/on_gpu.py -W default -m "slow or not slow"

`VLLM_USE_V2_MODEL_RUNNER=0` before it takes vLLM's first model runner. test_graphs.py simulates the same on a CPU.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from peft_reft.serving import add_adapter
from serving.engines import ask, check, engine, params, prompt_of, steps

PROMPTS_ONLY = ["f7+l7", "l", "l~", "by position", "relu"]
MODES = ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL", "PIECEWISE"]


def captured(llama, mode, names, **loreft):
    """An engine that captures graphs. Without `names` it is the base, without the plugin."""
    settings = {} if names else {"additional_config": {}}
    if loreft:
        settings["loreft"] = loreft
    return engine(
        llama,
        names,
        enforce_eager=False,
        compilation_config={"cudagraph_mode": mode},
        gpu_memory_utilization=0.3,
        max_num_seqs=8,
        **settings,
    )


def kernels_of_a_decode_step(llm, name):
    """How many kernels run in a step that decodes one token of one request. Compiled ones have names of their own."""
    core = llm.llm_engine
    core.add_request("0", {"prompt_token_ids": prompt_of(20, 9)}, params(name, 12))
    for _ in range(4):
        core.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        core.step()
        torch.cuda.synchronize()
    while core.has_unfinished_requests():
        core.step()
    return sum(event.count for event in profiler.key_averages())


@pytest.mark.parametrize("mode", MODES)
def test_decode_graphs_hold_no_edits(llama, mode):
    """With adapters that edit prompts, a decode step has as many kernels as the base's; answers are transformers'."""
    assert torch.cuda.is_available(), "this file needs a GPU"
    with captured(llama, mode, []) as llm:
        base = kernels_of_a_decode_step(llm, None)
    with captured(llama, mode, PROMPTS_ONLY) as llm:
        assert kernels_of_a_decode_step(llm, "f7+l7") == base
        requests = [(prompt_of(5 + 9 * n, 30 + n), name) for n, name in enumerate([None, *PROMPTS_ONLY])]
        check(llama, requests, ask(llm, requests, 8), 8)
        check(llama, requests, steps(llm, requests, 8), 8)
        for seed, length in enumerate((33, 65, 97)):  # the last token alone, behind cached blocks
            prompt = prompt_of(length, 400 + seed)
            for name in (None, "l"):
                output = ask(llm, [(prompt, name)], 4)
                check(llama, [(prompt, name)], output, 4)
            assert output[0].num_cached_tokens == length - 1
        with pytest.raises(ValueError, match='"edit_answers": true'):
            add_adapter(llm, "g", llama.adapters["g"])


@pytest.mark.parametrize("mode", MODES)
def test_graphs_with_edits(llama, mode):
    names = [None, "f7+l7", "all", "g", "f+l+g", "by position, answers"]
    with captured(llama, mode, names) as llm:
        requests = [(prompt_of(5 + 9 * n, 30 + n), name) for n, name in enumerate(names)]
        check(llama, requests, ask(llm, requests, 8), 8)
        check(llama, requests, steps(llm, requests, 8), 8)
