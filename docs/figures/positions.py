"""The picture of docs/positions.md, from what the code edits.

python docs/figures/positions.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from peft_reft import Positions
from peft_reft.positions.index import make_index
from peft_reft.positions.resolve import find_answers, resolve

PROMPT = ["<s>", "What", "is", "the", "capital", "of", "Italy", "?"]
ANSWER = ["Rome", "is", "the", "capital"]
SPECS = ["f2", "l2", "f2+l2", "l2~1", "p", "g2", "f1+l1+g", "all"]
COLOURS = {"f": "#4c72b0", "l": "#dd8452", "p": "#55a868", "g": "#c44e52"}


def edited(spec: str) -> dict[int, str]:
    """Column -> kind of the group that edits it."""
    tokens = len(PROMPT) + len(ANSWER)
    labels = torch.tensor([[-100] * len(PROMPT) + [1] * len(ANSWER)])
    answers = find_answers(torch.ones(1, tokens, dtype=torch.bool), labels)
    groups = Positions.parse(spec).groups
    slots = resolve(groups, answers)
    return {
        column: group.letter
        for group in groups
        for column in make_index(slots, tokens, groups, (group,), "all")
        .edited.nonzero()
        .flatten()
        .tolist()
    }


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "peft_reft"  # the same file each time
    words = PROMPT + ANSWER
    figure, axes = plt.subplots(figsize=(9, 3.6))
    for row, spec in enumerate(SPECS):
        kinds = edited(spec)
        for column, word in enumerate(words):
            kind = kinds.get(column)
            box = dict(
                boxstyle="round,pad=0.25",
                fc=COLOURS[kind] if kind else "#eeeeee",
                ec="none",
            )
            colour = "white" if kind else "#666666"
            axes.text(
                column,
                -row,
                word,
                ha="center",
                va="center",
                fontsize=9,
                color=colour,
                bbox=box,
            )
        axes.text(
            -0.9, -row, spec, ha="right", va="center", family="monospace", fontsize=10
        )
    axes.axvline(len(PROMPT) - 0.5, color="#999999", linestyle=":", linewidth=1)
    axes.text((len(PROMPT) - 1) / 2, 0.85, "prompt", ha="center", fontsize=10)
    axes.text(
        len(PROMPT) + (len(ANSWER) - 1) / 2, 0.85, "generated", ha="center", fontsize=10
    )
    axes.set(xlim=(-2.4, len(words) - 0.4), ylim=(-len(SPECS) + 0.4, 1.3))
    axes.axis("off")
    figure.savefig(
        Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None}
    )


if __name__ == "__main__":
    main()
