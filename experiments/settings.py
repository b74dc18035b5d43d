"""The settings of an experiment: a dataclass with presets, and a command line that changes single fields."""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar


@dataclass(kw_only=True)
class Settings:
    """What every experiment has. Each experiment adds its own fields in a subclass."""

    model: str
    """Hub id or folder."""
    data: str | None = None
    """Folder with the data; None takes it from the Hub."""
    output: Path
    """Folder for results, checkpoints and the figure."""
    docs: Path | None = None
    """Folder that gets figures/NAME.png and results/NAME.json as well."""


S = TypeVar("S", bound=Settings)


def read_arguments(doc: str, presets: dict[str, S], argv: list[str] | None = None) -> S:
    """The preset that `--preset` names, with the fields that the command line changes.

    Args:
        doc: the script's docstring, which `--help` prints.
        presets: settings by name; the first is the default.
        argv: the command line without the script's name; None takes that of the process.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=[*presets], default=next(iter(presets)), help="where defaults come from")
    preset = presets[first.parse_known_args(argv)[0].preset]
    parser = argparse.ArgumentParser(description=doc, parents=[first], formatter_class=argparse.RawTextHelpFormatter)
    for field in fields(preset):
        default = getattr(preset, field.name)
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(default, list):
            parser.add_argument(option, default=default, type=type(default[0]), nargs="+", help=f"default: {default}")
        else:
            parser.add_argument(
                option, default=default, type=value_type(field.name, default), help=f"default: {default}"
            )
    arguments = vars(parser.parse_args(argv))
    del arguments["preset"]
    return replace(preset, **arguments)


def value_type(name: str, default: object) -> type:
    """What a field's text on the command line becomes."""
    if name in ("output", "docs"):
        return Path
    return str if default is None else type(default)
