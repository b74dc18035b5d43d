"""Keep keys and values of the untouched part once, and not again in what autograd saves for the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..shapes import Float
from .states import ReadOnlyCache

_outer_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


@dataclass(frozen=True)
class _WithoutStates:
    """Keys or values as attention saved them, without the part that the cache has."""

    states: Float[Tensor, "batch heads untouched d"]
    """Of the cache."""
    times: int
    """How often each head was repeated, for query heads that share one."""
    rest: Any
    """Of the rest, (batch, heads * times, rest, d), as other hooks packed it."""


class SavesRestAlone:
    """Hooks on what autograd saves, while the second part of a forward runs.

    Attention saves the keys and values of a whole row, with heads repeated: as much for an untouched token as for an
    edited one. These hooks keep those of the rest, and put the cache's before them again in the backward. Attention
    masks that are the same in all layers are kept once. All else is left to the hooks that were there before, such as
    those that move activations to the CPU.

    Args:
        cache: that the blocks read.
        rest: number of the second part's columns.
    """

    def __init__(self, cache: ReadOnlyCache, rest: int) -> None:
        self.cache, self.rest = cache, rest
        self.masks: list[Tensor] = []
        self.outer: Any = None
        self.hooks: Any = None

    def start(self) -> None:
        """Begin. Does nothing with a torch that cannot tell which hooks there are."""
        if _outer_hooks is None:
            return
        self.outer = _outer_hooks(False)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def stop(self) -> None:
        """End."""
        if self.hooks is not None:
            self.hooks.__exit__(None, None, None)
            self.hooks, self.masks = None, []

    def _pack(self, tensor: Tensor) -> Any:
        if self.cache.read is not None and tensor.ndim == 4:
            for states in self.cache.read:
                times = self._repeated(tensor, states)
                if times:
                    rest = tensor[:, :, -self.rest :].clone()  # (batch, heads * times, rest, d)
                    return _WithoutStates(states, times, self._pack_outside(rest))
            return self._pack_outside(self._once(tensor))
        return self._pack_outside(tensor)

    def _once(self, tensor: Tensor) -> Tensor:
        """The tensor, or if it is an attention mask that another layer had, that layer's."""
        if tensor.requires_grad or tensor.shape[1] != 1 or tensor.shape[2] != self.rest or tensor.device.type != "cpu":
            return tensor
        for mask in self.masks:
            if mask.dtype == tensor.dtype and torch.equal(mask, tensor):
                return mask
        self.masks.append(tensor)
        return tensor

    def _repeated(self, tensor: Tensor, states: Tensor) -> int:
        """How often each head of `states` stands in `tensor`, before the rest; 0 if these are not its states."""
        batch, heads, untouched, d = states.shape
        if tensor.shape[0] != batch or tensor.shape[2:] != (untouched + self.rest, d) or tensor.shape[1] % heads:
            return 0
        if tensor.device.type != "cpu":  # a comparison would wait for the device
            return 0
        times = tensor.shape[1] // heads
        of_tensor = tensor[:, :, :untouched].unflatten(1, (heads, times))  # (batch, heads, times, untouched, d)
        states = states.to(tensor.dtype).unsqueeze(2)  # (batch, heads, 1, untouched, d); autocast has another type
        return times if torch.equal(of_tensor, states.expand_as(of_tensor)) else 0

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _WithoutStates):
            return self._unpack_outside(packed)
        rest = self._unpack_outside(packed.rest)
        states = packed.states.to(rest.dtype).repeat_interleave(
            packed.times, 1
        )  # (batch, heads * times, untouched, d)
        return torch.cat([states, rest], 2)

    def _pack_outside(self, tensor: Tensor) -> Any:
        return tensor if self.outer is None else self.outer[0](tensor)

    def _unpack_outside(self, packed: Any) -> Tensor:
        tensor: Tensor = packed if self.outer is None else self.outer[1](packed)
        return tensor
