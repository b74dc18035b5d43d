"""Errors that fit on one line and name the file that is at fault."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 400  # characters of a message that was not written for users


def one_line(error: BaseException) -> str:
    """The error's message with all line breaks replaced by spaces."""
    return " ".join(str(error).split())


@contextmanager
def loading(path_or_name: str, file: str = "") -> Iterator[None]:
    """Turn any error of a loader into a ValueError that names the file. A damaged file can cause almost any error.

    Args:
        path_or_name: folder, or name on the Hub.
        file: the file in it that is loaded; "" if there are several.

    Raises:
        ValueError: the loader raised something. If its message names `path_or_name` already, the message stays.
    """
    try:
        yield
    except Exception as error:
        message = one_line(error)
        if not isinstance(error, ValueError | OSError | ImportError):  # its message was not written for users
            message = f"{type(error).__name__}: {message[:_LONGEST]}"
        elif path_or_name in message:
            raise ValueError(message) from error
        damaged = os.path.join(path_or_name, file) if file else path_or_name
        raise ValueError(f"{damaged} cannot be loaded: {message}") from error
