"""`peft-reft sweep`: train with several settings as `peft-reft train` does, and say which is best, within a budget."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from ..config import DEFAULT_R
from ..edits.formulas import INTERVENTIONS
from .arguments import set_by
from .data import training_data
from .facts import model_facts, rows_facts
from .methods import METHODS
from .rules import WARMUP, rate_text
from .search import Fields, Found, Outcome, candidates, describe, rungs, search
from .suggest import suggest
from .train import make_trainer
from .train_arguments import parse

_HELD_OUT = 200
"""Rows that decide, if there are twice as many."""
_FIELDS = ("positions", "layers", "r", "tie", "learning_rate", "intervention")
_EVALUATES = ["--eval_strategy", "steps", "--eval_steps", str(10**9)]
"""There are rows to evaluate on, and the trainer leaves it to the sweep, which does so at the end of a run."""


def run(args: Namespace, words: list[str]) -> None:
    """Search, and print what is best.

    Args:
        args: of the command.
        words: what stands behind them: arguments of `train`. A field that they set is not searched.
    """
    budget = Budget(args.budget, args.runs)
    if args.budget is None and args.runs is None:
        raise ValueError("Give a budget: --budget MINUTES, or --runs N.")
    for name in ("budget", "runs", "held_out"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value:g}: expected more than 0.")
    given = ["--model_name_or_path", args.model, "--dataset_name", args.data, *words]
    set_by_user = set_by(words)
    if "test_split_size" in set_by_user:
        raise ValueError("--test_split_size: the sweep holds rows out by itself. Give --held-out ROWS.")
    evaluates = _EVALUATES if "test_file" in set_by_user else []
    data, training, model_arguments, mixture, config = parse("train", [*given, *evaluates])
    if training.world_size > 1:
        raise ValueError(
            f"sweep runs in one process, and here are {training.world_size}. Train in several afterwards."
        )
    model = model_facts(args.model, model_arguments.model_revision)
    if model.kind != "decoder":
        raise ValueError(
            f"sweep trains as `peft-reft train` does, causal models only; {args.model} is an {model.kind}."
        )
    rows = training_data(METHODS["train"], data, mixture, training)[0]
    if not isinstance(rows, Dataset):
        raise ValueError("--dataset_streaming true: rows that are streamed cannot be held out. Leave it out.")
    own = {name: getattr(config, name) for name in {*_FIELDS} & set_by_user - {"learning_rate"}}
    found = suggest(model, rows_facts(model, data, mixture, training, None), None, training, own)
    start: Fields = {"layers": "all", "tie": "layer", "intervention": "loreft", **found.fields}
    del start["task_type"]
    given_rate = "learning_rate" in set_by_user
    start["learning_rate"] = training.learning_rate if given_rate else found.training["learning_rate"]
    start |= own
    steps = training.max_steps if "max_steps" in set_by_user else found.training["max_steps"]
    folder = Path(training.output_dir if "output_dir" in set_by_user else "outputs/sweep")
    if not INTERVENTIONS[start["intervention"]].has_rank:
        start["r"] = DEFAULT_R  # the only value that is allowed
        set_by_user.add("r")
    held_out = [] if data.test_file else ["--test_split_size", str(args.held_out or min(_HELD_OUT, len(rows) // 2))]
    table = Table.open(folder / "sweep.json", {"words": given, "held_out": held_out, "steps": rungs(steps)})
    trial = Trials(given + held_out, start, table, budget, folder)
    tries = candidates(start, set_by_user, model.layers, model.width)
    outcome = search(trial.measure, start, tries, rungs(steps))
    if outcome.found is None:
        raise ValueError(f"The budget ended before one run of {rungs(steps)[0]} steps was done. Nothing was found.")
    if math.isinf(outcome.found.loss):
        raise ValueError(
            f"No run had a finite loss; the start's learning rate is {start['learning_rate']}. Give a lower one."
        )
    best = _best(outcome, trial, given, steps)
    table.write(best)
    trial.config_of(outcome.best, steps).save_pretrained(str(folder / "best"))
    print(json.dumps(best, indent=2) if args.json else _as_text(best, outcome, start, folder))


class Budget:
    """What is left of minutes and of runs."""

    def __init__(self, minutes: float | None, runs: int | None) -> None:
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.runs = math.inf if runs is None else runs

    def has(self, seconds: float) -> bool:
        """Whether a run of so many seconds ends in time, and one may be begun."""
        return self.runs >= 1 and time.monotonic() + seconds <= self.deadline


@dataclass
class Table:
    """The runs, in a file. What is there is not run again."""

    path: Path
    settings: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of the answers of the held-out rows."""

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Table:
        """Read the table, or begin one.

        Raises:
            ValueError: the file has the runs of other settings.
        """
        if not path.exists():
            return cls(path, settings)
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if content["settings"][name] != value:
                raise ValueError(
                    f"{path} has runs with {name}={content['settings'][name]}, and now it is {value}. Give another "
                    "--output_dir, or the same settings."
                )
        return cls(path, settings, content["runs"], content["tokens"])

    def find(self, fields: Fields, steps: int) -> Found | None:
        """What was found with these fields and steps, if it was run."""
        for each in self.runs:
            if each["fields"] == fields and each["steps"] == steps:
                return Found([math.nan if loss is None else loss for loss in each["losses"]], self.tokens)
        return None

    def add(self, fields: Fields, steps: int, found: Found, more: dict[str, Any]) -> None:
        """Note a run, and write the file.

        Raises:
            ValueError: its held-out rows are not those of the runs before.
        """
        if self.tokens and self.tokens != found.tokens:
            raise ValueError(f"The rows have changed since {self.path} was begun. Give another --output_dir.")
        self.tokens = found.tokens
        losses = [round(loss, 4) if math.isfinite(loss) else None for loss in found.sums]
        loss = round(found.loss, 5) if math.isfinite(found.loss) else None
        error = round(found.error, 5) if math.isfinite(found.error) else None
        self.runs.append({"fields": fields, "steps": steps, "loss": loss, "error": error, **more, "losses": losses})
        self.write(None)

    def write(self, best: dict[str, Any] | None) -> None:
        """Write the file beside itself and put it in its place, so that an interruption leaves it whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings, "best": best, "tokens": self.tokens, "runs": self.runs}
        new = self.path.with_suffix(".new")
        new.write_text(_lines(content), encoding="utf-8")
        os.replace(new, self.path)


def _lines(content: dict[str, Any]) -> str:
    """JSON with one line for each run."""
    runs = ",\n".join(json.dumps(each) for each in content["runs"])
    head = {name: value for name, value in content.items() if name != "runs"}
    return json.dumps(head)[:-1] + ',\n"runs": [\n' + runs + "\n]}\n"


class StopAt(TrainerCallback):
    """Ends a training when its time is over."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.deadline and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True


