"""Commonsense reasoning: eight multiple-choice sets in LLM-Adapters' format, greedy decoding, accuracy on each.

    python examples/commonsense.py --data LLM_ADAPTERS_CLONE                                   # LLaMA-7B, a GPU
    python examples/commonsense.py --preset cpu --data LLM_ADAPTERS_CLONE --model SMOLLM2_FOLDER

Trained on commonsense_170k, evaluated on BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA. LoReFT and LoRA
have three learning rates each, of which the loss on held-out training rows chooses.
"""

import re
from pathlib import Path
from typing import Any

import llm_adapters
from recipe import Results, arguments, compare, show

TEMPLATE = "{}\n"
METHODS: dict[str, dict[str, Any]] = {
    "loreft": dict(r=8, positions="f7+l7"),
    "lora": dict(r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
}
TESTS = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(
        model="yahma/llama-7b-hf",
        data=".",
        tests=TESTS,
        methods=[*METHODS],
        learning_rates=[3e-4, 9e-4, 2e-3],
        seeds=[42, 43, 44],
        epochs=6.0,
        steps=-1,
        batch=32,
        max_length=512,
        new_tokens=32,
        eval_batch=64,
        rows=10**9,
    ),
    "cpu": dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        data=".",
        tests=TESTS,
        methods=[*METHODS],
        learning_rates=[5e-4, 1e-3, 2e-3],
        seeds=[42],
        epochs=1.0,
        steps=60,
        batch=4,
        max_length=192,
        new_tokens=12,
        eval_batch=32,
        rows=64,
    ),
}
_CHOICE = re.compile(r"\b(true|false|solution[12]|answer[1-5]|ending[1-4]|option[12])\b")


def choice(text: str) -> str | None:
    """The first choice that a text names, as the sets spell them: answer3, ending1, true ..."""
    found = _CHOICE.search(text.lower())
    return found[1] if found else None


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, PRESETS, argv)
    folder = Path(args.data)
    rows = llm_adapters.read(folder, training="commonsense_170k")
    tests = {name: llm_adapters.read(folder, test=name)[: args.rows] for name in args.tests}
    run = llm_adapters.runner(args, METHODS, rows, tests, TEMPLATE, choice)
    results = Results(args.output / "results.json")
    table = compare(results, run, args.methods, args.learning_rates, args.seeds)
    show(table, ["method", "parameters", "learning_rate", "test", "lowest", "highest", "seeds", "cpu_minutes"])
    for row in table:
        best = next(
            r for r in results.runs if (r["method"], r["learning_rate"]) == (row["method"], row["learning_rate"])
        )
        print(row["method"], {name: round(score, 3) for name, score in best["scores"].items()})


if __name__ == "__main__":
    main()
