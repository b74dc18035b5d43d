"""The caches of models: their names, how much they hold, and the notes that they carry (`CacheMemory`)."""

from __future__ import annotations

from typing import Any

import torch

from ..positions.batch import is_matrix
from ..positions.cached import Continued, of_rows, refuse_others
from ..positions.memory import CacheMemory, memory_of, set_memory
from ..positions.sources import Unread
from .forward import Attachment, Forward

_CACHES = ("past_key_values", "cache_params", "state")
"""Names of the states that models keep between forwards: of most models; of Mamba; of RWKV."""


def cache_of_inputs(given: dict[str, Any]) -> Any:
    """The cache among a model's inputs, or None."""
    for name in _CACHES:
        if given.get(name) is not None:
            return given[name]
    return None


def cache_of_output(output: Any) -> Any:
    """The cache that a model returned, or None."""
    for name in _CACHES:
        cache = getattr(output, name, None)
        if cache is not None:
            return cache
    return None


def filled(cache: Any) -> int | None:
    """The number of tokens that a cache holds; None if it holds some and does not say how many."""
    length = counted(cache)
    if length is not None:
        return length
    memory = memory_of(cache)
    return None if memory is None else memory.length


def counted(cache: Any) -> int | None:
    """The number of tokens by the cache's own count; None if it holds some and does not count them."""
    if hasattr(cache, "get_seq_length"):
        try:
            length = int(cache.get_seq_length())
        except ValueError:  # it has no layer of attention, as Mamba's cache
            pass
        else:
            # The first layer may keep its state elsewhere, as MiniMax's does.
            others = (layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length"))
            return length or max((int(layer.get_seq_length()) for layer in others), default=0)
    if hasattr(cache, "has_previous_state"):
        state = cache.has_previous_state
        is_filled = state() if callable(state) else state
        return None if is_filled else 0
    return None


def memory_of_length(cache: Any, past: int | None) -> CacheMemory | None:
    """What is known of the `past` columns that a cache holds now: it may have been cropped, or filled by others."""
    memory = memory_of(cache)
    if memory is None or past is None:
        return memory
    return memory.cut(past) if memory.length >= past else CacheMemory.unknown(past)


def past_of(attachment: Attachment, given: dict[str, Any]) -> tuple[int | None, CacheMemory | None]:
    """The number of columns in the cache that a forward was given, and what is known of them; see `Forward`."""
    cache = cache_of_inputs(given) if attachment.has_answers else None
    if cache is None:
        return 0, None
    past = filled(cache)
    return past, None if past == 0 else memory_of_length(cache, past)


def note_cache(forward: Forward, attachment: Attachment, given: dict[str, Any], output: Any) -> None:
    """Note in the cache that a forward leaves what it holds. Within `generate` only check the cache it began with.

    Args:
        forward: that has ended.
        attachment: of its model.
        given: its inputs, by name.
        output: what the model returned.
    """
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
