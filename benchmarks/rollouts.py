"""Measures what it costs to bring a policy to a colocated engine of vLLM: LoReFT's adapter, and TRL's way with LoRA.

    python benchmarks/rollouts.py --out docs/rollouts.json --page docs/trainers.md
    python benchmarks/rollouts.py --layers 2 --rounds 3

One process has one engine, with a model of SmolLM2-135M's shape and random weights in 16 bits. A round synchronises
every policy once, by TRL's `VLLMGeneration.sync_weights`: for LoReFT as `rollouts_in_vllm()` has it, for LoRA as TRL
has it (merge, send all weights, drop the prefix cache, unmerge). So a slow moment of the machine hits all alike.
Before each round the policies change, as by a training step.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from trl.generation.vllm_generation import VLLMGeneration
from workload import SMOLLM2, leave_identity

from peft_reft import LoReftConfig
from peft_reft.integrations.trl import rollouts_in_vllm
from peft_reft.integrations.trl.policy import Policy

POLICIES: dict[str, Any] = {
    "LoReFT f7+l7, r=4": LoReftConfig(task_type="CAUSAL_LM", positions="f7+l7", r=4),
    "LoReFT l7+g, r=4": LoReftConfig(task_type="CAUSAL_LM", positions="l7+g", r=4),
    "LoReFT all, bias": LoReftConfig(task_type="CAUSAL_LM", positions="all", intervention="bias"),
    "LoRA, r=1": LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj", "v_proj"]),
    "LoRA, r=8": LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
}
REFERENCE = "LoRA, r=8"


def generation_of(model: Any) -> VLLMGeneration:
    """What a trainer of TRL makes for rollouts, with an engine of its own."""
    accelerator = Accelerator(cpu=True)
    return VLLMGeneration(model, accelerator, None, mode="colocate", max_model_length=512, max_num_seqs=8)


def sharing(engine: VLLMGeneration, model: Any) -> VLLMGeneration:
    """The same for another model, with the engine that there is: a process can have only one."""
    other = copy.copy(engine)
    other.model = model
    policy = Policy.of(model)
    if policy is None:
        del other._peft_reft_sends
    else:
        other._peft_reft_sends = (policy, engine._peft_reft_sends[1])
    return other


def bytes_sent(generation: VLLMGeneration) -> int:
    """What a synchronisation sends."""
    policy = Policy.of(generation.model)
    if policy is not None:
        files = policy.files(generation)
        return len(files.config) + len(files.weights)
    return sum(parameter.nbytes for _, parameter in generation._iter_named_params())


def measure(folder: str, layers: int, rounds: int) -> dict[str, Any]:
    config = LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers, "max_position_embeddings": 512})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    rollouts_in_vllm(enforce_eager=True, skip_tokenizer_init=True)
    policies: dict[str, VLLMGeneration] = {}
    for name, peft_config in POLICIES.items():
        base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = leave_identity(get_peft_model(base, peft_config))
        policies[name] = sharing(next(iter(policies.values())), model) if policies else generation_of(model)
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for turn in tqdm(range(rounds + 1)):
        order = [*policies][turn % len(policies) :] + [*policies][: turn % len(policies)]
        for name in order:
            leave_identity(policies[name].model)
            began = time.perf_counter()
            policies[name].sync_weights()
            seconds[name].append(time.perf_counter() - began)
    found = {}
    for name, generation in policies.items():
        trained = sum(p.numel() for p in generation.model.parameters() if p.requires_grad)
        # The first round warms up.
        found[name] = {"parameters": trained, "bytes": bytes_sent(generation), "seconds": seconds[name][1:]}
    return found


def table(results: dict[str, Any]) -> str:
    lines = [
        "| policy | trained parameters | sent | time | of LoRA r=8 |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        pairs = zip(found["seconds"], results[REFERENCE]["seconds"])
        ratios = sorted(own / reference for own, reference in pairs)
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})"
        sent = found["bytes"]
        size = f"{sent / 1e6:,.0f} MB" if sent > 1e7 else f"{sent / 1e3:,.0f} KB"
        milliseconds = 1e3 * statistics.median(found["seconds"])
        lines.append(f"| {name} | {found['parameters']:,} | {size} | {milliseconds:,.0f} ms | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--out", type=Path, help="JSON of all rounds")
    parser.add_argument("--page", type=Path, help="Markdown page whose part between the two marks becomes the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(folder, args.layers, args.rounds)
    text = table(results)
    print(text)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.page:
        before, mark, rest = args.page.read_text(encoding="utf-8").partition("<!-- rollouts -->\n")
        _, end, after = rest.partition("<!-- end -->")
        args.page.write_text(f"{before}{mark}\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
