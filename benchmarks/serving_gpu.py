"""`serving.py` on a card: `make bench-vllm-gpu` writes docs/serving-gpu.json and docs/gpu.md.

    python benchmarks/serving_gpu.py --runners V1 --out docs/serving-gpu.json --page docs/gpu.md
    PEFT_REFT_GPU_DEVICE=cpu python benchmarks/serving_gpu.py --runners V1 --layers 1 --rounds 1

The shape of a 1B Llama, bf16, with CUDA graphs, once with each of vLLM's model runners. All engines of a runner are on
the card together, each with 4 GiB for its cache of keys and values: about 80 GiB.
"""

import os
import statistics
import sys
from typing import Any

import serving
import serving_engine
import torch
from gpu import SHAPES
from serving_tables import Rounds, first_token, middle, over_base
from workload import SMOLLM2

COUNTS = (1, 64, 512)
WAYS: dict[str, dict[str, Any]] = {
    "base": {},
    **{f"LoReFT f7+l7, {n}": dict(loreft="f7+l7", adapters=n) for n in COUNTS},
    **{f"LoRA q, v, {n}": dict(lora=True, adapters=n) for n in COUNTS},
}
LOADS = {
    "decode-heavy": dict(kind="batch", requests=512, prompt=32, new=128),
    "prefill-heavy": dict(kind="batch", requests=512, prompt=384, new=2),
}
ENGINE: dict[str, Any] = dict(
    max_model_len=512, max_num_seqs=512, max_num_batched_tokens=8192, enable_prefix_caching=False
)
RUNNERS = {"V1": "0", "V2": "1"}


def tables(results: dict[str, Any]) -> str:
    """What was measured on each card, as Markdown."""
    lines: list[str] = []
    for load, settings in serving.LOADS.items():
        what = "{requests} requests at once, prompts of {prompt} tokens, {new} new ones".format(**settings)
        lines += [f"**{load.capitalize()}**: {what}.", ""]
        lines += ["| | throughput over the base's | time to first token over the base's | tokens/s | first, s | GiB |"]
        lines += ["|---|---|---|---|---|---|"]
        for group, of_group in results.items():
            runs: Rounds = of_group[load]
            for way, found in runs.items():
                speed = over_base(runs, way, lambda own, base: base["seconds"] / own["seconds"])
                rate = statistics.median(each["tokens"] / each["seconds"] for each in found)
                cells = [speed, over_base(runs, way, first_token), f"{rate:.0f}", f"{middle(found, 'first'):.3f}"]
                lines.append(f"| {group}: {way} | {' | '.join(cells)} | {middle(found, 'peak') / 2**30:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    card, shape = "a CPU", SMOLLM2
    ways, loads, engine = {name: WAYS[name] for name in ("base", "LoReFT f7+l7, 1")}, LOADS, ENGINE
    if os.environ.get("PEFT_REFT_GPU_DEVICE", "cuda") == "cuda":
        card, shape, ways = torch.cuda.get_device_name(), SHAPES["1B"], WAYS
        engine = dict(ENGINE, dtype="bfloat16", gpu_memory_utilization=0.05, kv_cache_memory_bytes=4 * 2**30)
        serving_engine.peak = torch.cuda.max_memory_allocated
    else:
        engine = dict(ENGINE, enforce_eager=True)  # the logic alone
        loads = {load: dict(settings, requests=8, prompt=16, new=4) for load, settings in LOADS.items()}
    runners = list(RUNNERS)
    if "--runners" in sys.argv:
        at = sys.argv.index("--runners")
        runners = [sys.argv[at + 1]]
        del sys.argv[at : at + 2]
    serving.SMOLLM2 = serving_engine.SMOLLM2 = shape
    serving.GROUPS.clear()
    for runner in runners:
        env = {"VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner]}
        serving.GROUPS[f"{card}, runner {runner}"] = dict(loads=loads, engine=engine, ways=ways, rounds=3, env=env)
    serving.LOADS.clear()
    serving.LOADS.update(loads)
    serving.tables = tables
    serving.main()


if __name__ == "__main__":
    main()
