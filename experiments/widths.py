"""How far does one step move a model of random weights? Hidden sizes from 384 to 2048, ranks 1 to 32.

    python experiments/widths.py --docs docs        # about 10 CPU minutes

Each adapter is trained on one batch for STEPS steps at RATE, with AdamW alone ("adamw") and with the rates of
`create_loreft_optimizer` ("fitted"). `step` is |h' - h| / |h| of the last hidden state at the edited tokens after the
first step. `last loss` and `highest loss` are shares of the first: above 1 the training went up. Random weights tell
whether a rate is stable, and nothing of quality.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from runs import Found, Results
from settings import Settings, read_arguments
from tables import publish, show
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reft import LoReftConfig, create_loreft_optimizer

VOCABULARY, PROMPT, ROW = 256, 16, 24
"""Tokens of the vocabulary, of a prompt, and of a prompt with its answer."""


@dataclass(kw_only=True)
class WidthSettings(Settings):
    model: str = "random Llama"
    output: Path = Path("outputs/widths")
    widths: list[int] = field(default_factory=lambda: [384, 768, 1536, 2048])
    ranks: list[int] = field(default_factory=lambda: [1, 8, 32])
    layers: list[int] = field(default_factory=lambda: [4, 8, 16])
    """The first goes with each width and rank; the others with the first of these."""
    steps: int = 20
    rate: float = 1e-3


def measure(settings: WidthSettings, width: int, r: int, layers: int, way: str) -> Found:
    """Train one adapter on one batch of four rows."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 64)
    config = LlamaConfig(**sizes, num_key_value_heads=width // 64, num_hidden_layers=layers, vocab_size=VOCABULARY)
    model = get_peft_model(
        LlamaForCausalLM(config), LoReftConfig(task_type="CAUSAL_LM", r=r, positions="l7", dropout=0.0)
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fitted = way == "fitted"
    optimizer: Any = create_loreft_optimizer(model, lr=settings.rate) if fitted else None
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=0.0)
    tokens = torch.randint(VOCABULARY, (4, ROW))  # (batch, seq)
    labels = tokens.clone()
    labels[:, :PROMPT] = -100
    before, losses, step = hidden(model, tokens, labels), [], 0.0
    for n in range(settings.steps):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if n == 0:
            step = ((hidden(model, tokens, labels) - before).norm() / before.norm()).item()
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "step": step,
        "first": losses[0],
        "last": losses[-1],
        "highest": max(losses) / losses[0],
    }


@torch.no_grad()
def hidden(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the head reads at the edited tokens: (batch, 7, d)."""
    return model(input_ids=tokens, labels=labels, output_hidden_states=True).hidden_states[-1][:, PROMPT - 7 : PROMPT]


def side_by_side(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each shape, with what both ways found."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for run in runs:
        row = found.setdefault((run["width"], run["r"], run["layers"]), {"d": run["width"], "r": run["r"]})
        row["n"] = run["layers"]
        row[f"step, {run['way']}"] = run["step"]
        row[f"last loss, {run['way']}"] = run["last"] / run["first"]
        row["highest loss"] = f"{max(run['highest'], float(row.get('highest loss', 0))):.2f}"
    return [*found.values()]


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, {"cpu": WidthSettings()}, argv)
    results = Results(settings.output / "results.json", dict(steps=settings.steps, learning_rate=settings.rate))
    shapes = [(width, r, settings.layers[0]) for width in settings.widths for r in settings.ranks]
    shapes += [(settings.widths[0], settings.ranks[0], layers) for layers in settings.layers[1:]]
    runs = []
    for width, r, layers in shapes:
        for way in ("adamw", "fitted"):
            fields = dict(width=width, r=r, layers=layers, way=way)
            runs.append(results.once(fields, partial(measure, settings, **fields)))
    table = side_by_side(runs)
    show(table, [*table[0]])
    publish("widths", settings)


if __name__ == "__main__":
    main()
