"""Engines with different scheduling, caching and compilation give the answers of transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from vllm.lora.request import LoRARequest

from serving.engines import (
    FAMILIES,
    answer,
    ask,
    check,
    engine,
    fields,
    make,
    note_preempted,
    params,
    prompt_of,
    quick_alone,
    steps,
)

COMMON = ["f7+l7", "f+l+g", "all", "by position", "per layer", "red"]


@pytest.mark.parametrize("budget", quick_alone([7], [4, 7, 13]))
def test_chunked_prefill(llama, budget):
    """Budgets cut inside the prefix, inside the suffix and between them, at another token in each request."""
    names = [None, "f7+l7", "by position", "l~", "f+l+g", "per layer", "p", "all", "mlp", "one for all layers"]
    with engine(llama, names, max_num_batched_tokens=budget, max_num_seqs=3) as llm:
        requests = [(prompt_of(9 + n, n), name) for n, name in enumerate(names)]
        check(llama, requests, ask(llm, requests, 6), 6)


def test_prefix_cache_is_kept_apart(llama):
    """One prompt is sent with two adapters and the base in turn, twice: none reads a block of another."""
    names = ["f7+l7", "all", None]
    with engine(llama, [name for name in names if name], enable_prefix_caching=True) as llm:
        prompt = prompt_of(100, 7)
        cached = []
        for name in names * 2:
            output = ask(llm, [(prompt, name)], 6)
            check(llama, [(prompt, name)], output, 6)
            cached.append(output[0].num_cached_tokens)
        assert cached[:3] == [0, 0, 0] and all(count >= 64 for count in cached[3:])
        # The suffix of the shorter prompt lies in no full block, or was edited there.
        longer = prompt + prompt_of(20, 8)
        wanted = {name: llama.expected(longer, name, 6) for name in ("all", None)}
        for name, (tokens, _) in wanted.items():
            assert answer(ask(llm, [(longer, name)], 6)[0].outputs[0])[0] == tokens


def test_preemption(llama):
    """Too little memory: requests are preempted and computed again, their generated tokens as generated ones."""
    names = ["f+l+g", "gN", "all", "f7+l7", None, "by position, answers"]
    with engine(llama, names, num_gpu_blocks_override=8, max_model_len=128, enable_prefix_caching=False) as llm:
        preempted = note_preempted(llm)
        requests = [(prompt_of(20 + n, n), name) for n, name in enumerate(names)]
        check(llama, requests, ask(llm, requests, 40), 40)
        assert preempted, "no request was preempted, so this tests nothing"


@pytest.mark.parametrize("fixed", quick_alone([True], [False, True]), ids=["dynamic", "captured"])
def test_compiled(llama, fixed, monkeypatch):
    """Without `enforce_eager`: the edit is an operation of the compiled graph.

    "captured": every step runs what a captured graph runs, the same operations on the same buffers.
    """
    if fixed:
        monkeypatch.setattr("peft_reft.serving.edits.is_capturing", lambda hidden: True)
        monkeypatch.setattr("peft_reft.serving.worker.captures_graphs", lambda config: True)
    with engine(llama, COMMON, enforce_eager=False) as llm:
        names = [None, *COMMON]
        requests = [(prompt_of(4 + 5 * n, n), name) for n, name in enumerate(names)]
        check(llama, requests, ask(llm, requests, 6), 6)
        check(llama, requests, steps(llm, requests, 6), 6)


@pytest.mark.slow
def test_prompts_of_embeddings(llama):
    """A request that was given embeddings, after one that was given their tokens. The answers are the same."""
    names = [None, "f+l+g", "all", "by position"]
    prompts = [prompt_of(15 + n, 60 + n) for n in range(len(names))]
    embed = llama.load().get_input_embeddings()
    with engine(llama, names, enable_prompt_embeds=True) as llm:
        for prompt, name in zip(prompts, names):
            for given in ({"prompt_token_ids": prompt}, {"prompt_embeds": embed(torch.tensor(prompt)).detach()}):
                output = llm.generate([given], params(name, 6), use_tqdm=False)
                check(llama, [(prompt, name)], output, 6)


def test_bf16(llama):
    """Edits are computed in fp32 and rounded once, so the only difference is the model's own rounding."""
    requests = [(prompt_of(length, length), name) for name in (None, *COMMON) for length in (9, 40)]
    with engine(llama, COMMON, dtype="bfloat16") as llm:
        for (prompt, name), output in zip(requests, ask(llm, requests, 3)):
            (tokens, found), (wanted, logprobs) = answer(output.outputs[0]), llama.expected(prompt, name, 3)
            assert tokens[0] == wanted[0] and found[0] == pytest.approx(logprobs[0], abs=0.03), (name, len(prompt))


@pytest.mark.filterwarnings("ignore")
def test_beside_lora(llama, tmp_path):
    """vLLM's LoRA and LoReFT in one request, and each alone: LoReFT edits what the changed weights compute."""
    adapted = get_peft_model(
        llama.load(),
        LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "lora")
    changed = make("llama", str(tmp_path))  # the next line overwrites it with the base and LoRA merged into it
    adapted.merge_and_unload().save_pretrained(changed.folder)
    changed.adapters = llama.adapters
    prompt = prompt_of(15, 2)
    wanted = [served.expected(prompt, name, 5) for served in (llama, changed) for name in (None, "f+l+g")]
    with engine(llama, ["f+l+g"], enable_lora=True, max_lora_rank=8) as llm:
        lora = LoRARequest("lora", 1, str(tmp_path / "lora"))
        found = [
            llm.generate([{"prompt_token_ids": prompt}], params(name, 5), lora_request=request, use_tqdm=False)[0]
            for request in (None, lora)
            for name in (None, "f+l+g")
        ]
    for output, (tokens, logprobs) in zip(found, wanted):
        assert answer(output.outputs[0])[0] == tokens
        assert answer(output.outputs[0])[1] == pytest.approx(logprobs, abs=2e-4)
    assert len({tuple(tokens) for tokens, _ in wanted}) == 4


@pytest.mark.slow
def test_compiled_graphs_on_disk_are_told_apart(tmp_path):
    """vLLM keeps compiled graphs on disk. It does not take one that edits nothing, or other modules."""
    served = make("qwen2", str(tmp_path))
    prompt = prompt_of(11, 1)
    with engine(served, additional_config={}, enforce_eager=False) as llm:
        check(served, [(prompt, None)], ask(llm, [(prompt, None)], 4), 4)
    for component in ("block", "mlp"):
        served.add("same name", positions="f2+l2", component=component)
        with engine(served, enforce_eager=False) as llm:
            check(served, [(prompt, "same name")], ask(llm, [(prompt, "same name")], 4), 4)


@pytest.mark.parametrize("family", quick_alone(["gpt2", "gemma3"], [name for name in FAMILIES if name != "llama"]))
def test_families(family, tmp_path):
    """Blocks that return hidden states and a residual, and blocks that return one tensor."""
    served = make(family, str(tmp_path))
    names = ["f7+l7", "f+l+g", "all", "by position", "per layer", "attention", "mlp"]
    for seed, name in enumerate(names):
        served.add(name, seed=seed, **fields(name))
    requests = [(prompt_of(4 + 7 * n, n), name) for n, name in enumerate([None, *names])]
    for prompt, name in requests:  # before the engine starts: it changes classes of transformers
        served.expected(prompt, name, 6)
    with engine(served) as llm:
        check(served, requests, ask(llm, requests, 6), 6)
