"""Beginnings that rows share, such as a system prompt: what was computed of them is kept from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..positions.split import common_beginning
from .states import States, map_states, size_of


@dataclass(frozen=True)
class Beginning:
    """What the base model computed of some tokens at the beginning of a row."""

    key: Hashable
    """What else the states depend on: weights, types, the column of the first token."""
    ids: tuple[int, ...]
    states: States
    """Of one row: (1, heads, tokens, d) each."""
    output: Tensor
    """(1, tokens, ...), what the module returned for each token."""

    @property
    def bytes(self) -> int:
        return size_of(self.output, *[tensor for pair in self.states for tensor in pair])

    def first(self, tokens: int, device: torch.device) -> Beginning:
        """The beginning's first `tokens` tokens, on `device`."""
        states = map_states(self.states, lambda tensor: tensor[:, :, :tokens].to(device))
        return Beginning(self.key, self.ids[:tokens], states, self.output[:, :tokens].to(device))

    def to(self, device: str) -> Beginning:
        """The same on another device."""
        return self.first(len(self.ids), torch.device(device))


class Beginnings:
    """Beginnings by their tokens. The one that was not used for the longest time makes room for a new one.

    Args:
        limit: bytes that all of them may take together.
        device: where they are kept; None: where they are.
    """

    def __init__(self, limit: int = 0, device: str | None = None) -> None:
        self.limit = limit
        self.device = device
        self.last_row: list[int] = []
        """The untouched part of the first row of the step before."""
        self._kept: OrderedDict[Hashable, Beginning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(beginning.bytes for beginning in self._kept.values())

    def clear(self) -> None:
        """Drop all that is kept."""
        self._kept.clear()
        self.last_row = []

    def find(self, key: Hashable, ids: tuple[int, ...]) -> tuple[Beginning, int] | None:
        """The beginning that has most tokens in common with `ids`, and their number; None if there is none."""
        best: tuple[Beginning, int] | None = None
        for beginning in self._kept.values():
            if beginning.key == key:
                tokens = common_beginning([beginning.ids, ids])
                if tokens and (best is None or tokens > best[1]):
                    best = beginning, tokens
        if best is not None:
            self._kept.move_to_end((best[0].key, best[0].ids))
        return best

    def keep(self, beginning: Beginning) -> None:
        """Keep a beginning, unless it is larger than the limit by itself."""
        if beginning.bytes > self.limit:
            return
        if self.device is not None:
            beginning = beginning.to(self.device)
        self._kept[beginning.key, beginning.ids] = beginning
        while self.bytes > self.limit:
            self._kept.popitem(last=False)


def fingerprint(module: nn.Module, samples: int = 8) -> tuple[Hashable, ...]:
    """Tell the weights of a module from what they become when somebody changes them.

    Address and version tell of every change but those through `.data` or NumPy. Of these a few elements of each weight
    tell, unless all of them stay as they are.

    Args:
        module: whose parameters and buffers are looked at.
        samples: how many elements of each weight are read.
    """
    tensors = [*module.parameters(), *module.buffers()]
    seen = []
    for tensor in tensors:
        if tensor.requires_grad or tensor.numel() == 0 or tensor.is_meta:
            continue
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        wide = torch.float32 if tensor.device.type == "mps" else torch.float64  # a Mac's GPU has no float64
        seen.append(flat[:: max(1, flat.numel() // samples)][:samples].to(wide).sum())
    read = torch.stack([each.to(seen[0]) for each in seen]).tolist() if seen else []
    return (*[(tensor.data_ptr(), tensor._version) for tensor in tensors if not tensor.requires_grad], *read)
