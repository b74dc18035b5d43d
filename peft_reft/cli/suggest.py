"""`peft-reft suggest`: a config for a model and rows, why, and what it costs. No weight is loaded."""

from __future__ import annotations

import json
import math
import shlex
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any

from ..tuner.untouched import GAIN
from .arguments import set_by
from .facts import Model, model_facts, rows_facts
from .lengths import Lengths, Shares, shares
from .rules import EPOCHS, RULES, WARMUP, Rule, lowered_by, rate_of, rate_text, rule_for, serving_cost
from .train_arguments import parse

_TASK_TYPES = {"labels": "SEQ_CLS"}
"""Of rows of a form; the others are of causal models, or of models with an encoder and a decoder."""
_OF_RATE = {"r", "layers", "tie", "intervention"}
"""Fields of `LoReftConfig` on which the learning rate depends."""


@dataclass(frozen=True)
class Setting:
    """One line of the answer: a setting, why, and what it costs."""

    name: str
    value: Any
    why: str
    cost: str


@dataclass(frozen=True)
class Suggestion:
    """What is recommended for a model and rows."""

    rule: Rule
    others: list[Rule]
    fields: dict[str, Any]
    """Of `LoReftConfig`, with its task_type."""
    training: dict[str, Any]
    """Arguments of the training."""
    settings: list[Setting]
    parameters: int
    shares: Shares


def run(args: Namespace, words: list[str]) -> None:
    """Print a suggestion.

    Args:
        args: of the command.
        words: what stands behind them: arguments of `train`.
    """
    words = ["--model_name_or_path", args.model, "--dataset_name", args.data, *words]
    data, training, model_arguments, mixture, config = parse("train", words)
    model = model_facts(args.model, model_arguments.model_revision)
    form = next((rule.form for rule in RULES if rule.task == args.task), None)
    lengths = rows_facts(model, data, mixture, training, "labels" if form == "labels" else None)
    own = {name: getattr(config, name) for name in _OF_RATE & set_by(words)}
    found = suggest(model, lengths, args.task, training, own)
    if args.json:
        print(json.dumps(_as_json(model, lengths, found, words), indent=2))
    else:
        print(_as_text(model, lengths, found, words))


def suggest(model: Model, lengths: Lengths, task: str | None, training: Any, own: dict[str, Any]) -> Suggestion:
    """What the rules say.

    Args:
        model: by its config.
        lengths: of the rows.
        task: the value of `--task`; None: the rows say it.
        training: the training's arguments, whose sizes of batches are used.
        own: fields of `LoReftConfig` that somebody has set, to which the learning rate is fitted.

    Raises:
        ValueError: there is no rule for them.
    """
    prompt, answer = lengths.medians()
    rule, others = rule_for(task, model.kind, lengths.form, lengths.rows, prompt, answer)
    task_type = _TASK_TYPES.get(lengths.form, "SEQ_2_SEQ_LM" if model.kind == "encoder-decoder" else "CAUSAL_LM")
    fields = {"task_type": task_type, **rule.fields()}
    share = shares(rule.positions, lengths)
    parameters = model.trained(rule.fields())
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps, why_steps = _steps(rule, lengths.rows, batch)
    rate, why_rate = _rate(rule, model, own)
    warmup = round(WARMUP * steps)
    settings = [
        Setting("positions", rule.positions, rule.why, _cost_of_positions(rule, lengths, share)),
        Setting(
            "r",
            rule.r,
            f"of the rule `{rule.task}` ({rule.evidence})",
            f"{parameters:,} parameters, {parameters / model.parameters:.2%} of the model",
        ),
        Setting(
            "learning_rate",
            rate,
            why_rate,
            "nothing; if the loss stays where it is take three times as much, if it jumps a third",
        ),
        Setting("max_steps", steps, why_steps, f"{steps * batch:,} rows, {batch} in a step"),
        Setting("warmup_steps", warmup, f"{WARMUP:.0%} of the steps, as `make quickstart` has it", "nothing"),
    ]
    if rule.intervention != "loreft":
        settings.insert(1, Setting("intervention", rule.intervention, rule.why_intervention, "nothing more"))
    arguments = {"learning_rate": rate, "max_steps": steps, "warmup_steps": warmup}
    return Suggestion(rule, others, fields, arguments, settings, parameters, share)


def _rate(rule: Rule, model: Model, own: dict[str, Any]) -> tuple[float, str]:
    """The learning rate of a training, and why.

    A classifier's is that of `create_loreft_optimizer`, because its head has another one. An adapter alone has the
    rate that this optimizer gives it.
    """
    if rule.rate is not None:
        return rule.rate, "for so few rows and steps"
    fields = {**rule.fields(), **own}
    lr = rate_of(fields.get("intervention", "loreft"))
    if rule.form == "labels":
        return lr, "of create_loreft_optimizer, which gives the adapter and the head rates of their own"
    lowered, why_lowered = lowered_by(model.config.model_type), ""
    if lowered > 1:
        why_lowered = (
            f"; 1/{lowered} of it, because this model's norms make an edit many times larger "
            "(docs/one_rate.md; create_loreft_optimizer measures it layer by layer)"
        )
    rate = model.rate(fields, lr) / lowered
    return float(f"{rate:.1e}"), f"{rate_text(lr)} fitted to the edited layers, their width and r{why_lowered}"


