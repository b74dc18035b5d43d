"""The page of the documentation that `worth.py` writes."""

from typing import Any

from tables import markdown

SCORES = ["loss", "accuracy", "within", "seeds"]
COLUMNS = ["method", "parameters", "share", "learning_rate", *SCORES, "minutes", "search"]

PAGE = """# What it is worth

LoReFT beside LoRA on text: the same rows, the same rates to choose from, the same seeds. The model is SmolLM2-135M in
fp32, and trainings are short ({steps} steps). What a 7B model does can differ.

On TREC the default and `l7` are level with LoRA of rank 8, and `l7` trains in less than half the time. CoLA says
nothing yet: no method does better, by more than its error, than to answer always "yes" (0.705).

How to read the tables:

- `loss` is the mean over held-out answers, `accuracy` the share of held-out rows whose likeliest choice is right. Both
  have one standard error, over {rows} held-out rows and over seeds together.
- `share` is the part of the parameters of `lora`, which has rank 8 in the five maps of each block. `within` says
  whether the method is at most one standard error of LoRA's behind it.
- `search` is all that a method cost: each of {rates} rates for a third of the steps, and three seeds at the best for
  all of them. {dev} other rows choose. `minutes` are CPU minutes of one training.

LoReFT is trained with [`create_loreft_optimizer`](one_rate.md). A name says its positions; `loreft` alone is the
default, `f7+l7`. `experiments/methods.py` has the fields of every method.

{tasks}

Command:

    python experiments/worth.py --data FOLDER --model SMOLLM2_FOLDER --docs docs

The runs are in [results/worth.json](results/worth.json).
"""

TASKS = {
    "trec": "Six types of questions, behind an instruction and three examples.",
    "cola": "Is a sentence acceptable? Behind an instruction and two examples.",
    "gsm8k": "Worked solutions of arithmetic problems, the short ones.",
    "sums": "Two-step sums told in words. An answer is right if greedy decoding writes it, reasoning and all.",
    "ultrafeedback": "Instructions and a good model's answers, which are cut at 160 tokens of a row.",
}


def page(table: list[dict[str, Any]], rows: int, dev: int, rates: int) -> str:
    """The text of the page.

    Args:
        table: rows of `worth.beside_lora`.
        rows: that are held out for the tables.
        dev: rows that choose the rate.
        rates: how many there are to choose from.
    """
    parts = []
    for name, text in TASKS.items():
        of_task = [row for row in table if row["task"] == name]
        if of_task:
            prompt, answer = of_task[0]["tokens"]
            tokens = f"A prompt has {prompt:g} tokens and an answer {answer:g} (medians)."
            parts.append(f"## {name}\n\n{text} {tokens}\n\n{markdown(of_task, COLUMNS)}")
    steps = max(row["steps"] for row in table)
    return PAGE.format(steps=steps, rows=rows, dev=dev, rates=rates, tasks="\n\n".join(parts))
