"""The caches of models: what they are called, how much they hold, and what is noted of that (`CacheMemory`)."""

from __future__ import annotations

from typing import Any

import torch

from ..positions.batch import is_matrix
from ..positions.cached import Continued, of_rows, refuse_others
from ..positions.memory import CacheMemory, memory_of, set_memory
from ..positions.sources import Unread
from .forward import (
    Attachment,
    Forward,
)

_CACHES = ("past_key_values", "cache_params", "state")
"""What models call the states that they keep between forwards: most; Mamba; RWKV."""


def cache_of_inputs(given: dict[str, Any]) -> Any:
    return next((cache for name in _CACHES if (cache := given.get(name)) is not None), None)


def cache_of_output(output: Any) -> Any:
    return next((cache for name in _CACHES if (cache := getattr(output, name, None)) is not None), None)


def filled(cache: Any) -> int | None:
    """How many tokens a cache holds; None if it holds some and does not say how many."""
    length = counted(cache)
    if length is None and (memory := memory_of(cache)) is not None:
        return memory.length
    return length


def counted(cache: Any) -> int | None:
    """How many tokens a cache counts; None if it holds some and counts none."""
    if hasattr(cache, "get_seq_length"):
        try:
            length = int(cache.get_seq_length())
        except ValueError:  # without a layer of attention, as Mamba's
            pass
        else:
            # The first layer may keep its state elsewhere, as MiniMax's does.
            others = (layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length"))
            return length or max((int(layer.get_seq_length()) for layer in others), default=0)
    if hasattr(cache, "has_previous_state"):
        state = cache.has_previous_state
        return None if (state() if callable(state) else state) else 0
    return None


def _memory_of_length(cache: Any, past: int | None) -> CacheMemory | None:
    memory = memory_of(cache)
    if memory is None or past is None:
        return memory
    return memory.cut(past) if memory.length >= past else CacheMemory.unknown(past)


def past_of(attachment: Attachment, given: dict[str, Any]) -> tuple[int | None, CacheMemory | None]:
    """How many columns the cache holds that a forward was given, and what is known of them."""
    cache = cache_of_inputs(given) if attachment.has_answers else None
    past = 0 if cache is None else filled(cache)
    return past, _memory_of_length(cache, past) if past != 0 else None


def note_cache(forward: Forward, attachment: Attachment, given: dict[str, Any], output: Any) -> None:
    """Have the cache that a forward outside `generate` leaves know what it holds."""
    if forward.generation is not None:
        forward.generation.check_others()
        return
    if torch.is_grad_enabled() and forward.module.training:
        return
    given_cache, left = cache_of_inputs(given), cache_of_output(output)
    cache = left if left is not None else given_cache
    source = forward.source
    if cache is None or isinstance(source, Unread) or source.shape == (0, 0):
        return
    seq = source.shape[1]
    past, memory = forward.past, forward.memory
    if past is None or (memory is None and past):
        return
    memory = memory or CacheMemory()
    if cache is not given_cache:  # another forward may go on from the given one, too
        memory = memory.copy()
    edited = {}
    for name, wanted in forward.asked.items():
        slots = forward.slots(wanted)
        if slots is not None:
            edited[name] = of_rows(slots, forward.rows_edited_by(name)), wanted.layout
    refuse_others(memory, forward.asked)
    memory = memory.of_rows(source.shape[0])
    ids = given.get("input_ids")
    answer_from = source.answer_from if isinstance(source, Continued) else None
    memory.add(ids if is_matrix(ids, source.shape) else None, seq, edited, answer_from)
    set_memory(cache, memory)