def _steps(rule: Rule, rows: int | None, batch: int) -> tuple[int, str]:
    """How many steps to train, and why."""
    of_epochs = 0 if rows is None or rule.rate is not None else EPOCHS * math.ceil(rows / batch)
    if of_epochs > rule.steps:
        return of_epochs, f"{EPOCHS} times all rows"
    return (
        rule.steps,
        f"the fewest of the rule; {EPOCHS} times all rows would be {of_epochs}"
        if of_epochs
        else "the fewest of the rule",
    )


def _cost_of_positions(rule: Rule, lengths: Lengths, share: Shares) -> str:
    """Tokens edited, the floor of training, the prefix cache of serving."""
    parts = [f"{share.tokens:.0%} of the tokens are edited"]
    if share.training < 1:
        parts.append(
            f"a training step has {share.training:.2f} of the work of one that trains every token (docs/untouched.md; "
            "on a GPU say --untouched_prompt on)"
        )
    elif lengths.form == "prompts" and share.prefix > 0:
        parts.append(f"a training step is whole: less than {1 - GAIN:.0%} of its work could be left out")
    else:
        parts.append("a training step is whole")
    served = serving_cost(rule.positions, lengths.form)
    if share.prefix > 0:
        served += f", {share.prefix:.0%} of a prompt"
    parts.append(f"serving (docs/serving.md): {served}")
    return "; ".join(parts)


def command(found: Suggestion, words: list[str]) -> str | None:
    """The command that trains so; None if `peft-reft train` cannot.

    Args:
        found: the suggestion.
        words: the model, the rows and further arguments of `train`. What they set stays.
    """
    if found.rule.trained_by != "train" or found.fields["task_type"] != "CAUSAL_LM":
        return None
    given = set_by(words)
    more = {**{name: value for name, value in found.fields.items() if name != "task_type"}, **found.training}
    for name, value in more.items():
        if name not in given:
            words = [*words, f"--{name}", rate_text(value) if name == "learning_rate" else str(value)]
    return shlex.join(["peft-reft", "train", *words])


def _python(found: Suggestion) -> str:
    """The config as Python, and the arguments of a Trainer."""
    fields = ", ".join(f"{name}={value!r}" for name, value in found.fields.items())
    values = {**found.training, "learning_rate": rate_text(found.training["learning_rate"])}
    arguments = ", ".join(f"{name}={value}" for name, value in values.items())
    lines = [f"LoReftConfig({fields})", f"TrainingArguments(..., {arguments})"]
    if found.rule.form == "labels":
        lines.append(f"Trainer(..., optimizers=(create_loreft_optimizer(model, lr={values['learning_rate']}), None))")
    return "\n".join(lines)


def _as_json(model: Model, lengths: Lengths, found: Suggestion, words: list[str]) -> dict[str, Any]:
    prompt, answer = lengths.medians()
    return {
        "model": {
            "name": model.name,
            "kind": model.kind,
            "layers": model.layers,
            "width": model.width,
            "parameters": model.parameters,
        },
        "data": {
            "form": lengths.form,
            "rows": lengths.rows,
            "prompt": prompt,
            "answer": answer,
            "classes": lengths.labels,
        },
        "task": found.rule.task,
        "evidence": found.rule.evidence,
        "config": found.fields,
        "training": found.training,
        "parameters": found.parameters,
        "shares": asdict(found.shares),
        "settings": [asdict(setting) for setting in found.settings],
        "also": {rule.task: rule.fields() for rule in found.others},
        "command": command(found, words),
    }


def _as_text(model: Model, lengths: Lengths, found: Suggestion, words: list[str]) -> str:
    prompt, answer = lengths.medians()
    number = "streamed rows" if lengths.rows is None else f"{lengths.rows:,} rows"
    what = f"texts of {prompt:g} tokens in {lengths.labels} classes" if lengths.form == "labels" else ""
    if lengths.form == "prompts":
        what = f"prompts of {prompt:g} tokens, answers of {answer:g}"
    elif lengths.form == "texts":
        what = f"texts of {answer:g} tokens"
    kind = f"an {model.kind}" if model.kind[0] == "e" else f"a {model.kind}"
    lines = [
        f"Model   {model.name}: {kind}, {model.layers} blocks of width {model.width}, {model.parameters:,} parameters",
        f"Rows    {number}: {what} (medians)",
        f"Task    {found.rule.task}: {found.rule.when} (--task names another)",
        "",
    ]
    for setting in found.settings:
        value = rate_text(setting.value) if setting.name == "learning_rate" else setting.value
        lines += [f"{setting.name} {value}", f"    why    {setting.why}", f"    costs  {setting.cost}"]
    for other in found.others:
        share = shares(other.positions, lengths)
        lines += [
            "",
            f"Also possible: --task {other.task}, positions {other.positions}: {other.why}.",
            f"    costs  {_cost_of_positions(other, lengths, share)}",
        ]
    trained = command(found, words)
    lines += ["", _python(found)]
    if trained is not None:
        lines += ["", trained]
    lines += ["", "docs/choosing.md has all rules. `peft-reft sweep` tries what is around this one."]
    return "\n".join(lines)
