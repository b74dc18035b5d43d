"""What LoReFT costs on a card, beside LoRA and the frozen model: `make bench-gpu` writes docs/gpu.json and .md.

    python benchmarks/gpu.py [--shapes 1B 3B 8B paper] [--rounds 7] [--out docs/gpu.json] [--page docs/gpu.md]
    python benchmarks/gpu.py --device cpu --shapes tiny --rounds 2    # the logic, without a card

Random weights of each shape, bf16 (speed does not depend on the values). Methods, floor and rounds are those of
bench.py. Times are wall times up to the end of the card's work. Results of other cards stay in the JSON file.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench import METHODS, decode, floor
from measure import interleave, share
from peft import PeftConfig, get_peft_model
from table import between_marks, plain
from torch import nn
from tqdm import tqdm
from workload import batch_of, build, leave_identity, training_step

from peft_reft import LoReftConfig, LoReftRuntimeConfig

LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, rope_theta=5e5)
SHAPES: dict[str, dict[str, int]] = {
    "1B": dict(LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32),
    "3B": dict(LLAMA3, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24),
    "8B": dict(LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "paper": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "tiny": dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
}
"""Llama 3's three small sizes; Llama 1's 7B, on which the paper has most of its results."""

Rows = dict[str, dict[str, float | None]]


def lengths(shape: str) -> dict[str, tuple[int, int, int]]:
    """Rows, tokens of the prompt and tokens of the answer, by what is measured."""
    if shape == "tiny":
        return {"training": (2, 24, 8), "untouched": (2, 24, 8), "decode": (2, 8, 3)}
    if shape == "paper":  # f7+l7 at batch 32
        return {"training": (32, 192, 64)}
    return {"training": (4, 448, 64), "untouched": (4, 960, 64), "decode": (4, 448, 33)}


def untouched(mode: str) -> LoReftConfig:
    runtime = LoReftRuntimeConfig(untouched_prompt=mode)
    return LoReftConfig(task_type="CAUSAL_LM", r=4, positions="l7", runtime_config=runtime)


CONFIGS: dict[str, dict[str, Callable[[], PeftConfig]]] = {
    "training": METHODS,
    "untouched": {
        "LoRA r=8 (q, v)": METHODS["LoRA r=8 (q, v)"],
        "LoReFT r=4 l7, untouched_prompt='off'": lambda: untouched("off"),
        "LoReFT r=4 l7, untouched_prompt='on'": lambda: untouched("on"),
    },
}


def peak(run: Callable[[], object]) -> float | None:
    """GiB that a call takes on the card at its peak, over what was there before; None without a card."""
    if not torch.cuda.is_initialized():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def training(base: nn.Module, what: str, sizes: tuple[int, int, int], rounds: int) -> Rows:
    """A training step over the floor, and its memory."""
    rows, prompt, answer = sizes
    inputs = batch_of(base, rows, prompt + answer, prompt)
    models = {"floor": floor(base)}
    for name, config in CONFIGS[what].items():
        models[name] = leave_identity(get_peft_model(share(base), config()))
    steps = {name: training_step(model, inputs) for name, model in models.items()}
    found: Rows = {}
    for name, ratio in interleave(steps, "floor", rounds).items():
        low, high = ratio.wall_quartiles
        found[name] = {"over the floor": ratio.wall, "lower quartile": low, "upper quartile": high}
        found[name] |= {"ms": ratio.milliseconds, "peak GiB": peak(steps[name])}
    return found


def decoding(base: nn.Module, sizes: tuple[int, int, int], rounds: int) -> Rows:
    """A decoded token over the base's."""
    rows, prompt, new = sizes
    inputs = batch_of(base, rows, prompt, prompt)
    del inputs["labels"]
    found: Rows = {}
    for name, ratio in decode(base, rounds, new, inputs).items():
        low, high = ratio.wall_quartiles
        found[name] = {"over the base": ratio.wall, "lower quartile": low, "upper quartile": high}
        found[name] |= {"ms a token": ratio.milliseconds / (new - 1)}
    return found


def measure(shape: str, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Rows | str]:
    """Everything of one shape; a text instead of what does not fit on the card."""
    found: dict[str, Rows | str] = {}
    try:
        base = build(SHAPES[shape], device, dtype)
    except torch.OutOfMemoryError:
        return dict.fromkeys(lengths(shape), "does not fit")
    for what, sizes in lengths(shape).items():
        try:
            found[what] = decoding(base, sizes, rounds) if what == "decode" else training(base, what, sizes, rounds)
        except torch.OutOfMemoryError:
            found[what] = "does not fit"
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return found


TITLES = {
    "training": (
        "Training step, over the floor",
        "The floor is the forward, and the backward of activations down to the lowest block's output. Peak: what the "
        "step takes over the weights.",
    ),
    "untouched": ("The same of `l7`, the untouched prompt off and on", "No row shares its beginning with another."),
    "decode": ("A decoded token, over the base", "`generate`, in eager mode."),
}


def sizes(what: str) -> str:
    """How large a batch is, in words."""
    of_shape = {shape: lengths(shape)[what] for shape in ("8B", "paper") if what in lengths(shape)}
    return "; ".join(f"{shape}: {rows} x ({prompt} + {answer})" for shape, (rows, prompt, answer) in of_shape.items())


def page(cards: dict[str, Any]) -> list[str]:
    """The lines of docs/gpu.md that hold figures, the card named in each row."""
    lines: list[str] = []
    for what, (title, about) in TITLES.items():
        rows: Rows = {}
        for card, of_card in cards.items():
            for shape, of_shape in of_card["shapes"].items():
                found = of_shape.get(what, {})
                if isinstance(found, str):
                    lines += ["", f"{title}: {shape} {found} on {card}."]
                    continue
                rows |= {f"{card}, {shape}: {method}": numbers for method, numbers in found.items()}
        if rows:
            settings = "; ".join(f"{card}: {of['settings']}" for card, of in cards.items())
            lines += plain(title, f"{about} Rows, tokens of prompt and answer: {sizes(what)}. {settings}.", rows)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B", "8B", "paper"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="add the results to this JSON file")
    parser.add_argument("--page", type=Path, help="Markdown page whose part between the two marks becomes the tables")
    args = parser.parse_args()
    on_card = args.device == "cuda"
    if on_card and not torch.cuda.is_available():
        raise SystemExit("No card is found. --device cpu --shapes tiny --rounds 2 runs the logic without one.")
    card = torch.cuda.get_device_name() if on_card else f"CPU ({platform.machine()})"
    dtype = torch.bfloat16 if on_card else torch.float32
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    of_card = results.setdefault(card, {"shapes": {}})
    of_card["settings"] = f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {args.rounds} rounds"
    for shape in tqdm(args.shapes):
        of_card["shapes"][shape] = measure(shape, args.device, dtype, args.rounds)
        tqdm.write(json.dumps({card: {shape: of_card["shapes"][shape]}}, indent=1))
        if args.out:  # after each shape, so that a run that is stopped has what it measured
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        if args.page:
            between_marks(args.page, page(results))


if __name__ == "__main__":
    main()
