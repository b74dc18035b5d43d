"""The page of the documentation that `worth.py` writes."""

from textwrap import fill
from typing import Any

from tables import markdown

SCORES = ["loss", "accuracy", "within", "seeds"]
COSTS = ["minutes", "MiB", "prefix", "decoding", "search"]
COLUMNS = ["method", "parameters", "share", "learning_rate", *SCORES, *COSTS]

PAGE = """# What it is worth

LoReFT beside LoRA on text: the same rows, the same rates to choose from, the same seeds. The model is SmolLM2-135M in
fp32 where a table names no other, and trainings are short. What a 7B model does can differ.

How to read the tables:

- `loss` is the mean over held-out answers, `accuracy` the share of held-out rows whose likeliest choice is right. Both
  have one standard error, over {rows} held-out rows and over seeds together.
- `share` is the part of the parameters of `lora`, which has rank 8 in the five maps of each block. `within` says
  whether the method is at most one standard error of LoRA's behind it.
- `search` is all that a method cost: each of {rates} rates for a third of the steps, more of them where the best is
  the lowest or the highest, and `seeds` runs at the best for all steps. {dev} other rows choose.
- `minutes` are CPU minutes of one training, `MiB` what one of its steps keeps for its backward. In serving, `prefix`
  says whose prefix cache can be used up to the first edited token, `decoding` whose answer tokens are computed.
- "Small" means a tenth of LoRA's parameters or less.

LoReFT is trained with [`create_loreft_optimizer`](one_rate.md). A name says its positions; `loreft` alone is the
default, `f7+l7`. `experiments/methods.py` has the fields of every method.

## All tasks

The score of each method that two tasks or more have. **Bold** is level with LoRA: at most one standard error of LoRA's
behind it. The tables below have the errors and the numbers of seeds. Shares are those of the first task.

{overview}

{tasks}

Command:

    python experiments/worth.py --data FOLDER --model SMOLLM2_FOLDER \\
        --gemma GEMMA_FOLDER --mpnet MPNET_FOLDER --docs docs

The runs are in [results/worth.json](results/worth.json).
"""

TASKS = {
    "trec": "Six types of questions, behind an instruction and three examples.",
    "trec, Gemma": "The same with Gemma 3 270M.",
    "trec, MPNet": "The questions alone, with a new head on MPNet-base, an encoder.",
    "cola": "Is a sentence acceptable? Behind an instruction and two examples.",
    "cola, MPNet": "The sentences alone, with a new head on MPNet-base.",
    "gsm8k": "Worked solutions of arithmetic problems, the short ones.",
    "sums": "Two-step sums told in words. An answer is right if greedy decoding writes it, reasoning and all.",
    "ultrafeedback": "Instructions and a good model's answers. Long answers are cut.",
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
            facts = of_task[0]["facts"]
            if "answer" in facts:
                text += f" A prompt has {facts['prompt']:g} tokens and an answer {facts['answer']:g} (medians), both"
                text += " together"
            else:
                text += f" A text has {facts['prompt']:g} tokens (median),"
            steps = max(row["steps"] for row in of_task)
            text += f" {facts['longest']} at most. A training has {steps} steps of {facts['batch']} rows."
            if "majority" in facts:
                text += f" The most frequent answer is right in {facts['majority']:.3f} of the rows."
            said = [f"## {name}", lines(text), lines(verdict(of_task)), markdown(of_task, COLUMNS)]
            parts.append("\n\n".join(part for part in said if part))
    return PAGE.format(rows=rows, dev=dev, rates=rates, overview=overview(table), tasks="\n\n".join(parts))


def overview(table: list[dict[str, Any]]) -> str:
    """A Markdown table of methods by tasks."""
    tasks = [name for name in TASKS if any(row["task"] == name for row in table)]
    of_methods: dict[str, dict[str, dict[str, Any]]] = {}  # by method, by task
    for row in table:
        of_methods.setdefault(row["method"], {})[row["task"]] = row
    scores = {row["task"]: row["score"] for row in table}
    shown = []
    for method, of_tasks in of_methods.items():
        if len(of_tasks) < 2:
            continue
        cells = {"method": method, "share": next((row["share"] for row in of_tasks.values() if row["share"]), "")}
        for task in tasks:
            row = of_tasks.get(task)
            value = "" if row is None else row[row["score"]].split()[0]
            bold = row is not None and row["within"] == "yes"
            cells[f"{task}: {scores[task]}"] = f"**{value}**" if bold else value
        shown.append(cells)
    return markdown(shown, [*shown[0]]) if shown else ""


def verdict(of_task: list[dict[str, Any]]) -> str:
    """Which methods of a task are level with LoRA; of the small ones, how near the nearest comes if none is."""
    lora = next((row for row in of_task if row["method"] == "lora"), None)
    others = [row for row in of_task if row["within"]]
    if lora is None or not others:
        return ""
    level = [row["method"] for row in others if row["within"] == "yes"]
    small = [row for row in others if row["parameters"] <= lora["parameters"] / 10]
    said = [f"At most one standard error behind LoRA: {names(level) or 'none'}."]
    if small:
        nearest, score = min(small, key=lambda row: row["behind"]), lora["score"]
        said.append(
            f"The best of {len(small)} small ones is {names([nearest['method']])}, with {score} {nearest[score]}; "
            f"LoRA has {lora[score]}."
        )
    return " ".join(said)


def lines(text: str) -> str:
    """The text in lines. A name with a hyphen stays whole."""
    return fill(text, 119, break_on_hyphens=False)


def names(methods: list[str]) -> str:
    return ", ".join(f"`{method}`" for method in methods)
