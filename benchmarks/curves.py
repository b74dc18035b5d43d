"""How the overhead grows with rank, positions, layers, width, batch and adapters: `make bench-curves`.

    python benchmarks/curves.py --out docs/performance.png

A model of 4 blocks of SmolLM2's width, fp32, one thread; one thing changes at a time. Above: CPU milliseconds of a
training step in LoReFT's own code (of adapters: of a prefill of 64 rows). Below: seconds to generate 32 tokens, as in
the paper's figure of generation time.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench import batch, build, own_time, step
from measure import SMOLLM2, share
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from peft_reft import LoReftConfig

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from overhead import generation, lora

SMALL = {**SMOLLM2, "num_hidden_layers": 4, "vocab_size": 2048}
USUAL = dict(task_type="CAUSAL_LM", r=4, positions="f7+l7")
WIDTHS = {256: 4, 576: 9, 1024: 16, 2048: 32}


def inputs_of(rows: int = 4) -> dict[str, torch.Tensor]:
    inputs = batch(rows, 128, 64)
    return {name: value.fmod(SMALL["vocab_size"]) for name, value in inputs.items()}  # keeps -100


def loreft(base: nn.Module, **kwargs: object) -> nn.Module:
    return get_peft_model(share(base), LoReftConfig(**{**USUAL, **kwargs}))


def curves(times: int) -> dict[str, dict[int, float]]:
    """Milliseconds of CPU in LoReFT's own code: by what changes, at each value."""
    base = build(SMALL)
    found: dict[str, dict[int, float]] = {"batch": {}, "width d": {}, "adapters": {}}
    with own_time() as measure:

        def of_step(model: nn.Module, rows: int = 4) -> float:
            return 1e3 * measure(step(model, inputs_of(rows)), times)[0]

        found["rank r"] = {r: of_step(loreft(base, r=r)) for r in (1, 2, 4, 8, 16, 32, 64)}
        found["positions p + s"] = {2 * n: of_step(loreft(base, positions=f"f{n}+l{n}")) for n in (1, 2, 4, 8, 16, 32)}
        found["layers"] = {n: of_step(loreft(base, layers=list(range(n)))) for n in (1, 2, 3, 4)}
        found["batch"] = {rows: of_step(loreft(base), rows) for rows in (1, 2, 4, 8)}
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
            run = torch.inference_mode()(lambda chosen=chosen: model(**inputs, adapter_names=chosen))
            found["adapters"][n] = 1e3 * measure(run, times)[0]
    return found


def times_to_generate(rounds: int) -> dict[str, dict[str, dict[int, float]]]:
    """Seconds to generate 32 tokens: by what changes, for each method, at each value."""
    base = build(SMALL)
    inputs = {name: value[:, :64] for name, value in inputs_of().items() if name != "labels"}
    every = [*range(4)]

    def edit(**kwargs: object) -> LoReftConfig:
        return LoReftConfig(**{**USUAL, **kwargs})

    sweeps = {
        "positions p + s": {2 * n: {"LoReFT": edit(positions=f"f{n}+l{n}")} for n in (1, 4, 16)},
        "rank r": {r: {"LoReFT": edit(r=r), "LoRA": lora(every, r)} for r in (1, 8, 64)},
        "layers": {n: {"LoReFT": edit(layers=every[:n]), "LoRA": lora(every[:n])} for n in (1, 2, 4)},
    }
    found: dict[str, dict[str, dict[int, float]]] = {}
    for what, points in sweeps.items():
        measured = generation(base, points, inputs, 32, rounds)
        found[what] = {"base": dict.fromkeys(points, measured["base"])}
        for name, (more, *_) in measured["more"].items():
            method, value = name.split()
            found[what].setdefault(method, {})[int(value)] = measured["base"] + more
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
