"""What a cache holds: the tokens that were fed to it, and which of them were edited. Pure torch.

A `CacheMemory` rides on the cache object itself, as an attribute. So it survives a deep copy, ends with the cache, and
nothing about a conversation is kept on the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Layout

_ATTRIBUTE = "_peft_reft"


@dataclass(frozen=True)
class Edited:
    """Which tokens of a piece one adapter edited."""

    start: int
    """Column of the piece's first token."""
    bits: Tensor
    """(rows, seq) int64: bit k is set where the k-th group of the layout edits."""
    layout: Layout


@dataclass
class CacheMemory:
    """The document that a cache holds, of each row.

    Args:
        ids: (rows, n) int64 pieces in order; None where a piece was given as embeddings.
        length: number of columns.
        answer_from: column at which an answer began without a header, or None if all is prompt so far.
        edited: adapter -> what it edited.
        certain: False if rows were moved about since (beam search), so that nothing below can be relied on.
    """

    ids: list[Tensor | None] = field(default_factory=list)
    length: int = 0
    answer_from: int | None = None
    edited: dict[str, list[Edited]] = field(default_factory=dict)
    certain: bool = True

    @staticmethod
    def unknown(length: int) -> CacheMemory:
        """Of a cache with so many columns, of which nothing else is known."""
        return CacheMemory(ids=[None], length=length, certain=False)

    def add(
        self, ids: Tensor | None, seq: int, edited: dict[str, tuple[Tensor, Layout]], answer_from: int | None
    ) -> None:
        """Note a piece of `seq` tokens behind what is there."""
        self.ids.append(ids)
        for name, (slots, layout) in edited.items():
            bits = layout.bits(slots, seq)
            self.edited.setdefault(name, []).append(Edited(self.length, bits, layout))
        self.length += seq
        if self.answer_from is None:
            self.answer_from = answer_from

    def copy(self) -> CacheMemory:
        """One to add to while this one stays."""
        edited = {name: list(pieces) for name, pieces in self.edited.items()}
        return CacheMemory(list(self.ids), self.length, self.answer_from, edited, self.certain)

    def of_rows(self, rows: int) -> CacheMemory:
        """For a cache whose rows were repeated since (`batch_repeat_interleave`), `rows` of them now."""
        tensors = [piece for piece in self.ids if piece is not None]
        tensors += [piece.bits for pieces in self.edited.values() for piece in pieces]
        if all(len(tensor) == rows for tensor in tensors):
            return self
        if any(rows % len(tensor) for tensor in tensors):
            return CacheMemory.unknown(self.length)

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(rows // len(tensor), 0)

        ids = [None if piece is None else repeat(piece) for piece in self.ids]
        edited = {
            name: [Edited(piece.start, repeat(piece.bits), piece.layout) for piece in pieces]
            for name, pieces in self.edited.items()
        }
        return CacheMemory(ids, self.length, self.answer_from, edited, self.certain)

    def cut(self, length: int) -> CacheMemory:
        """The first `length` columns: a cache may have been cropped since."""
        if length == self.length:
            return self
        ids = self.all_ids()
        edited = {name: [Edited(0, self.bits(name, length), self.layout(name))] for name in self.edited}
        answer_from = self.answer_from if self.answer_from is not None and self.answer_from < length else None
        return CacheMemory([None if ids is None else ids[:, :length]], length, answer_from, edited, self.certain)

    def all_ids(self) -> Tensor | None:
        """(rows, length) int64, or None if a piece was given as embeddings."""
        if not self.ids or any(piece is None for piece in self.ids):
            return None
        joined = torch.cat([piece for piece in self.ids if piece is not None], 1)
        self.ids = [joined]
        return joined

    def layout(self, name: str) -> Layout:
        return self.edited[name][-1].layout

    def bits(self, name: str, length: int) -> Tensor:
        """(rows, length) int64: which groups of its layout adapter `name`, one of `edited`, edits."""
        pieces = self.edited[name]
        width = max([length, *(piece.start + piece.bits.shape[1] for piece in pieces)])
        found = torch.zeros(pieces[0].bits.shape[0], width, dtype=torch.long, device=pieces[0].bits.device)
        for piece in pieces:
            bits = piece.bits
            if piece.layout != pieces[-1].layout:  # of an adapter that was replaced by one of the same name since
                bits = (bits != 0).long() << 62
            found[:, piece.start : piece.start + bits.shape[1]] |= bits
        return found[:, :length]


def memory_of(cache: Any) -> CacheMemory | None:
    """What is known of a cache, or None."""
    return getattr(_carrier(cache), _ATTRIBUTE, None)


def set_memory(cache: Any, memory: CacheMemory) -> None:
    """Have a cache carry `memory`, if it can."""
    carrier = _carrier(cache)
    if carrier is not None:
        setattr(carrier, _ATTRIBUTE, memory)


def _carrier(cache: Any) -> Any:
    """What can carry an attribute: the cache, or the first tensor of a list or tuple of them (RWKV's state)."""
    if isinstance(cache, list | tuple):
        return next((carrier for part in cache if (carrier := _carrier(part)) is not None), None)
    return cache if hasattr(cache, "__dict__") else None


def joined_mask(mask: Any, shape: tuple[int, int], past: int, device: torch.device) -> Tensor:
    """(batch, past + seq) bool: real tokens of what the cache holds and of the new piece.

    Args:
        mask: 2-D attention mask of both, or of the new piece alone; else all tokens are taken as real.
        shape: (batch, seq) of the new piece.
        past: columns in the cache.
    """
    batch, seq = shape
    if isinstance(mask, Tensor) and tuple(mask.shape) == (batch, past + seq):
        return mask.bool()
    if isinstance(mask, Tensor) and tuple(mask.shape) == shape:
        return F.pad(mask.bool(), (past, 0), value=True)
    return torch.ones(batch, past + seq, dtype=torch.bool, device=device)
