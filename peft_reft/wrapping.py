"""Wrap a method of another library's class, once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `owner.name(*args)` call `wrapper(original, *args)`. Calling it again replaces the wrapper."""
    inner = getattr(owner, name)
    inner = getattr(inner, "_before_peft_reft", inner)

    @wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    wrapped._before_peft_reft = inner  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