@dataclass
class Trials:
    """Runs of the sweep, each as `peft-reft train` with the same words would train it."""

    words: list[str]
    start: Fields
    table: Table
    budget: Budget
    folder: Path
    by_step: float = 0.0
    """Seconds that a step takes, the longest so far."""
    beside: float = 0.0
    """Seconds that a run takes beside its steps: loading, scoring."""

    def __post_init__(self) -> None:
        for each in self.table.runs:
            self._learn(each["seconds_of_training"], each["seconds_beside"], each["steps"])

    def words_of(self, fields: Fields, steps: int) -> list[str]:
        """The arguments of `train` for a setting, without those that make it silent."""
        chosen = {**fields, "learning_rate": rate_text(fields["learning_rate"]), "max_steps": steps}
        if "warmup_steps" not in set_by(self.words):
            chosen["warmup_steps"] = round(WARMUP * steps)
        words = []
        for name, value in chosen.items():
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{name}", text]
        return words

    def config_of(self, fields: Fields, steps: int) -> Any:
        return parse("train", [*self.words, *self.words_of(fields, steps)])[-1]

    def measure(self, fields: Fields, steps: int) -> Found | None:
        """Train and score a setting, if it is not in the table; None if there is no time for it."""
        known = self.table.find(fields, steps)
        if known is not None:
            return known
        if not self.budget.has(self.beside + self.by_step * steps):
            return None
        self.budget.runs -= 1
        found = self._train(fields, steps)
        if found is not None:
            print(
                f"{steps:5} steps  loss {found.loss:.4f} ± {found.error:.4f}  {describe(fields, self.start)}",
                file=sys.stderr,
            )
        return found

    def _train(self, fields: Fields, steps: int) -> Found | None:
        silent = {"save_strategy": "no", "disable_tqdm": "true"}
        # One row at a time: the mean that the trainer returns is that of the row then, whatever its head computes.
        silent |= {"per_device_eval_batch_size": "1", "eval_packing": "false", "output_dir": str(self.folder / "runs")}
        words = [*self.words, *self.words_of(fields, steps), *_EVALUATES]
        for name, value in silent.items():
            words += [f"--{name}", value]
        began = time.monotonic()
        data, training, model, mixture, config = parse("train", words)
        train_rows, test_rows = training_data(METHODS["train"], data, mixture, training)
        stop = StopAt(self.budget.deadline - self.beside)
        trainer = make_trainer(METHODS["train"], model, training, train_rows, test_rows, config, [stop])
        trainer.remove_callback(PrinterCallback)
        began_training = time.monotonic()
        with warnings.catch_warnings():
            # Rates that are too low are tried on purpose.
            warnings.filterwarnings("ignore", "LoReFT: this run does not learn", UserWarning)
            trainer.train()
        ended_training = time.monotonic()
        logging.getLogger("peft_reft").setLevel(logging.WARNING)  # the first row is that of every run
        if stop.stopped:
            return None
        found = held_out(trainer)
        parameters = trainer.model.get_nb_trainable_parameters()[0]
        del trainer
        gc.collect()
        took = ended_training - began_training
        more = time.monotonic() - began - took
        self._learn(took, more, steps)
        seconds = {"seconds_of_training": round(took, 2), "seconds_beside": round(more, 2)}
        self.table.add(fields, steps, found, {"parameters": parameters, **seconds})
        return self.table.find(fields, steps)

    def _learn(self, training: float, beside: float, steps: int) -> None:
        """Note how long a run took."""
        self.by_step = max(self.by_step, training / steps)
        self.beside = max(self.beside, beside)


