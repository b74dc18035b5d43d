"""Write docs/performance.md, and the figures of docs/untouched.md, from the results of bench.py, others.py, curves.py.

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

This page is for people who want to know what LoReFT costs in time, memory and disk space, beside LoRA, IA3 and no
adapter at all. `make bench` writes it; do not edit it.

{machine}; {rounds} rounds.
In each round every method runs once, in turns. A ratio is the median over rounds, with quartiles; in each round the
time is divided by that of the reference. Behind the semicolon stands the fastest round over the reference's fastest,
which neighbours on the machine disturb least. SmolLM2-135M's shape, random weights. The *floor* is what every method
needs: the forward, and the backward of activations down to the output of the lowest block.
"""


GPU = """
## What is left of a training step, and why

The goal is 1 % of a step. LoReFT misses it by up to a fifth ("CPU time in LoReFT's own code"). In the order of the
table above, the time goes to AdamW on the adapter's own parameters, which every method has; to a copy of the gradient
of the hidden states, once a layer; to gathers and scatter-adds of the edited rows; and to calls of operations, a few
microseconds each, which do not grow with the model's width. The copy is necessary: autograd may have given the same
tensor to another branch (a residual sum does), so the backward may not change it in place.

## On a GPU

No number on this page was measured on a GPU; [another page](gpu.md) has what is ready for one.

On a GPU a small kernel costs as much as its launch. An edited layer launches five kernels in the forward (gather, A h
+ b, times `valid`, times B, scatter-add) and seven in the backward. A decode step without edited tokens launches none.
One Triton kernel could replace the five. A program for each tile of edited tokens would load their hidden states by
index, keep the r coordinates in registers, and add the product with B to the same rows, which no other program
touches. The present layout fits it: `rows` (n,) int64 and `valid` (n, 1), shared by all layers; A and B (r, d)
contiguous, computed for all layers in one batched call; the edited tokens (n, d) saved for the backward. The kernel
would pay if launches bound a step, most of all while decoding with `all` or `g`. It would hardly pay under CUDA graphs
or `torch.compile`, which captures the forward without a break.
""".strip()


BEGIN, END = "<!-- figures: written by benchmarks/table.py -->", "<!-- end of the figures -->"
"""What stands around the figures in docs/untouched.md and docs/gpu.md."""


def between_marks(page: Path, lines: list[str]) -> None:
    """Put lines in place of a page's figures."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    page.write_text(before + begin + "\n".join(["", *lines]) + end + after, encoding="utf-8")


def timed(results: dict, name: str) -> list[str]:
    """The lines of a table of ratios; a pair of columns for each number of threads."""
    runs = {key: value for key, value in results.items() if key.startswith(f"{name}, ")}
    if not runs:
        return []
    lines = ["", f"## {TITLES[name]}", "", f"Goal: {GOALS[name]}.", ""]
    threads = [key.removeprefix(f"{name}, ") for key in runs]
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


def number(value: float | None) -> str:
    """A number as a table shows it; None stands for what was not measured."""
    if value is None:
        return ""
    return f"{value:.4g}" if value % 1 else f"{value:,.0f}"


def plain(title: str, about: str, rows: dict[str, dict[str, float | None]]) -> list[str]:
    """The lines of a table of numbers."""
    columns = list(next(iter(rows.values())))
    lines = ["", f"## {title}", "", about, "", "| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, row in rows.items():
        cells = [number(row[column]) for column in columns]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def untouched(results: dict) -> list[str]:
    """The figures of docs/untouched.md."""
    time = plain(
        "A training step of `l7`, in CPU time",
        "Four rows of prompt + answer tokens, SmolLM2-135M's shape, one thread; median of "
        f"{results['rounds of untouched']} rounds. The floor is the full forward and the backward of activations "
        "with the same head. Goals over the floor: 0.58, 0.53, 0.30; over LoRA: 0.55, 0.50, 0.28; for 64 + 64: not "
        "above one part.",
        results["untouched"],
    )
    memory = plain(
        "What autograd keeps of one row, in MiB",
        "Counted with `saved_tensors_hooks`. Goal for 448 + 64: a share of 0.2.",
        results["saved of untouched"],
    )
    return [f"**{line[3:]}**" if line.startswith("## ") else line for line in [*time, *memory, ""]]


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text())
    lines = HEAD.format(**results).splitlines()
    if "note" in results:  # by whoever ran it, on what else the machine did
        lines += ["", results["note"]]
    for name in TITLES:
        lines += timed(results, name)
    if "inside" in results:
        lines += plain(
            "CPU time in LoReFT's own code",
            "Over the time of all else in the same steps; median, one thread. A difference of two long times has the "
            "scatter of both (the quartiles above); a sum of short ones has hardly any. It counts hooks, wrapped "
            "methods, edits, their backward, R and the optimiser. It cannot see effects on caches. `make bench-own` "
            "prints the milliseconds, and compares two versions.",
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
            "Goal: parameters x 4 bytes, less than 2 KB of config, less than 100 bytes a tensor. The last goal cannot "
            "be reached: PEFT's name of a tensor (`base_model.model.model.layers.29.` and so on) and its entry in the "
            "header of safetensors (type, shape, offsets) are longer.",
            results["disk"],
        )
    if "orthogonalisation" in results:
        lines += plain(
            "Orthogonalisation",
            "R and its gradient, over the floor of a step of 1 x 512 tokens of one block of that shape. Goal: at most "
            "0.01. (A model computes R of all layers together, which is faster than one by one, as here.)",
            results["orthogonalisation"],
        )
    if "injection" in results:
        rows = {name: {"ms": value} for name, value in results["injection"].items()}
        lines += plain("Injection and loading", "Goal: milliseconds.", rows)
    if "profile" in results:
        lines += plain(
            "Where the overhead goes",
            "A training step of LoReFT r=4 f7+l7 minus one of the floor, by `torch.profiler`, for each of 30 layers: "
            "the operations that LoReFT adds, by their own time. The floor runs `aten::mul`, `add` and `copy_` too, "
            "on much larger tensors, so these rows show mostly scatter.",
            results["profile"],
        )
    lines += ["", *GPU.splitlines()]
    if Path(sys.argv[2]).with_name("performance.png").exists():
        lines += ["", "## Curves", "", "`make bench-curves`; a model of 4 blocks.", "", "![overhead](performance.png)"]
    Path(sys.argv[2]).write_text("\n".join(lines) + "\n")
    if "untouched" in results:
        between_marks(Path(sys.argv[2]).with_name("untouched.md"), untouched(results))


if __name__ == "__main__":
    main()
