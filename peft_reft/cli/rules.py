"""What `peft-reft suggest` recommends: one rule for each kind of task, and the few numbers that they share.

docs/choosing.md shows this table (`tests/test_suggest.py` compares the two). A number changes here and on the page
when a measurement says so, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..positions.groups import Group
from ..positions.spec import Positions

Kind = Literal["encoder", "decoder", "encoder-decoder"]
"""Of a model: it reads a text, it goes on from one, or it has one part for each."""
Form = Literal["labels", "prompts", "texts"]
"""Of rows: a text with its class, a prompt with its answer, a text."""

LEARNING_RATE = 1e-3
"""Of `create_loreft_optimizer`, which makes an adapter's own rate of it; docs/results/rates.json."""
OTHER_RATES = {"nodireft": 3e-3}
"""The same of formulas that want another; docs/results/worth.json."""
LOWERED = {"gemma3": 5}
"""By the beginning of a model type: what the rate is divided by, because its norms make an edit many times larger.

A config does not say it. `create_loreft_optimizer` measures it on the model, layer by layer; docs/results/gains.json.
"""
STEPS = 300
"""Fewest steps of a training."""
EPOCHS = 3
"""How often each row is trained on, if that makes more steps."""
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Rule:
    """What to take for one kind of task."""

    task: str
    """The value of `--task`."""
    when: str
    """What the task is, in the words of the page."""
    kinds: tuple[Kind, ...]
    form: Form
    chosen: Literal["data", "offered", "asked"]
    """Taken if the data fits; named beside the rule that is taken; or only if somebody asks for it by `--task`."""
    positions: str
    r: int
    why: str
    """Why these positions."""
    evidence: str
    """A file of docs/results, or where else the advice comes from."""
    intervention: str = "loreft"
    why_intervention: str = ""
    """Why this formula, if it is not the default."""
    rate: float | None = None
    """A learning rate for all parameters, instead of `rate_of` and `create_loreft_optimizer`."""
    steps: int = STEPS
    trained_by: Literal["train", "python"] = "train"
    """Whether `peft-reft train` can train it."""
    most_rows: int | None = None
    """It fits data with at most as many rows."""
    least_prompt: int = 0
    """It fits data whose prompts have at least as many tokens, in the median."""
    least_answer: int = 0
    """The same of answers."""

    def fits(self, kind: Kind, form: Form, rows: int | None, prompt: float, answer: float) -> bool:
        """Whether the rule is for such data.

        Args:
            kind: of the model.
            form: of the rows.
            rows: how many there are; None: not known.
            prompt: tokens of the prompts, in the median.
            answer: tokens of the answers, in the median.
        """
        are_few = self.most_rows is None or (rows is not None and rows <= self.most_rows)
        is_long = prompt >= self.least_prompt and answer >= self.least_answer
        return kind in self.kinds and form == self.form and are_few and is_long

    def fields(self) -> dict[str, Any]:
        """The fields of `LoReftConfig` that it sets."""
        given: dict[str, Any] = {"r": self.r, "positions": self.positions}
        if self.intervention != "loreft":
            given["intervention"] = self.intervention
        return given


RULES = [
    Rule(
        task="classes",
        when="a class for each text",
        kinds=("encoder", "decoder"),
        form="labels",
        chosen="data",
        positions="f7+l7",
        r=8,
        why="a classifier reads the first or the last token, and both ends of a text reach it",
        evidence="results/rates.json",
        trained_by="python",
    ),
    Rule(
        task="few-rows",
        when="30 rows or fewer",
        kinds=("decoder",),
        form="prompts",
        chosen="data",
        positions="f7+l7",
        r=4,
        why="the start and the end of a prompt say what is asked",
        evidence="`make quickstart`; the authors' ten examples",
        rate=4e-3,
        steps=30,
        most_rows=30,
    ),
    Rule(
        task="long-prompts",
        when="prompts of 256 tokens or more, of which much repeats",
        kinds=("decoder",),
        form="prompts",
        chosen="offered",
        positions="l7",
        r=8,
        why="all before the end of the prompt stays the base's; as good as f7+l7 on TREC, behind it on worked sums",
        evidence="results/worth.json, [untouched](untouched.md#figures) for the cost",
        least_prompt=256,
    ),
    Rule(
        task="reasoning",
        when="answers of many steps, of 64 tokens or more",
        kinds=("decoder",),
        form="prompts",
        chosen="offered",
        positions="all",
        r=4,
        why="edits of the prompt alone fade in a long answer",
        evidence="results/worth.json",
        intervention="nodireft",
        why_intervention="with half the parameters it learned more than the default (docs/worth.md, gsm8k)",
        least_answer=64,
    ),
    Rule(
        task="answers",
        when="any other prompts and answers",
        kinds=("decoder", "encoder-decoder"),
        form="prompts",
        chosen="data",
        positions="f7+l7",
        r=8,
        why="the start and the end of a prompt say what is asked; decoding stays the base's",
        evidence="results/commonsense.json",
    ),
    Rule(
        task="texts",
        when="texts without prompts",
        kinds=("decoder", "encoder-decoder"),
        form="texts",
        chosen="data",
        positions="all",
        r=8,
        why="nothing says where a prompt ends, and this spec needs no end",
        evidence="[prompts](prompts.md)",
    ),
    Rule(
        task="rewards",
        when="rewards for answers (GRPO, RLOO)",
        kinds=("decoder",),
        form="prompts",
        chosen="asked",
        positions="f7+l7",
        r=8,
        why="rollouts decode at the base's speed",
        evidence="results/grpo.json",
        rate=3e-4,
        steps=12,
        trained_by="python",
    ),
]
"""The first rule that fits and is `chosen="data"` is taken."""


