"""Checks of arguments that several commands take."""

from __future__ import annotations

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

_A_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|zip|gz|zst|bz2|xz)$", re.IGNORECASE)


def check_path(path_or_name: str) -> None:
    """Raise ValueError if `path_or_name` can only be a path and nothing is there.

    A loader would look for it on the Hub, which takes half a minute without a network.
    """
    begins_like_a_path = path_or_name.startswith((".", "~", os.sep))
    is_nested = path_or_name.count("/") > 1 or "\\" in path_or_name  # a name on the Hub is "owner/name"
    is_a_file = _A_FILE.search(path_or_name) or ("." in path_or_name and "/" not in path_or_name)
    if (begins_like_a_path or is_nested or is_a_file) and not os.path.exists(path_or_name):
        raise ValueError(missing(path_or_name, "file or folder"))


def missing(path: str, kind: str) -> str:
    """The message for a path where nothing is, with the name in that folder that is most like it."""
    folder, name = os.path.split(path)
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    similar = get_close_matches(name, there, n=1)
    return f"There is no {kind} {path}." + "".join(f" Did you mean {os.path.join(folder, each)}?" for each in similar)


def parse_positions(text: str) -> Any:
    """The value of `--positions`: a spec as it is; or, from JSON, a mapping from ranges of layers to specs.

    Raises:
        ValueError: `text` begins like JSON and is not valid JSON.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--positions {text} is no JSON: {error}.") from None


def set_by(words: list[str]) -> set[str]:
    """The names of the arguments that a command line sets, or the file that its `--config` names."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    for word, following in zip(words, [*words[1:], ""]):
        option, _, value = word.partition("=")
        if option == "--config":
            names |= {*(yaml.safe_load(Path(value or following).read_text(encoding="utf-8")) or {})}
    return names
