"""The modes of torch that an edit takes notice of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context with autocast off; an empty one if it is off already, as it nearly always is."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_transform() -> bool:
    """Return whether a transform of `torch.func`, or forward-mode differentiation, sees the operations that run now.

    Both need plain operations: no autograd function that has a `backward` alone, and no write to an input.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
