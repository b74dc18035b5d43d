"""Two tasks in disjoint parts of one R, used alone or together (arXiv 2404.03592, the section on composing subspaces).

    python experiments/composition.py --data FOLDER
    python experiments/composition.py --data FOLDER --model outputs/SmolLM2-135M-Instruct

FOLDER has german/train.en and german/train.de, with one sentence a line, and ultrafeedback_1k/ultrafeedback_1k.json,
with lines of JSON that have `instruction` and `output`. Rows 0-3 of R learn to answer in German: a caption is answered
by its translation. Rows 4-7 learn to follow instructions. Then the same questions are answered with the one part, with
the other and with both, and the script prints the share of German words in the answers. Results are in
OUTPUT/results.json. The figure is OUTPUT/composition.png (extra `viz`). Training goes on from the last checkpoint in
OUTPUT/checkpoints. On SmolLM2-135M-Instruct (60 steps, 6 minutes on one core):

    neither       0%   Dogs are curious creatures that love exploring and discovering. They enjoy learning new ...
    German       66%   Ein Land, eine neuen Mann während. Einen Mann kennen sind.
    instructions  0%   Dogs are social animals that enjoy interacting with their human companions, and they ...
    both         47%   Ein kleine Mann, die sich einer neuen Hausbauer habelt ...

A model of this size knows little German. What can be seen is that the language follows the rows in use.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from runs import write_json
from settings import Settings, read_arguments
from tables import publish, pyplot
from training import CHECKPOINTS, resume
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_reft import DataCollatorForLoReft, LoReftConfig

GERMAN, INSTRUCTIONS = [0, 1, 2, 3], [4, 5, 6, 7]
QUESTIONS = ["What do dogs like to do?", "Describe a park in summer.", "What are people doing on the street?"]
GERMAN_WORDS = re.compile(
    r"\b(der|die|das|den|dem|des|eine?[mnrs]?|und|oder|ist|sind|hat|haben|wird|auf|im|mit|von|vom|zu|zum|zur|bei|aus|für|"
    r"nicht|sich|es|er|sie|ihre?|seine?|über|unter|vor|während|als|wie|auch|nach|mann|frau|kinder|junge|mädchen|männer|"
    r"hund|straße|steht|sitzt|geht|spielt|einige|zwei|drei|viele|menschen)\b"
)


def examples_of(folder: Path, tokenizer, count: int) -> list[dict]:
    """Examples of both tasks, with the rows of R that each may use."""

    def example(text: str, answer: str, subspaces: list[int]) -> dict:
        prompt, rest = tokenizer(text)["input_ids"], tokenizer(answer)["input_ids"][:48]
        return {"input_ids": prompt + rest, "labels": [-100] * len(prompt) + rest, "subspaces": subspaces}

    english, german = (
        (folder / "german" / f"train.{language}").read_text(encoding="utf-8").splitlines()[:count]
        for language in ("en", "de")
    )
    lines = (folder / "ultrafeedback_1k" / "ultrafeedback_1k.json").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    captions = [example(question(text), f" {answer}\n", GERMAN) for text, answer in zip(english, german)]
    return captions + [example(question(row["instruction"][:200]), f" {row['output']}", INSTRUCTIONS) for row in rows]


def question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


@torch.no_grad()
def answers(model, tokenizer, subspaces: list[int]) -> list[str]:
    tokenizer.padding_side = "left"
    inputs = tokenizer([question(text) for text in QUESTIONS], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(
        **inputs.to(model.device), subspaces=subspaces, max_new_tokens=24, do_sample=False, repetition_penalty=1.1
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share_of_german(texts: list[str]) -> float:
    text = " ".join(texts).lower()
    return len(GERMAN_WORDS.findall(text)) / max(1, len(text.split()))


def figure(results: dict[str, dict]) -> object:
    drawn, axis = pyplot().subplots(figsize=(5, 2.4), layout="constrained")
    shares = [100 * found["share of German words"] for found in results.values()]
    axis.barh([*results], shares)
    axis.invert_yaxis()
    axis.set(xlabel="German words in the answers, %", ylabel="rows of R in use", xlim=(0, 100))
    return drawn


@dataclass(kw_only=True)
class CompositionSettings(Settings):
    data: str = "."
    output: Path = Path("outputs/composition")
    steps: int = 60
    examples: int = 1000
    """Rows of each task."""
    learning_rate: float = 5e-3
    positions: str = "f2+l4"
    seed: int = 42


def main(argv: list[str] | None = None) -> None:
    preset = CompositionSettings(model="HuggingFaceTB/SmolLM2-135M-Instruct")
    settings = read_arguments(__doc__, {"cpu": preset}, argv)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    config = LoReftConfig(task_type="CAUSAL_LM", r=8, positions=settings.positions)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(settings.model), config)
    model.print_trainable_parameters()
    data = examples_of(Path(settings.data), tokenizer, settings.examples)
    random.shuffle(data)
    tokenizer.padding_side = "right"
    training = TrainingArguments(
        output_dir=str(settings.output / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=8,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.steps // 10,
        logging_steps=max(1, settings.steps // 6),
        remove_unused_columns=False,  # `subspaces` is not an argument of the model's forward, but of ours
        seed=settings.seed,
        report_to="none",
        **CHECKPOINTS,
    )
    collator = DataCollatorForLoReft(DataCollatorForSeq2Seq(tokenizer), config)
    resume(Trainer(model, training, train_dataset=data, data_collator=collator))
    model.save_pretrained(settings.output / "adapter")

    model.eval()
    results = {}
    used = {"neither": [], "German": GERMAN, "instructions": INSTRUCTIONS, "both": GERMAN + INSTRUCTIONS}
    for name, subspaces in used.items():
        given = answers(model, tokenizer, subspaces)
        results[name] = {"share of German words": share_of_german(given), "answers": given}
        print(f"\n{name}: {share_of_german(given):.0%} German words")
        for text, answer in zip(QUESTIONS, given):
            print(f"  {text:40} {' '.join(answer.split())}")
    write_json(settings.output / "results.json", results)
    publish("composition", settings, figure(results))


if __name__ == "__main__":
    main()
