"""docs/performance.md from the results of bench.py and curves.py.

python benchmarks/table.py docs/performance.json docs/performance.md
"""

import json
import sys
from pathlib import Path

TITLES = {
    "train": "Training step, batch 4 x 128, over the floor",
    "checkpointing": "The same with gradient checkpointing, over the floor with it",
    "prefill": "Prefill, batch 4 x 64, over the base",
    "decode": "Decoding a token, batch 4, over the base",
    "adapters": "Prefill of 64 rows with 64 adapters loaded, over the base",
    "others": "`pyreft` and `adapters`, over the floor (prefill: the base) of their own processes",
}
GOALS = {
    "train": "LoReFT f7+l7: at most 1.010 in CPU time, 1.015 in wall time, and below LoRA",
    "checkpointing": "at most 1.02",
    "prefill": "at most 1.02",
    "decode": "f7+l7: at most 1.005; all: below LoRA (1.07)",
    "adapters": "one for each row: at most 1.10",
    "others": "LoReFT r=4 f7+l7 above to be below these. The same workload, by `make bench-others` (9 rounds)",
}
HEAD = """# Performance

Written by `make bench`; do not edit. {machine}; {rounds} rounds, in each of which every method runs once, in turns; a
ratio is the median over rounds of the time over that of the reference in the same round, with its quartiles; behind
the semicolon, the fastest round over the reference's fastest, which neighbours on the machine disturb least.
SmolLM2-135M's shape, random weights. The *floor* is what no method can spare: the forward, and the backward of
activations down to the output of the lowest block.
"""


GPU = """
## What is left of a training step, and why

The goal of 1 % of a step is missed by up to a fifth of it ("CPU time in LoReFT's own code"). What is left, in the
order of the table above: AdamW on the adapter's own parameters, which every method has; the gradient of the hidden
states, which the backward copies once a layer before it adds to it, since autograd may have handed the same tensor to
another branch (a residual sum does) and nobody may change it in place; gathers and scatter-adds of the edited rows;
and dispatches of a few microseconds each, which a wider model does not feel.

## On a GPU

Nothing here was run on one. What would differ: kernels are launched, and small ones cost their launch. An edited layer
launches five in the forward (gather, A h + b, times `keep`, times B, scatter-add) and seven in the backward; a decode
step without edited tokens launches none. One Triton kernel could take the five: a program for each tile of edited
tokens loads their hidden states by index, keeps the r coordinates in registers, and adds the product with B back to
the same rows, which no other program touches. The layout it would want is the one in use: `rows` (n,) int64 and `keep`
(n, 1), shared by all layers; A and B (r, d) contiguous, those of all layers formed in one batched call; the edited
tokens (n, d) saved for the backward. It would pay where launches bound a step, in decoding with `all` or `g` most;
under CUDA graphs or `torch.compile`, which captures the forward without a break, hardly at all. Only what can be run
here is landed.
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
    if "note" in results:  # of whoever ran it: what else the machine did
        lines += ["", results["note"]]
    for kind in TITLES:
        lines += timed(results, kind)
    if "inside" in results:
        lines += plain(
            "CPU time in LoReFT's own code",
            "Over that of all else in the same steps; median, one thread. A difference of two long times has the "
            "scatter of both (the quartiles above), a sum of short ones has not. It counts hooks, edits, their "
            "backward, R and the optimiser, and cannot see effects on caches.",
            results["inside"],
        )
    if "saved" in results:
        lines += plain(
            "Saved for backward",
            "MiB that autograd keeps over the floor (`saved_tensors_hooks`). Goal for f7+l7: twice the edited tokens.",
            results["saved"],
        )
    if "disk" in results:
        lines += plain(
            "On disk",
            "Goal: parameters x 4 bytes, less than 2 KB of config, less than 100 bytes a tensor. The last cannot be: "
            "the name that PEFT gives a tensor (`base_model.model.model.layers.29.` and so on) and its entry in the "
            "header of safetensors (type, shape, offsets) are longer already.",
            results["disk"],
        )
    if "orthogonalisation" in results:
        lines += plain(
            "Orthogonalisation",
            "R and its gradient, over the floor of a step of 1 x 512 tokens of one block of that shape. Goal: at most "
            "0.01. (In a model those of all layers are computed together, which is faster than one by one, as here.)",
            results["orthogonalisation"],
        )
    if "injection" in results:
        rows = {name: {"ms": value} for name, value in results["injection"].items()}
        lines += plain("Injection and loading", "Goal: milliseconds.", rows)
    if "profile" in results:
        lines += plain(
            "Where the overhead goes",
            "A training step of LoReFT r=4 f7+l7 less one of the floor, by `torch.profiler`, for each of 30 layers: "
            "operations that LoReFT adds, by their own time. The floor runs `aten::mul`, `add` and `copy_` too, on "
            "much larger tensors, and what they show is mostly the scatter of those.",
            results["profile"],
        )
    lines += ["", *GPU.splitlines()]
    if Path(sys.argv[2]).with_name("performance.png").exists():
        lines += ["", "## Curves", "", "`make bench-curves`; a model of 4 blocks.", "", "![overhead](performance.png)"]
    Path(sys.argv[2]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
