"""Keys and values of the untouched part of a batch, as the blocks are handed them: they are read and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from ..shapes import Float, Int

States = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (batch, heads, tokens, d) each."""


class ReadOnlyCache(Cache):
    """Keys and values that blocks read and never change.

    `update` returns them with the new ones behind, and keeps nothing. So a block that activation checkpointing runs
    again reads the same states.

    Args:
        states: of each layer.
    """

    def __init__(self, states: States) -> None:
        super().__init__(layers=[_ReadOnlyLayer(keys, values) for keys, values in states])
        self.read: tuple[Tensor, Tensor] | None = None
        """The states that were read last."""
        self.layers_read: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        self.read = layer.keys, layer.values
        self.layers_read.add(layer_idx)
        joined: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        return joined


class _ReadOnlyLayer(DynamicLayer):
    """Keys and values of one layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def to_fill(states: States = ()) -> DynamicCache:
    """A cache that holds `states` and keeps all that is added, with a sliding window too."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(states):
        cache.update(keys, values, number)
    return cache


def states_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """What a cache of `to_fill` holds now.

    Raises:
        TypeError: a layer keeps its state otherwise than as keys and values.
    """
    states = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None or layer.keys.ndim != 4:
            raise TypeError(f"a layer keeps its state in a {type(layer).__name__}")
        states.append((layer.keys, layer.values))
    if not states:
        raise TypeError("the model puts nothing into its cache")
    return states


def map_states(states: States, function: Any) -> list[tuple[Tensor, Tensor]]:
    """`function` of all keys and of all values."""
    return [(function(keys), function(values)) for keys, values in states]


def aligned_right(states: States, lengths: Int[Tensor, " batch"]) -> list[tuple[Tensor, Tensor]]:
    """Move each row's tokens to the right end, so that the rest follows them without a gap.

    Args:
        states: with each row's tokens on the left.
        lengths: how many tokens each row has.
    """
    width = states[0][0].shape[2]
    column = torch.arange(width, device=lengths.device) - (width - lengths).unsqueeze(1)  # (batch, width)
    column = column.clamp(min=0)[:, None, :, None]  # (batch, 1, width, 1)

    def move(tensor: Float[Tensor, "batch heads width d"]) -> Tensor:
        return tensor.take_along_dim(column.to(tensor.device), 2)

    return map_states(states, move)


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
