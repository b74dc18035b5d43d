"""Arithmetic with chains of thought, where LoReFT trails LoRA in the paper: its authors' guesses, measured.

    python experiments/arithmetic.py --data LLM_ADAPTERS_CLONE                             # LLaMA-7B, a GPU
    python experiments/arithmetic.py --preset cpu --data FOLDER --model SMOLLM2_FOLDER      # GSM8K
    python experiments/arithmetic.py --preset words --model SMOLLM2_FOLDER                  # word_sums.py

By default the methods are LoReFT as in the paper (f7+l7), the same with edits while decoding (f7+l7+g), the same with
one edit for all layers, and LoRA; `--methods` takes others of methods.py. Each has three learning rates; the loss on
held-out rows chooses one. FOLDER has gsm8k/train.jsonl and gsm8k/test.jsonl; word_sums.py makes its own. `test` is
the loss on other held-out rows. Answers are generated greedily at the chosen rate. An answer is right if its last
number (AQuA: its last letter) is the right one. Results are kept in OUTPUT/results.json and OUTPUT/answers.json.

SmolLM2-135M, 30 steps of 2 rows of GSM8K, one seed, loss on 16 held-out rows: base 1.379, LoReFT 1.057, while decoding
too 0.994, shared by layers 1.141, LoRA 0.944; no method solves one of 16 problems (15 CPU minutes).
"""

import json
import re
from pathlib import Path

from llm_adapters import Example, LanguageSettings, LanguageTask, evaluate, read_test_set, read_training_set
from methods import METHODS
from settings import read_arguments
from tables import comparison_figure, publish, show
from word_sums import TEMPLATE as SHORT_TEMPLATE
from word_sums import rows as word_sums

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
GUESSES = ["loreft", "loreft, decoding too", "loreft, shared by layers", "lora"]
"""The methods of the presets; `--methods` takes any of `methods.py`."""
OUTPUT = Path("outputs/arithmetic")
PRESETS = {
    "paper": LanguageSettings(
        output=OUTPUT,
        model="yahma/llama-7b-hf",
        tests=["AQuA", "gsm8k", "mawps", "SVAMP"],
        methods=GUESSES,
        learning_rates=[3e-4, 9e-4, 2e-3],
        seeds=[42, 43, 44],
        epochs=12.0,
        steps=-1,
        batch=32,
        max_length=512,
        new_tokens=256,
        eval_batch=64,
        rows=10**9,
        held=300,
    ),
    "cpu": LanguageSettings(
        output=OUTPUT,
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        tests=["gsm8k"],
        methods=GUESSES,
        learning_rates=[5e-4, 1e-3, 2e-3],
        seeds=[42],
        epochs=1.0,
        steps=30,
        batch=2,
        max_length=128,
        new_tokens=80,
        eval_batch=16,
        rows=16,
        held=16,
    ),
    "words": LanguageSettings(
        output=Path("outputs/word_sums"),
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        tests=["word_sums"],
        methods=GUESSES,
        learning_rates=[5e-4, 1e-3, 3e-3],
        seeds=[42],
        epochs=1.0,
        steps=150,
        batch=8,
        max_length=128,
        new_tokens=32,
        eval_batch=50,
        rows=200,
        held=200,
    ),
}


def gsm8k(path: Path) -> list[Example]:
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
    """The last number in a text, as 72 or 0.5 (not 72.0). Without a number, the last letter A to E (AQuA)."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    if not found:
        letters = re.findall(r"\b[A-E]\b", text)
        return letters[-1] if letters else None
    return f"{float(found[-1]):g}"


def data(settings: LanguageSettings) -> tuple[list[Example], dict[str, list[Example]]]:
    """Rows to train on, of which the first are held out, and rows to answer."""
    if settings.tests == ["word_sums"]:
        held, rows = word_sums(2 * settings.held, seed=1, test=True), word_sums(10_000, seed=0)
        return held + rows, {"word_sums": word_sums(settings.rows, seed=2, test=True)}
    folder = Path(settings.data)
    if (folder / "gsm8k" / "train.jsonl").is_file():
        rows, tests = gsm8k(folder / "gsm8k" / "train.jsonl"), {"gsm8k": gsm8k(folder / "gsm8k" / "test.jsonl")}
    else:
        rows = read_training_set(folder, "math_10k")
        tests = {name: read_test_set(folder, name) for name in settings.tests}
    for name, found in tests.items():
        tests[name] = [{**row, "answer": number(row["answer"])} for row in found[: settings.rows]]
    return rows, tests


def task_of(settings: LanguageSettings) -> LanguageTask:
    words = settings.tests == ["word_sums"]
    return LanguageTask(
        name="word_sums" if words else "arithmetic",
        settings=settings,
        methods=METHODS,
        rows=data(settings)[0],
        template=SHORT_TEMPLATE if words else TEMPLATE,
    )


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    task = task_of(settings)
    table = evaluate(task, data(settings)[1], number)
    show(table, ["method", "parameters", "learning_rate", "test", "lowest", "highest", "accuracy", "cpu_minutes"])
    publish(task.name, settings, comparison_figure(table, "loss on held-out rows"))


if __name__ == "__main__":
    main()
