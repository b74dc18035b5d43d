"""How the overhead grows with rank, positions, layers, width, batch and adapters: `make bench-curves`.

    python benchmarks/curves.py --out docs/performance.png

A model of 4 blocks of SmolLM2's width, fp32, one thread; one thing changes at a time. Above: CPU milliseconds of a
training step over the floor (of adapters: of a prefill over the base). Below: seconds to generate 32 tokens, as in the
paper's figure of generation time.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench import SMOLLM2, batch, build, floor, step
from measure import interleave, share
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm

from peft_reft import LoreftConfig

SMALL = {**SMOLLM2, "num_hidden_layers": 4, "vocab_size": 2048}
USUAL = dict(task_type="CAUSAL_LM", r=4, positions="f7+l7")
WIDTHS = {256: 4, 576: 9, 1024: 16, 2048: 32}


def inputs_of(rows: int = 4) -> dict[str, torch.Tensor]:
    inputs = batch(rows, 128, 64)
    return {name: value % SMALL["vocab_size"] if name == "input_ids" else value for name, value in inputs.items()}


def loreft(base: nn.Module, **kwargs: object) -> nn.Module:
    return get_peft_model(share(base), LoreftConfig(**{**USUAL, **kwargs}))


def over_floor(models: dict[int, nn.Module], base: nn.Module, rounds: int, rows: int = 4) -> dict[int, float]:
    """Milliseconds of CPU over the floor, for each of several models."""
    inputs = inputs_of(rows)
    runs: dict[str, Callable[[], object]] = {"floor": step(floor(base), inputs)}
    runs |= {str(x): step(model, inputs) for x, model in models.items()}
    ratios = interleave(runs, "floor", rounds)
    return {x: (ratios[str(x)].cpu - 1) * ratios["floor"].milliseconds for x in models}


def curves(rounds: int) -> dict[str, dict[int, float]]:
    base = build(SMALL)
    found = {
        "rank r": over_floor({r: loreft(base, r=r) for r in (1, 2, 4, 8, 16, 32, 64)}, base, rounds),
        "positions p + s": over_floor(
            {2 * n: loreft(base, positions=f"f{n}+l{n}") for n in (1, 2, 4, 8, 16, 32)}, base, rounds
        ),
        "layers": over_floor({n: loreft(base, layers=list(range(n))) for n in (1, 2, 3, 4)}, base, rounds),
        "batch": {},
        "width d": {},
        "adapters": {},
    }
    for rows in (1, 2, 4, 8):
        found["batch"] |= over_floor({rows: loreft(base)}, base, rounds, rows)
    for width, heads in WIDTHS.items():
        sizes = dict(hidden_size=width, intermediate_size=8 * width // 3, num_attention_heads=heads)
        wide = build({**SMALL, **sizes, "num_key_value_heads": heads})
        found["width d"] |= over_floor({width: loreft(wide)}, wide, rounds)
    model = loreft(base).eval()
    for n in range(1, 64):
        model.add_adapter(f"a{n}", LoreftConfig(**USUAL))
    names = ["default", *(f"a{n}" for n in range(1, 64))]
    inputs = {name: value[:, :32] for name, value in inputs_of(64).items() if name != "labels"}
    plain = share(base).eval()
    runs = {"base": torch.inference_mode()(lambda: plain(**inputs))}
    for n in (1, 4, 16, 64):
        chosen = [names[row % n] for row in range(64)]
        runs[str(n)] = torch.inference_mode()(lambda chosen=chosen: model(**inputs, adapter_names=chosen))
    ratios = interleave(runs, "base", rounds)
    found["adapters"] = {n: (ratios[str(n)].cpu - 1) * ratios["base"].milliseconds for n in (1, 4, 16, 64)}
    return found


def generation(rounds: int) -> dict[str, dict[str, dict[int, float]]]:
    """Seconds to generate 32 tokens: by what changes, for each method, at each value."""
    base = build(SMALL)
    inputs = {name: value[:, :64] for name, value in inputs_of().items() if name != "labels"}

    def lora(r: int, layers: int = 4) -> nn.Module:
        config = LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=["q_proj", "v_proj"])
        config.layers_to_transform = list(range(layers))
        return get_peft_model(share(base), config)

    sweeps = {
        "positions p + s": {2 * n: {"LoReFT": loreft(base, positions=f"f{n}+l{n}")} for n in (1, 4, 16)},
        "rank r": {r: {"LoReFT": loreft(base, r=r), "LoRA": lora(r)} for r in (1, 8, 64)},
        "layers": {n: {"LoReFT": loreft(base, layers=list(range(n))), "LoRA": lora(8, n)} for n in (1, 2, 4)},
    }
    found: dict[str, dict[str, dict[int, float]]] = {}
    for what, points in sweeps.items():
        models = {"base": share(base)} | {f"{m} {x}": model for x, at in points.items() for m, model in at.items()}
        settings = dict(inputs, do_sample=False, max_new_tokens=32)
        runs = {name: partial(model.eval().generate, **settings) for name, model in models.items()}
        ratios = interleave(runs, "base", rounds)
        seconds = ratios["base"].milliseconds / 1e3
        found[what] = {"base": dict.fromkeys(points, seconds)}
        for x, at in points.items():
            for method in at:
                found[what].setdefault(method, {})[x] = ratios[f"{method} {x}"].wall * seconds
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
    seconds = generation(args.rounds)
    progress.update()
    figure, axes = plt.subplots(3, 3, figsize=(11, 8.5), layout="constrained")
    for axis, (what, points) in zip(axes.flat, overhead.items()):
        axis.plot(list(points), list(points.values()), marker="o")
        axis.set(xlabel=what, ylabel="ms over the base" if what == "adapters" else "ms a step over the floor")
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
