"""What do a model's norms make of edits? `create_loreft_optimizer` measures it on tokens of the vocabulary.

    python experiments/gains.py --data FOLDER --model SMOLLM2_FOLDER --gemma GEMMA_FOLDER --docs docs

For each model the gain behind each edited block, on those tokens and on a question of TREC behind three examples: the
share that an edit changes of what the next norm gives out, over the share that it changes of the hidden state. A few
seconds.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import get_peft_model
from prompts import trec
from runs import Results
from settings import Settings, read_arguments
from tables import publish, show
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft import LoReftConfig
from peft_reft.tools.norm_gains import norm_gains


@dataclass(kw_only=True)
class GainsSettings(Settings):
    output: Path = Path("outputs/gains")
    data: str = "."
    gemma: str = "google/gemma-3-270m"


def measure(model_id: str, question: str) -> dict[str, Any]:
    """The gains of one model, by block."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), LoReftConfig(task_type="CAUSAL_LM"))
    tokens = AutoTokenizer.from_pretrained(model_id)(question, return_tensors="pt")["input_ids"]
    on_text = [*norm_gains(model, tokens).values()]
    return {"vocabulary": [*norm_gains(model).values()], "text": on_text}


def side_by_side(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model: lowest, median and highest gain, and how far both kinds of tokens lie apart."""
    table = []
    for run in runs:
        row: dict[str, Any] = {"model": run["model"], "blocks": len(run["text"])}
        for name in ("vocabulary", "text"):
            low, middle, high = min(run[name]), statistics.median(run[name]), max(run[name])
            row[f"gains on {name}"] = f"{low:.1f} to {high:.1f}, median {middle:.1f}"
        ratios = [max(one / other, other / one) for one, other in zip(run["vocabulary"], run["text"])]
        row["furthest apart"] = f"{max(ratios):.2f} times"
        table.append(row)
    return table


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, {"cpu": GainsSettings(model="HuggingFaceTB/SmolLM2-135M-Instruct")}, argv)
    results = Results(settings.output / "results.json", {})
    (question, _), *_ = trec(Path(settings.data))
    for model_id in (settings.model, settings.gemma):
        results.once({"model": Path(model_id).name}, partial(measure, model_id, question))
    table = side_by_side(results.runs)
    show(table, [*table[0]])
    publish("gains", settings)


if __name__ == "__main__":
    main()
