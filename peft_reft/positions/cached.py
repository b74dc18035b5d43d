"""The position source of a forward behind a filled cache, outside `generate`; and checks of what a cache holds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..shapes import Bool, Int
from .batch import POSITIONS, Batch
from .layout import NO_POSITION
from .memory import CacheMemory, joined_mask
from .resolve import IGNORED, resolve
from .wanted import WAYS_OUT, Wanted, warn, warn_of_plain_forward


@dataclass
class Continued:
    """The source of a forward that feeds a piece to a filled cache, outside `generate`.

    The piece is one new token in a decoding loop of the user's own, the next turn of a chat, or a chunk of a prompt.
    """

    tokens: Tensor
    """Token ids (batch, seq) or embeddings (batch, seq, d) of the piece."""
    ids: Int[Tensor, "batch seq"] | None
    """Token ids of the piece; None if it was given as embeddings."""
    attention_mask: Any
    """As the forward was given it."""
    past: int | None
    """Columns in the cache; None if it does not say."""
    memory: CacheMemory | None
    """Of the cache; None if nothing is known of it."""
    prompt_lengths: tuple[int, ...] | None = None
    """Number of real tokens of each row's prompt (`peft_reft.prompt_lengths`)."""
    _whole: dict[Wanted, Tensor] = field(default_factory=dict)
    """Slots of the whole document: what the cache holds, and the piece."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq) of the piece."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def answer_from(self) -> int | None:
        """Column at which an answer began without a header; None if none did.

        A piece of one token is taken for an answer, because answers are written token by token.
        """
        if self.memory is not None and self.memory.answer_from is not None:
            return self.memory.answer_from
        return self.past if self.shape[1] == 1 else None

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"] | None:
        """See `PositionSource`."""
        (batch, seq), past, memory = self.shape, self.past, self.memory
        known = memory.all_ids() if memory is not None else None
        if known is not None and known.shape[0] != batch:  # `cache.batch_repeat_interleave`, to try several answers
            times, rest = divmod(batch, known.shape[0])
            known = None if rest else known.repeat_interleave(times, 0)
        finds_headers = wanted.has_marks and known is not None and self.ids is not None
        decodes = seq == 1 and self.prompt_lengths is None and not finds_headers
        if decodes and not wanted.edits_answers:
            return None
        if past is None or (decodes and memory is None):
            return self._without_a_memory(wanted)
        # The whole document: what the cache holds, and the piece behind it.
        real = joined_mask(self.attention_mask, self.shape, past, self.tokens.device)  # (batch, past + seq)
        ids = torch.cat([known, self.ids], 1) if known is not None and self.ids is not None else None
        labels = None
        if self.answer_from is not None:
            column = torch.arange(past + seq, device=real.device)
            labels = torch.where(column >= self.answer_from, 0, IGNORED).expand(real.shape)
        whole = Batch(real=real, ids=ids, labels=labels, prompt_lengths=self.prompt_lengths)
        turns = whole.turns(wanted.marks)
        slots = self._whole[wanted] = resolve(wanted.layout, turns.answers())
        if seq > 1 and self.prompt_lengths is None and wanted.needs_every_end and not bool(turns.marked.any(1).all()):
            spec = str(wanted.layout)
            if labels is None:
                warn_of_plain_forward(spec)
            else:
                warn(
                    f"LoReFT takes these {seq} tokens for more of the answer that began at token {self.answer_from}: "
                    f"nothing says whether they begin another prompt, to which positions={spec!r} would refer. "
                    + WAYS_OUT
                )
        return wanted.layout.part(slots, seq=past + seq, start=past, stop=past + seq)

    def _without_a_memory(self, wanted: Wanted) -> Int[Tensor, "batch n"] | None:
        """The slots of a piece behind a cache of which nothing is known: all of it is answer.

        Raises:
            ValueError: `wanted` counts generated tokens.
        """
        if wanted.counts_generated:
            raise ValueError(
                "LoReFT cannot count generated tokens here: the cache does not say how long the prompt was. Use "
                f"`generate`, or pass `{POSITIONS}`."
            )
        if self.shape[1] > 1 and wanted.needs_end:
            warn_of_plain_forward(str(wanted.layout))
        if not wanted.edits_answers:
            return None
        layout = wanted.layout
        column = torch.arange(self.shape[1], device=self.tokens.device).expand(self.shape)  # (batch, seq)
        empty = torch.full_like(column, NO_POSITION)  # (batch, seq)
        counted = column.new_full((self.shape[0], 1, layout.width), NO_POSITION)  # (batch, 1 answer, width)
        return layout.join([counted], [column if group.decodes else empty for group in layout.open_groups])

    def check_cache(self, adapter: str, wanted: Wanted, rows: Bool[Tensor, " names"] | None = None) -> None:
        """See `PositionSource`. Nothing is checked if nothing is known of the cache."""
        memory, slots = self.memory, self._whole.get(wanted)
        if memory is None or slots is None:
            return
        assert self.past is not None
        real = joined_mask(self.attention_mask, self.shape, self.past, self.tokens.device)
        missing, wrong = compare(adapter, wanted, slots, real, memory, rows)
        if wrong:
            raise ValueError(wrong_cache(adapter, wanted, "edits that this document does not have", memory, slots))
        if missing:
            # A header may have been completed after the last tokens of its prompt went by.
            was_edited = adapter in memory.edited or memory.length == 0
            if not was_edited or not all(wanted.layout[number].waits_for_end for number in missing):
                raise ValueError(wrong_cache(adapter, wanted, "no edits where this document has some", memory, slots))
            warn(
                "LoReFT: the header behind which an answer begins was completed after the last tokens of its prompt, "
                "which positions name, had been put into the cache without their edit. Feed a header in one piece "
                "with the prompt's last tokens, or use `generate`."
            )


MOVED = (
    "LoReFT does not know what the cache holds: it comes from beam search or from a call that moved its rows. Encode "
    "the history again, without the cache."
)


def refuse_others(memory: CacheMemory, asked: Collection[str]) -> None:
    """Raise ValueError if a cache holds edits of an adapter that is not among those `asked`."""
    for name in memory.edited:
        if name not in asked and bool(memory.bits(name, memory.length).any()):
            active = ", ".join(map(repr, asked)) or "none"
            raise ValueError(
                wrong_cache(
                    name,
                    Wanted(memory.layout(name), None),
                    f"edits of an adapter that is not active now (active: {active})",
                    memory,
                )
            )


def wrong_cache(
    adapter: str, wanted: Wanted, holds: str, memory: CacheMemory, slots: Int[Tensor, "batch n"] | None = None
) -> str:
    """The message about a cache that `holds` what it should not, or lacks what it should hold.

    Args:
        adapter: name of the adapter that the message is about.
        wanted: what its layers ask.
        holds: what is wrong, to stand behind "The cache holds".
        memory: of the cache.
        slots: what the adapter needs edited of the whole document, if it is active.
    """
    spec = str(wanted.layout)
    both = f" {_held(memory)}"
    if slots is not None:
        columns = sorted({column for column in slots[0].tolist() if 0 <= column < memory.length})
        both += f" This document needs those of {adapter!r} at {_tokens(columns)}."
    return (
        f"The cache holds {holds}, for adapter {adapter!r} with positions={spec!r}: it was filled with another "
        f"adapter, without one, or as a prompt that ended elsewhere.{both} Encode the history again, without the "
        "cache. (With the marks of the chat template, `response_template` and `instruction_template` in the config, "
        "the turns of a chat can share a cache. `with peft_reft.prompt_lengths([...]):` around the pieces of a prompt "
        "says how long the whole prompt will be.)"
    )


def _held(memory: CacheMemory) -> str:
    """What a cache holds in its first row, in a sentence."""
    found = []
    for name in memory.edited:
        columns = memory.bits(name, memory.length)[0].nonzero().flatten().tolist()
        if columns:
            found.append(f"edits of {name!r} ({memory.layout(name)}) at {_tokens(columns)}")
    return f"Its first row has {' and '.join(found) or 'no edits'}."


def _tokens(columns: list[int], most: int = 8) -> str:
    """The first of some columns: "tokens 0, 1, 12"."""
    named = ", ".join(map(str, columns[:most])) + (" ..." if len(columns) > most else "")
    return f"tokens {named}" if columns else "none of its tokens"


def of_rows(slots: Int[Tensor, "batch n"], rows: Bool[Tensor, " names"] | None) -> Int[Tensor, "batch n"]:
    """Empty the slots of the rows that an adapter does not edit.

    Args:
        slots: of all rows.
        rows: whether the adapter edits the rows of each of the caller's `adapter_names`, of which each stands for as
            many rows in turn (beams). None: it edits all.
    """
    if rows is None:
        return slots
    repeated = rows.to(slots.device).repeat_interleave(len(slots) // len(rows))  # (batch,)
    return slots.masked_fill(~repeated.unsqueeze(1), NO_POSITION)


def compare(
    adapter: str,
    wanted: Wanted,
    slots: Int[Tensor, "batch n"],
    real: Bool[Tensor, "batch columns"],
    memory: CacheMemory,
    rows: Bool[Tensor, " names"] | None = None,
) -> tuple[set[int], bool]:
    """Compare the edits that a document needs with those that a cache holds of its beginning.

    Args:
        adapter: name of the adapter.
        wanted: what its layers ask.
        slots: of the whole document.
        real: False on padding, to which nothing attends.
        memory: of the cache.
        rows: which rows the adapter edits, as for `of_rows`.

    Returns:
        The numbers of the groups that lack edits; whether there is an edit too many.

    Raises:
        ValueError: the rows of the cache were reordered, so that nothing is known of them.
    """
    if not memory.certain:
        raise ValueError(MOVED)
    needed = wanted.layout.bits(of_rows(slots, rows), real.shape[1])  # (rows, columns)
    needed = needed[:, : memory.length]  # (rows, columns in the cache)
    if adapter in memory.edited:
        held = memory.bits(adapter, needed.shape[1]).to(needed.device)  # (rows of the cache, columns in the cache)
        if needed.shape[0] % held.shape[0]:
            raise ValueError(MOVED)
        held = held.repeat_interleave(needed.shape[0] // held.shape[0], 0)
        if memory.layout(adapter) != wanted.layout:
            held = (held != 0).long() << 62  # of another spec: no bit of a group can agree
    else:
        held = torch.zeros_like(needed)
    if wanted.everything:  # no matter whether a token was edited as prompt or as answer
        needed, held = (needed != 0).long(), (held != 0).long()
    counts = real[:, : memory.length].long() * -1  # all bits of a real token
    missing, too_many = needed & ~held & counts, held & ~needed & counts
    lacking = {number for number in range(len(wanted.layout)) if bool(((missing >> number) & 1).any())}
    return lacking, bool(too_many.any())