def held_out(trainer: Any) -> Found:
    """The loss on each row that the trainer evaluates on, by the trainer's own evaluation."""
    trainer.model.eval()
    sums, tokens = [], []
    for inputs in trainer.get_eval_dataloader():
        count = int((inputs["labels"][:, 1:] != -100).sum())
        if not count:
            continue
        with torch.no_grad():
            loss = trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)[0]
        sums.append(float(loss) * count)
        tokens.append(count)
    return Found(sums, tokens)


def _best(outcome: Outcome, trial: Trials, given: list[str], steps: int) -> dict[str, Any]:
    """The best setting, what it had, and the command that trains with it."""
    assert outcome.found is not None
    words = trial.words_of(outcome.best, steps)
    kept = _without(given, {"output_dir", "test_file", *set_by(words)})
    scores = {"loss": outcome.found.loss, "error": outcome.found.error}
    return {
        "fields": outcome.best,
        "steps": outcome.steps,
        "held_out_rows": len(outcome.found.tokens),
        **scores,
        "start": None if outcome.start is None else outcome.start.loss,
        "not_tried": outcome.left,
        "command": shlex.join(["peft-reft", "train", *kept, *words]),
    }


def _without(words: list[str], names: set[str]) -> list[str]:
    """The words without the arguments of these names and their values."""
    kept, drops = [], False
    for word in words:
        if word.startswith("--"):
            drops = word[2:].partition("=")[0].replace("-", "_") in names
        if not drops:
            kept.append(word)
    return kept


def _as_text(best: dict[str, Any], outcome: Outcome, start: Fields, folder: Path) -> str:
    change = describe(best["fields"], start)
    lines = [
        "",
        f"Best: {change}. Loss {best['loss']:.4f} ± {best['error']:.4f} on {best['held_out_rows']} held-out rows "
        f"after {best['steps']} steps" + (f"; the start had {best['start']:.4f}." if change != "the start" else "."),
    ]
    if outcome.left:
        lines.append(f"Not tried, for the budget ended: {'; '.join(outcome.left)}. The same command goes on.")
    lines += [f"All runs: {folder / 'sweep.json'}. The config: {folder / 'best'}", "", best["command"]]
    return "\n".join(lines)
