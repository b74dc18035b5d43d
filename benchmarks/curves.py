"""How the overhead grows with rank, positions, layers, width, batch and adapters: `make bench-curves`.

    python benchmarks/curves.py --out docs/performance.png

A model of 4 blocks of SmolLM2's width, fp32, one thread; one thing changes at a time. Above: milliseconds of CPU time
in LoReFT's own code and the optimizer during a training step (for adapters: during a prefill of 64 rows). Below:
seconds to generate 32 tokens, as in the paper's figure of generation time.
"""

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from measure import interleave, share
from own import measure
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from workload import SMOLLM2, batch, build, prompts, training_step

from peft_reft import LoReftConfig

SMALL = {**SMOLLM2, "num_hidden_layers": 4, "vocab_size": 2048}
USUAL = dict(task_type="CAUSAL_LM", r=4, positions="f7+l7")
WIDTHS = {256: 4, 576: 9, 1024: 16, 2048: 32}


def inputs_of(rows: int = 4) -> dict[str, torch.Tensor]:
    return batch(rows, 128, 64, SMALL["vocab_size"])


def loreft(base: nn.Module, **kwargs: object) -> PeftModel:
    return get_peft_model(share(base), LoReftConfig(**{**USUAL, **kwargs}))


def curves(times: int) -> dict[str, dict[int, float]]:
    """Milliseconds of CPU time in LoReFT's own code: what changes -> its value -> the time."""
    base = build(SMALL)

    def of_step(model: PeftModel, rows: int = 4) -> float:
        step = training_step(model, inputs_of(rows))
        own, _ = measure(model, step, times, with_optimizer=True)
        return 1e3 * own

    found: dict[str, dict[int, float]] = {
        "rank r": {r: of_step(loreft(base, r=r)) for r in (1, 2, 4, 8, 16, 32, 64)},
        "positions p + s": {2 * n: of_step(loreft(base, positions=f"f{n}+l{n}")) for n in (1, 2, 4, 8, 16, 32)},
        "layers": {n: of_step(loreft(base, layers=list(range(n)))) for n in (1, 2, 3, 4)},
        "batch": {rows: of_step(loreft(base), rows) for rows in (1, 2, 4, 8)},
        "width d": {},
        "adapters": {},
    }
    for width, heads in WIDTHS.items():
        sizes = dict(hidden_size=width, intermediate_size=8 * width // 3, num_attention_heads=heads)
        found["width d"][width] = of_step(loreft(build({**SMALL, **sizes, "num_key_value_heads": heads})))
    model = loreft(base).eval()
    for n in range(1, 64):
        model.add_adapter(f"a{n}", LoReftConfig(**USUAL))
    names = ["default", *(f"a{n}" for n in range(1, 64))]
    inputs = {name: value[:, :32] for name, value in inputs_of(64).items() if name != "labels"}
    for n in (1, 4, 16, 64):
        chosen = [names[row % n] for row in range(64)]

        def prefill(chosen: list[str] = chosen) -> None:
            with torch.inference_mode():
                model(**inputs, adapter_names=chosen)

        own, _ = measure(model, prefill, times)
        found["adapters"][n] = 1e3 * own
    return found


def times_to_generate(rounds: int) -> dict[str, dict[str, dict[int, float]]]:
    """Seconds to generate 32 tokens: what changes -> method -> the value -> seconds."""
    base = build(SMALL)
    every = [*range(SMALL["num_hidden_layers"])]

    def loreft_config(**kwargs: object) -> LoReftConfig:
        return LoReftConfig(**{**USUAL, **kwargs})

    def lora_config(layers: list[int], r: int = 8) -> LoraConfig:
        targets = ["q_proj", "v_proj"]
        return LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=targets, layers_to_transform=layers)

    sweeps = {
        "positions p + s": {2 * n: {"LoReFT": loreft_config(positions=f"f{n}+l{n}")} for n in (1, 4, 16)},
        "rank r": {r: {"LoReFT": loreft_config(r=r), "LoRA": lora_config(every, r)} for r in (1, 8, 64)},
        "layers": {n: {"LoReFT": loreft_config(layers=every[:n]), "LoRA": lora_config(every[:n])} for n in (1, 2, 4)},
    }
    settings = dict(prompts(4, 64, SMALL["vocab_size"]), do_sample=False, max_new_tokens=32, min_new_tokens=32)
    found: dict[str, dict[str, dict[int, float]]] = {}
    for what, points in sweeps.items():
        runs = {"base": partial(share(base).eval().generate, **settings)}
        for value, configs in points.items():
            for method, config in configs.items():
                model = get_peft_model(share(base), config).eval()
                runs[f"{method} {value}"] = partial(model.generate, **settings)
        ratios = interleave(runs, "base", rounds)
        seconds = ratios.pop("base").milliseconds / 1e3
        found[what] = {"base": dict.fromkeys(points, seconds)}
        for name, ratio in ratios.items():
            method, value = name.split()
            found[what].setdefault(method, {})[int(value)] = seconds * ratio.wall
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    progress = tqdm(total=2)
    overhead = curves(args.rounds)
    progress.update()
    seconds = times_to_generate(args.rounds)
    progress.update()
    figure, axes = plt.subplots(3, 3, figsize=(11, 8.5), layout="constrained")
    for axis, (what, points) in zip(axes.flat, overhead.items()):
        axis.plot(list(points), list(points.values()), marker="o")
        axis.set(xlabel=what, ylabel="ms a prefill" if what == "adapters" else "ms a training step")
        axis.set_ylim(bottom=min(0, *points.values()))
    for axis, (what, methods) in zip(axes[2], seconds.items()):
        for method, points in methods.items():
            axis.plot(list(points), list(points.values()), marker="o", label=method)
        axis.set(xlabel=what, ylabel="s to generate 32 tokens")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
