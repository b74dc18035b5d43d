"""What a card calls the adapter and its base model. No path of the author's machine is published."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in `__all__`

if TYPE_CHECKING:
    from ..config import LoReftConfig

ADAPTER_PLACEHOLDER = "you/your-adapter"
"""Stands for an adapter that was not pushed to the Hub."""


@dataclass(frozen=True)
class Destination:
    """Where the running push writes to."""

    repository: str
    """Name on the Hub, such as "someone/adapter"."""
    revision: str | None = None
    """A branch; None: the main one."""
    subfolders: tuple[str, ...] = ()
    """The adapters that PEFT saves in folders of their own: all but "default"."""


_destination: ContextVar[Destination | None] = ContextVar("_destination", default=None)


@contextmanager
def pushing_to(destination: Destination | None) -> Iterator[None]:
    """Cards that are written inside this context name `destination`. None: those of an outer context stay."""
    token = _destination.set(destination or _destination.get())
    try:
        yield
    finally:
        _destination.reset(token)


def current_destination() -> Destination | None:
    """Where the running push writes to; None outside of a push."""
    return _destination.get()


def hub_name_of_base(config: LoReftConfig) -> str | None:
    """The base model's name on the Hub; None if the config names none, or names a folder."""
    name: str | None = config.base_model_name_or_path
    return None if not name or is_local(name) else name


def base_in_words(config: LoReftConfig) -> str | None:
    """The base model's name on the Hub, or the last part of its folder's path; None if the config names none."""
    name: str | None = config.base_model_name_or_path
    if not name:
        return None
    return os.path.basename(os.path.abspath(name)) if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether `name` is a file or folder of this machine, or can be nothing else."""
    if os.path.exists(name):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False
