"""`peft-reft exec`: run another program in this process, with LoReFT registered."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.metadata import EntryPoint, entry_points

import peft_reft  # noqa: F401  # registers LoReFT with PEFT, which is what the command is for

_EXPECTED = "expected a console script of this environment, `-m` and a module, or a Python file; then its arguments"


def check(words: list[str]) -> None:
    """Raise ValueError if the words of a command line name no program."""
    if not words:
        raise ValueError(f"exec: {_EXPECTED}.")
    if words[0] == "-m":
        if len(words) == 1:
            raise ValueError("exec -m: expected a module.")
    elif _script(words[0]) is None and not os.path.isfile(words[0]):
        raise ValueError(f"exec {words[0]}: {_EXPECTED} (the environment is {sys.prefix}).")


def run(words: list[str]) -> None:
    """Run a program as its own command would.

    Args:
        words: see `check`.

    Raises:
        SystemExit: of the program.
    """
    program = words[0]
    script = None if program == "-m" else _script(program)
    if program == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif script is not None:
        sys.argv = words
        sys.exit(script.load()())
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
        runpy.run_path(program, run_name="__main__")


def _script(name: str) -> EntryPoint | None:
    """The console script of that name, None if this environment has none."""
    return next(iter(entry_points(group="console_scripts", name=name)), None)
