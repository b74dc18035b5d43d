"""Commonsense reasoning: eight multiple-choice sets in LLM-Adapters' format, greedy decoding, accuracy on each.

    python experiments/commonsense.py --data LLM_ADAPTERS_CLONE                                   # LLaMA-7B, a GPU
    python experiments/commonsense.py --preset cpu --data FOLDER --model SMOLLM2_FOLDER

LoReFT and LoRA are trained on commonsense_170k and evaluated on BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c
and OBQA. If the folder is no such clone, TREC (six choices) and CoLA (true or false) are put into the same format:
FOLDER has trec/*.txt and cola/*.tsv. Each method has three learning rates; the loss on held-out training rows chooses
one, and answers are generated with it. Results are kept in OUTPUT/results.json and OUTPUT/answers.json.

SmolLM2-135M, 40 steps of 4 rows, one seed: LoReFT has 12 of 48 right on TREC and 33 of 48 on CoLA, LoRA the same. Both
learn the format and, it seems, one answer to all (held-out loss 0.206 and 0.204; 9 CPU minutes).
"""

import random
import re
from pathlib import Path
from typing import Any

import glue
from llm_adapters import Example, LanguageSettings, LanguageTask, evaluate, read_test_set, read_training_set
from settings import read_arguments
from tables import comparison_figure, publish, show

TEMPLATE = "{}\n"
METHODS: dict[str, dict[str, Any]] = {
    "loreft": dict(r=8, positions="f7+l7"),
    "lora": dict(r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
}
TESTS = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
OUTPUT = Path("outputs/commonsense")
PRESETS = {
    "paper": LanguageSettings(
        output=OUTPUT,
        model="yahma/llama-7b-hf",
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
        held=300,
    ),
    "cpu": LanguageSettings(
        output=OUTPUT,
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        tests=TESTS,
        methods=[*METHODS],
        learning_rates=[5e-4, 1e-3, 2e-3],
        seeds=[42],
        epochs=1.0,
        steps=40,
        batch=4,
        max_length=128,
        new_tokens=8,
        eval_batch=16,
        rows=48,
        held=24,
    ),
}
_CHOICE = re.compile(r"\b(true|false|solution[12]|answer[1-6]|ending[1-4]|option[12])\b")


def choice(text: str) -> str | None:
    """The first choice that a text names, as the sets spell them: answer3, ending1, true ..."""
    found = _CHOICE.search(text.lower())
    return found[1] if found else None


def as_question(task: str, row: dict[str, Any]) -> Example:
    """A row of TREC or CoLA as LLM-Adapters would put it."""
    if task == "trec":
        kinds = ["description", "entity", "abbreviation", "human", "location", "number"]
        choices = " ".join(f"Answer{n}: {kind}" for n, kind in enumerate(kinds, 1))
        prompt = f"Please choose what the question asks for.\n\nQuestion: {row['text']}\n\n{choices}"
        answer = f"answer{row['label'] + 1}"
    else:
        prompt = f"Please answer with true or false.\n\nIs this good English? {row['sentence']}"
        answer = "true" if row["label"] else "false"
    return {"prompt": prompt, "completion": f"the correct answer is {answer}", "answer": answer}


def data(settings: LanguageSettings) -> tuple[list[Example], dict[str, list[Example]]]:
    """Rows to train on, and to answer."""
    folder = Path(settings.data)
    if (folder / "ft-training_set").is_dir():
        rows = read_training_set(folder, "commonsense_170k")
        return rows, {name: read_test_set(folder, name)[: settings.rows] for name in settings.tests}
    rows, tests = [], {}
    for task in ("trec", "cola"):
        train, test = ([as_question(task, row) for row in part] for part in glue.read(folder, task))
        random.Random(0).shuffle(test)
        rows += train
        tests[task] = test[: settings.rows]
    random.Random(0).shuffle(rows)
    return rows, tests


def task_of(settings: LanguageSettings) -> LanguageTask:
    return LanguageTask("commonsense", settings, METHODS, data(settings)[0], TEMPLATE)


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    table = evaluate(task_of(settings), data(settings)[1], choice)
    table = [{**row, **row["scores"]} for row in table]
    columns = ["method", "parameters", "learning_rate", "test", *table[0]["scores"], "accuracy", "cpu_minutes"]
    show(table, columns)
    # Without the base, which does not know the format and is far off.
    publish("commonsense", settings, comparison_figure(table[1:], "loss on held-out rows"))


if __name__ == "__main__":
    main()
