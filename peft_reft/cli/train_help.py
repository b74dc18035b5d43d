"""The help of the commands that train: what people need, then our arguments; `--help_all` lists TRL's too."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from trl import TrlParser

_NEEDED: dict[str, str | None] = {
    "model_name_or_path": "The base model: a folder, or a name on the Hub.",
    "dataset_name": "The rows: a file (JSON lines, JSON, CSV, TSV, Parquet), a folder, or a name on the Hub.",
    "output_dir": "Where the adapter and the checkpoints are written.",
    "r": None,
    "positions": None,
    "learning_rate": "The learning rate. LoReFT takes a higher one than LoRA.",
    "num_train_epochs": "How often each row is trained on; --max_steps counts steps instead.",
    "per_device_train_batch_size": "Rows in a step, on each device.",
    "eval_strategy": "When to evaluate; it needs rows: --test_split_size, --test_file, or a split of the data set.",
    "test_split_size": "Rows to hold out for the evaluation: a share such as 0.1, or a number.",
}
"""The arguments that people need, in this order, and their help if TRL's, which is for any method, says less."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One name for each argument (`--test_file`, without `--test-file`), and the default only if there is one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        name = next(each for each in action.option_strings if each.startswith("--"))
        return f"{name} {value}".strip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class HelpAll(argparse.Action):
    """`--help_all`: the help with the arguments of TRL's classes."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class TrainParser(TrlParser):
    """TRL's parser, with a help in groups.

    Args:
        classes: dataclasses whose fields are the arguments.
        groups: titles of groups, and the names of the arguments in each; arguments in none are for `--help_all`.
        needed: what people need beside the arguments that all commands have, and its help.
        of_trainer: name of TRL's class whose arguments are for `--help_all`.
        kwargs: for TRL's parser.
    """

    shows_all = False

    def __init__(
        self, classes: Any, groups: dict[str, Collection[str]], needed: dict[str, str], of_trainer: str, **kwargs: Any
    ) -> None:
        usage = f"{kwargs['prog']} --model_name_or_path MODEL --dataset_name ROWS [ARGUMENT ...]"
        super().__init__(classes, usage=usage, **kwargs)
        self.formatter_class = HelpFormatter
        self.add_argument(
            "--help_all",
            action=HelpAll,
            nargs=0,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help="list TRL's arguments too",
        )
        self._of_trainer = of_trainer
        self._needed = {**_NEEDED, **needed}
        self._groups = {"those that people need": list(self._needed), **groups}

    def format_help(self) -> str:
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # `--bf16`, and not its complement `--no_bf16`
        for name, text in self._needed.items():
            actions[name].help = text or actions[name].help
        formatter: argparse.HelpFormatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        shown: set[str] = set()
        for title, names in self._groups.items():
            self._add_section(formatter, title, [actions[name] for name in names if name not in shown])
            shown |= {*names}
        others = [action for name, action in actions.items() if name not in shown and action.option_strings]
        trls = [action for action in others if action.dest not in ("help", argparse.SUPPRESS)]
        if self.shows_all:
            self._add_section(formatter, f"TRL's {self._of_trainer}, and mixtures of data sets", trls)
        self._add_section(formatter, "help", [action for action in others if action not in trls])
        if not self.shows_all:
            formatter.add_text(f"--help_all lists {len(trls)} arguments more: those of TRL's {self._of_trainer}.")
        return formatter.format_help()

    @staticmethod
    def _add_section(formatter: argparse.HelpFormatter, title: str, actions: list[argparse.Action]) -> None:
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
