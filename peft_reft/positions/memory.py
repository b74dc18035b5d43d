"""`CacheMemory`: which tokens a cache holds, and which of them were edited.

The memory is an attribute of the cache object. So it survives a deep copy and ends with the cache, and the model keeps
nothing of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import Int
from .layout import Layout

_ATTRIBUTE = "_peft_reft"


@dataclass(frozen=True)
class Edited:
    """Which tokens of a piece one adapter edited."""

    start: int
    """Column of the piece's first token."""
    bits: Int[Tensor, "rows seq"]
    """Bit k is set at the tokens that the k-th group of the layout edits (`Layout.bits`)."""
    layout: Layout


@dataclass
class CacheMemory:
    """The document of each row, as far as a cache holds it.

    Args:
        ids: token ids, one tensor (rows, seq) for each piece that was fed; None for a piece of embeddings.
        length: number of columns.
        answer_from: column at which an answer began without a header; None if none did.
        edited: by adapter, what it edited of each piece.
        certain: False if rows were reordered since (beam search), so that nothing is known of any row.
    """

    ids: list[Tensor | None] = field(default_factory=list)
    length: int = 0
    answer_from: int | None = None
    edited: dict[str, list[Edited]] = field(default_factory=dict)
    certain: bool = True

    @staticmethod
    def unknown(length: int) -> CacheMemory:
        """Make the memory of a cache of which only the number of columns is known."""
        return CacheMemory(ids=[None], length=length, certain=False)

    def add(
        self, ids: Tensor | None, seq: int, edited: dict[str, tuple[Tensor, Layout]], answer_from: int | None
    ) -> None:
        """Add a piece of `seq` tokens.

        Args:
            ids: (rows, seq) token ids; None if the piece was given as embeddings.
            seq: number of its columns.
            edited: by adapter, the slots (rows, n) of the piece and their layout.
            answer_from: column at which an answer began without a header; None if none did.
        """
        self.ids.append(ids)
        for name, (slots, layout) in edited.items():
            bits = layout.bits(slots, seq)
            self.edited.setdefault(name, []).append(Edited(self.length, bits, layout))
        self.length += seq
        if self.answer_from is None:
            self.answer_from = answer_from

    def copy(self) -> CacheMemory:
        """Copy the memory, so that adding to the copy leaves this one as it is."""
        edited = {name: list(pieces) for name, pieces in self.edited.items()}
        return CacheMemory(list(self.ids), self.length, self.answer_from, edited, self.certain)

    def of_rows(self, rows: int) -> CacheMemory:
        """The memory of a cache whose rows were repeated since (`batch_repeat_interleave`); there are `rows` now."""
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
        """The memory of the first `length` columns, for a cache that was cropped since."""
        if length == self.length:
            return self
        ids = self.all_ids()
        edited = {name: [Edited(0, self.bits(name, length), self.layout(name))] for name in self.edited}
        answer_from = self.answer_from if self.answer_from is not None and self.answer_from < length else None
        return CacheMemory([None if ids is None else ids[:, :length]], length, answer_from, edited, self.certain)

    def all_ids(self) -> Tensor | None:
        """The token ids (rows, length); None if a piece was given as embeddings."""
        if not self.ids or any(piece is None for piece in self.ids):
            return None
        joined = torch.cat([piece for piece in self.ids if piece is not None], 1)
        self.ids = [joined]
        return joined

    def layout(self, name: str) -> Layout:
        """The layout of adapter `name`, by which it edited last."""
        return self.edited[name][-1].layout

    def bits(self, name: str, length: int) -> Tensor:
        """The edits of adapter `name`: (rows, length) int64, bit k for the k-th group of its layout."""
        pieces = self.edited[name]
        width = max([length, *(piece.start + piece.bits.shape[1] for piece in pieces)])
        found = torch.zeros(pieces[0].bits.shape[0], width, dtype=torch.long, device=pieces[0].bits.device)
        for piece in pieces:
            bits = piece.bits
            if piece.layout != pieces[-1].layout:  # another adapter of that name made this piece
                bits = (bits != 0).long() << 62
            found[:, piece.start : piece.start + bits.shape[1]] |= bits
        return found[:, :length]


def memory_of(cache: Any) -> CacheMemory | None:
    """The memory of a cache; None if nothing is known of it."""
    return getattr(_carrier(cache), _ATTRIBUTE, None)


def set_memory(cache: Any, memory: CacheMemory) -> None:
    """Give a cache its memory, if it can carry one."""
    carrier = _carrier(cache)
    if carrier is not None:
        setattr(carrier, _ATTRIBUTE, memory)


def _carrier(cache: Any) -> Any:
    """The object that can carry an attribute: the cache, or the first tensor of a list or tuple (RWKV's state)."""
    if isinstance(cache, list | tuple):
        carriers = (_carrier(part) for part in cache)
        return next((carrier for carrier in carriers if carrier is not None), None)
    return cache if hasattr(cache, "__dict__") else None


def joined_mask(mask: Any, shape: tuple[int, int], past: int, device: torch.device) -> Tensor:
    """Which tokens are real, of those that a cache holds and of a piece behind them.

    Args:
        mask: attention mask of both, or of the piece alone; if it is neither, all tokens are taken as real.
        shape: (batch, seq) of the piece.
        past: number of columns in the cache.

    Returns:
        (batch, past + seq) bool.
    """
    batch, seq = shape
    if isinstance(mask, Tensor) and tuple(mask.shape) == (batch, past + seq):
        return mask.bool()
    if isinstance(mask, Tensor) and tuple(mask.shape) == shape:
        return F.pad(mask.bool(), (past, 0), value=True)
    return torch.ones(batch, past + seq, dtype=torch.bool, device=device)
