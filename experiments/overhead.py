"""Overhead: generation time against positions, rank and layers (paper, appendix: ten layers, r=8, about 0.05 s more).

    python experiments/overhead.py                                              # LLaMA-7B, 256 new tokens, a GPU
    python experiments/overhead.py --preset cpu --model SMOLLM2_FOLDER          # 24 new tokens, one CPU thread

The edited model and the frozen base generate in turns, so that a slow moment of the machine hits both. Each round is
compared with the base's in the same round. LoRA (query and value, not merged) stands beside it. One thing changes at a
time, from r=8, the last token, ten layers. The adapters are not trained: time does not depend on what they learned.
Results are kept in OUTPUT/results.json. The figure is OUTPUT/overhead.png (extra `viz`).

SmolLM2-135M, base 1.2 s: LoReFT 0.00 to 0.04 s more over all settings, LoRA 0.01 to 0.08 s (3 CPU minutes).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from runs import Found, Results
from settings import Settings, read_arguments
from tables import publish, pyplot, show
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from measure import interleave, share


@dataclass(kw_only=True)
class OverheadSettings(Settings):
    output: Path = Path("outputs/overhead")
    new_tokens: int
    prompt_tokens: int
    rounds: int
    positions: list[int]
    """Numbers of edited tokens."""
    ranks: list[int]
    layers: list[int]
    """Numbers of layers."""
    seed: int


PRESETS = {
    "paper": OverheadSettings(
        model="huggyllama/llama-7b",
        new_tokens=256,
        prompt_tokens=64,
        rounds=9,
        positions=[1, 2, 8, 32],
        ranks=[1, 8, 64],
        layers=[1, 10, 32],
        seed=42,
    ),
    "cpu": OverheadSettings(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        new_tokens=24,
        prompt_tokens=64,
        rounds=7,
        positions=[1, 2, 8, 32],
        ranks=[1, 8, 64],
        layers=[1, 10, 30],
        seed=42,
    ),
}
Points = dict[int, dict[str, Any]]  # value -> method -> configuration


def spread(count: int, layers: int) -> list[int]:
    return [n * layers // count for n in range(count)]


def loreft(layers: list[int], r: int = 8, positions: str = "l1") -> LoReftConfig:
    return LoReftConfig(task_type="CAUSAL_LM", r=r, positions=positions, layers=layers)


def lora(layers: list[int], r: int = 8) -> LoraConfig:
    targets = ["q_proj", "v_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=targets, layers_to_transform=layers)


def configurations(settings: OverheadSettings, depth: int) -> dict[str, Points]:
    ten = spread(min(10, depth), depth)
    specs = {n: f"f{n // 2}+l{n - n // 2}" if n > 1 else "l1" for n in settings.positions}
    return {
        "positions": {n: {"LoReFT": loreft(ten, positions=spec)} for n, spec in specs.items()},
        "rank": {r: {"LoReFT": loreft(ten, r), "LoRA": lora(ten, r)} for r in settings.ranks},
        "layers": {n: {"LoReFT": loreft(spread(n, depth)), "LoRA": lora(spread(n, depth))} for n in settings.layers},
    }


def measure(base: nn.Module, points: Points, inputs: dict[str, torch.Tensor], tokens: int, rounds: int) -> Found:
    """Seconds that the base takes, and for each point and method how many more, with quartiles over rounds."""
    models = {"base": share(base)}
    for value, methods in points.items():
        models |= {f"{name} {value}": get_peft_model(share(base), config) for name, config in methods.items()}
    generation = dict(inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    runs = {name: partial(model.eval().generate, **generation) for name, model in models.items()}
    ratios = interleave(runs, "base", rounds)
    seconds = ratios.pop("base").milliseconds / 1e3
    more = {
        name: [seconds * (each - 1) for each in (ratio.wall, *ratio.wall_quartiles)] for name, ratio in ratios.items()
    }
    return {"base": seconds, "more": more}


def figure(table: list[dict[str, Any]], tokens: int) -> Any:
    names = list(dict.fromkeys(row["what"] for row in table))
    drawn, axes = pyplot().subplots(1, len(names), figsize=(10, 3), sharey=True, layout="constrained")
    for what, axis in zip(names, axes):
        for n, method in enumerate(("LoReFT", "LoRA")):
            rows = [row for row in table if (row["what"], row["method"]) == (what, method)]
            if rows:
                middle = [row["seconds more"] for row in rows]
                reach = [
                    [m - row["lower"] for m, row in zip(middle, rows)],
                    [row["upper"] - m for m, row in zip(middle, rows)],
                ]
                axis.errorbar(
                    [row["value"] for row in rows], middle, reach, fmt="o-", capsize=3, color=f"C{n}", label=method
                )
        axis.axhline(0, color="0.7", lw=1)
        axis.set(xlabel=what, xscale="log")
        values = sorted({row["value"] for row in table if row["what"] == what})
        axis.set_xticks(values, values)
        axis.minorticks_off()
    axes[0].set_ylabel(f"s more than the base,\n{tokens} new tokens")
    axes[-1].legend()
    return drawn


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    base = AutoModelForCausalLM.from_pretrained(settings.model).eval().requires_grad_(False)
    base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(10, base.config.vocab_size, (1, settings.prompt_tokens), device=base.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    common = dict(new_tokens=settings.new_tokens, prompt_tokens=settings.prompt_tokens, rounds=settings.rounds)
    results, table = Results(settings.output / "results.json", common), []
    for name, points in tqdm(configurations(settings, base.config.num_hidden_layers).items()):
        time = partial(measure, base, points, inputs, tokens=settings.new_tokens, rounds=settings.rounds)
        found = results.once({"what": name, "values": [*points]}, time)
        for key, (middle, lower, upper) in found["more"].items():
            method, value = key.split()
            point = {"what": name, "value": int(value), "method": method}
            table.append({**point, "base": found["base"], "seconds more": middle, "lower": lower, "upper": upper})
    show(table, ["what", "value", "method", "base", "seconds more", "lower", "upper"])
    publish("overhead", settings, figure(table, settings.new_tokens))


if __name__ == "__main__":
    main()
