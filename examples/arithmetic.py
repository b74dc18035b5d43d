"""Arithmetic with chains of thought, where LoReFT trails LoRA in the paper: its authors' guesses, measured.

    python examples/arithmetic.py --data LLM_ADAPTERS_CLONE                             # LLaMA-7B, a GPU
    python examples/arithmetic.py --preset cpu --data FOLDER --model SMOLLM2_FOLDER      # GSM8K

LoReFT as in the paper (f7+l7), the same with edits while decoding (f7+l7+g), with one edit shared by all layers, and
LoRA; each with three learning rates, of which the loss on held-out training rows chooses. FOLDER has gsm8k/train.jsonl
and test.jsonl. Accuracy is the share of answers whose last number (AQuA: last letter) is the right one, greedily.
"""

import json
import re
from pathlib import Path
from typing import Any

import llm_adapters
from recipe import Results, arguments, compare, show

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
PAPER = dict(r=8, positions="f7+l7")
METHODS: dict[str, dict[str, Any]] = {
    "loreft": PAPER,
    "loreft, decoding too": {**PAPER, "positions": "f7+l7+g"},
    "loreft, shared by layers": {**PAPER, "tie": "model"},
    "lora": dict(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(
        model="yahma/llama-7b-hf",
        data=".",
        tests=["AQuA", "gsm8k", "mawps", "SVAMP"],
        methods=[*METHODS],
        learning_rates=[3e-4, 9e-4, 2e-3],
        seeds=[42, 43, 44],
        epochs=12.0,
        steps=-1,
        batch=32,
        max_length=512,
        new_tokens=256,
        eval_batch=64,
        rows=10**9,
    ),
    "cpu": dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        data=".",
        tests=["gsm8k"],
        methods=[*METHODS],
        learning_rates=[5e-4, 1e-3, 2e-3],
        seeds=[42],
        epochs=1.0,
        steps=60,
        batch=4,
        max_length=192,
        new_tokens=128,
        eval_batch=32,
        rows=64,
    ),
}


def gsm8k(path: Path) -> list[llm_adapters.Example]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for row in rows:
        reasoning, _, answer = re.sub(r"<<.*?>>", "", row["answer"]).partition("\n#### ")
        answer = answer.replace(",", "")
        found.append(
            {"prompt": row["question"], "completion": f"{reasoning}\nThe answer is {answer}", "answer": number(answer)}
        )
    return found


def number(text: str) -> str | None:
    """The last number in a text, without a fraction of nothing: 72, 0.5; a choice (AQuA) by its letter."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    if not found:
        letters = re.findall(r"\b[A-E]\b", text)
        return letters[-1] if letters else None
    return f"{float(found[-1]):g}"


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, PRESETS, argv)
    folder = Path(args.data)
    if (folder / "gsm8k" / "train.jsonl").is_file():
        rows, tests = gsm8k(folder / "gsm8k" / "train.jsonl"), {"gsm8k": gsm8k(folder / "gsm8k" / "test.jsonl")}
    else:
        rows = llm_adapters.read(folder, training="math_10k")
        tests = {name: llm_adapters.read(folder, test=name) for name in args.tests}
    tests = {
        name: [{**row, "answer": number(row["answer"])} for row in test[: args.rows]] for name, test in tests.items()
    }
    run = llm_adapters.runner(args, METHODS, rows, tests, TEMPLATE, number)
    results = Results(args.output / "results.json")
    table = compare(results, run, args.methods, args.learning_rates, args.seeds)
    show(table, ["method", "parameters", "learning_rate", "test", "lowest", "highest", "seeds", "cpu_minutes"])


if __name__ == "__main__":
    main()