def rule_for(
    task: str | None, kind: Kind, form: Form, rows: int | None, prompt: float, answer: float
) -> tuple[Rule, list[Rule]]:
    """The rule to take, and those to name beside it.

    Args:
        task: the value of `--task`; None: the data says it.
        kind: of the model.
        form: of the rows.
        rows: how many there are; None: not known.
        prompt: tokens of the prompts, in the median.
        answer: tokens of the answers, in the median.

    Raises:
        ValueError: there is none for such a model and such rows. The message names the tasks that there are.
    """
    fitting = [rule for rule in RULES if rule.fits(kind, form, rows, prompt, answer)]
    possible = [rule for rule in RULES if kind in rule.kinds and form == rule.form]
    if task is not None:
        for rule in possible:
            if rule.task == task:
                return rule, [other for other in fitting if other.chosen == "offered" and other is not rule]
        raise ValueError(
            f"--task {task} is not for {_MODELS[kind]} and rows of {_ROWS[form]}. "
            f"Possible: {', '.join(rule.task for rule in possible) or 'none'}."
        )
    for rule in fitting:
        if rule.chosen == "data":
            return rule, [other for other in fitting if other.chosen == "offered"]
    raise ValueError(f"There is no rule for {_MODELS[kind]} and rows of {_ROWS[form]}.")


_MODELS: dict[Kind, str] = {
    "encoder": "an encoder",
    "decoder": "a decoder",
    "encoder-decoder": "an encoder with a decoder",
}
_ROWS: dict[Form, str] = {
    "labels": "texts and labels",
    "prompts": "prompts and answers",
    "texts": "texts alone",
}


def training_cost(positions: str, form: Form) -> str:
    """What a spec costs in training, in words."""
    if form == "prompts" and not edits_start(positions):
        return "no gradient before the end of the prompt"
    return "a whole step"


def serving_cost(positions: str, form: Form) -> str:
    """What a spec costs in serving, in words."""
    if form == "labels":
        return "one forward"
    decoding = "edits each answer token" if edits_answers(positions) else "decodes as the base"
    cache = "prefix cache of its own" if edits_start(positions) else "the base's prefix cache up to the edit"
    return f"{decoding}; {cache}"


def edits_answers(positions: str) -> bool:
    """Whether generated tokens are edited."""
    return any(group.decodes for group in _groups(positions))


def edits_start(positions: str) -> bool:
    """Whether a prompt is edited from its start, as by `f7` or `all`, not at its end alone."""
    return any(not group.decodes and group.letter != "l" for group in _groups(positions))


def _groups(positions: str) -> list[Group]:
    return list(Positions.parse(positions).groups)


def rate_of(intervention: str) -> float:
    """What to give `create_loreft_optimizer` for a formula."""
    return OTHER_RATES.get(intervention, LEARNING_RATE)


def lowered_by(model_type: str) -> int:
    """What the rate of such models is divided by."""
    return next((number for beginning, number in LOWERED.items() if model_type.startswith(beginning)), 1)


def rate_text(rate: float) -> str:
    """A learning rate as people write it: 1e-3."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def table() -> list[str]:
    """The rows of the table on the page, in Markdown."""
    lines = []
    for rule in RULES:
        rate = f"{rate_text(rate_of(rule.intervention))}, fitted" if rule.rate is None else rate_text(rule.rate)
        lines.append(
            f"| `{rule.task}` | {rule.when} | `{rule.positions}` | `{rule.intervention}`, {rule.r} "
            f"| {rate} | {training_cost(rule.positions, rule.form)} "
            f"| {serving_cost(rule.positions, rule.form)} | {rule.evidence} |"
        )
    return lines
