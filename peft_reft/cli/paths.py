"""Names that are paths or names on the Hub."""

from __future__ import annotations

import os
import re

_A_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|zip|gz|zst|bz2|xz)$", re.IGNORECASE)


def check_path(name: str) -> None:
    """Raise ValueError if `name` can only be a path and nothing is there.

    A loader would look for it on the Hub, which takes half a minute where there is no network.
    """
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name or _A_FILE.search(name)
    if is_path and not os.path.exists(name):
        raise ValueError(f"There is no file or folder {name}.")
