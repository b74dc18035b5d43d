"""Writes docs/performance.md from the results of bench.py and curves.py.

python benchmarks/table.py docs/performance.json docs/performance.md
"""

import json
import sys
from pathlib import Path

TITLES = {
    "train": "Training step, batch 4 x 128, over the floor",
    "checkpointing": "The same with gradient checkpointing, over the floor with checkpointing",
    "prefill": "Prefill, batch 4 x 64, over the base",
    "decode": "Decoding a token, batch 4, over the base",
    "adapters": "Prefill of 64 rows with 64 adapters loaded, over the base",
    "others": "`pyreft` and `adapters`, each over the floor (prefill: the base) in its own process",
}
GOALS = {
    "train": "LoReFT f7+l7: at most 1.010 in CPU time, 1.015 in wall time, and below LoRA",
    "checkpointing": "at most 1.02",
    "prefill": "at most 1.02",
    "decode": "f7+l7: at most 1.005; all: below LoRA (1.07)",
    "adapters": "one for each row: at most 1.10",
    "others": "LoReFT r=4 f7+l7 in the tables above is below these. `make bench-others` runs the same work (9 rounds)",
}
HEAD = """# Performance

This page says what LoReFT costs beside LoRA and IA3, in time and memory. `make bench` writes it; do not edit it.

Machine: {machine}. The model has SmolLM2-135M's shape and random weights. In each of {rounds} rounds every method runs
once, in turns. Each cell holds three things, such as `1.059 (0.983–1.156); 1.060`:

- the median over rounds of a ratio: a method's time over that of the reference in the same round;
- in brackets, the quartiles of this ratio;
- behind the semicolon, the method's fastest round over the reference's fastest, which other work on the machine
  disturbs least.

The reference of training steps is the *floor*, the work that no method avoids: the forward, and the backward of
activations down to the output of the lowest block.
"""


GPU = """
## What is left of a training step, and why

With f7+l7 LoReFT's own code takes up to 1.2 % of a training step ("CPU time in LoReFT's own code"). The goal is 1 %.
In the order of the table above, this time goes to

- AdamW on the adapter's parameters, which every method has;
- a copy of the hidden states' gradient, once a layer. The backward must copy it before it adds to it, because autograd
  may have given the same tensor to another branch, as it does for a residual sum;
- gathers and scatter-adds of the edited rows;
- dispatches of a few microseconds each, which do not grow with the width of the model.

## On a GPU

Nothing here was run on a GPU. There, each operation launches a kernel, and a small kernel costs as much as its launch.
An edited layer launches five kernels in the forward (gather, A h + b, mask, times B, scatter-add) and seven in the
backward. A decode step without edited tokens launches none.

One Triton kernel could replace the five. One program for each tile of edited tokens would load their hidden states by
index, hold the r coordinates in registers, and add the product with B back to the same rows, which no other program
touches. The data already has the right layout: row numbers (n,) int64 and a mask (n, 1), shared by all layers; A and B
(r, d) contiguous, made for all layers in one batched call; the edited tokens (n, d) saved for the backward. The kernel
would help if launches limit a step, most of all in decoding with `all` or `g`. It would hardly help under CUDA graphs,
or under `torch.compile`, which captures the forward without a break. The repository has no such kernel, because it
could not be run here.
""".strip()


def timed(results: dict, kind: str) -> list[str]:
    runs = {key: value for key, value in results.items() if key.startswith(f"{kind}, ")}
    if not runs:
        return []
    lines = ["", f"## {TITLES[kind]}", "", f"Goal: {GOALS[kind]}.", ""]
    threads = [key.removeprefix(f"{kind}, ") for key in runs]
    lines += ["| | " + " | ".join(f"CPU, {t} | wall, {t}" for t in threads) + " |"]
    lines += ["|---" * (1 + 2 * len(threads)) + "|"]
    for method in next(iter(runs.values())):
        cells = [method]
        for run in runs.values():
            ratio = run[method]
            for what in ("cpu", "wall"):
                low, high = ratio[f"{what}_quartiles"]
                cells.append(f"{ratio[what]:.3f} ({low:.3f}–{high:.3f}); {ratio[f'{what}_best']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plain(title: str, about: str, rows: dict[str, dict[str, float]]) -> list[str]:
    columns = list(next(iter(rows.values())))
    lines = ["", f"## {title}", "", about, "", "| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    return lines + [
        "| "
        + " | ".join(
            [name, *(f"{row[column]:.4g}" if row[column] % 1 else f"{row[column]:,.0f}" for column in columns)]
        )
        + " |"
        for name, row in rows.items()
    ]


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text())
    lines = HEAD.format(**results).splitlines()
    if "note" in results:  # by the person who ran it: what else the machine did
        lines += ["", results["note"]]
    for kind in TITLES:
        lines += timed(results, kind)
    if "inside" in results:
        lines += plain(
            "CPU time in LoReFT's own code",
            "CPU time of LoReFT's code over that of everything else in the same steps; median, one thread. It counts "
            "hooks, edits, their backward, R and the optimiser. It cannot see effects on the processor's caches. It "
            "scatters less than the tables above, because it sums short times instead of subtracting long ones.",
            results["inside"],
        )
    if "saved" in results:
        lines += plain(
            "Saved for backward",
            "MiB that autograd keeps beyond the floor (`saved_tensors_hooks`). Goal for f7+l7: twice the edited "
            "tokens.",
            results["saved"],
        )
    if "disk" in results:
        lines += plain(
            "On disk",
            "Goal: parameters x 4 bytes, less than 2 KB of config, less than 100 header bytes a tensor. The last goal "
            "cannot be met: the name that PEFT gives a tensor (`base_model.model.model.layers.29.` and so on) and its "
            "entry in the header of safetensors (type, shape, offsets) are longer than that.",
            results["disk"],
        )
    if "orthogonalisation" in results:
        lines += plain(
            "Orthogonalisation",
            "Time of R and its gradient, over the floor of a step of 1 x 512 tokens through one block of that shape. "
            "Goal: at most 0.01. Here each R is computed by itself; a model computes those of all layers together, "
            "which is faster.",
            results["orthogonalisation"],
        )
    if "injection" in results:
        rows = {name: {"ms": value} for name, value in results["injection"].items()}
        lines += plain("Injection and loading", "Goal: milliseconds.", rows)
    if "profile" in results:
        lines += plain(
            "Where the overhead goes",
            "A training step of LoReFT r=4 f7+l7 minus one of the floor, for each of 30 layers, by `torch.profiler`: "
            "the operations that LoReFT adds, by their own time. The floor also runs `aten::mul`, `add` and `copy_`, "
            "on much larger tensors. Their numbers are mostly the scatter of those.",
            results["profile"],
        )
    lines += ["", *GPU.splitlines()]
    if Path(sys.argv[2]).with_name("performance.png").exists():
        about = "`make bench-curves` draws them, on a model of 4 blocks."
        lines += ["", "## Curves", "", about, "", "![overhead](performance.png)"]
    Path(sys.argv[2]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
