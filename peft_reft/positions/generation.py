"""`Generation`: the prompts of one call of `generate`; `GenerateStep`: the position source of one of its forwards."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import Bool, Int
from .cached import compare, of_rows, refuse_others, wrong_cache
from .layout import NO_POSITION
from .memory import CacheMemory
from .resolve import Turns, find_turns, resolve
from .wanted import Wanted, warn


@dataclass
class Generation:
    """The prompts of one call of `generate`, kept until it returns.

    They are noted when the call begins, because no later forward shows where they end: without a cache every forward
    has the whole row, a chunk of a prompt has a filled cache, and the first forward of assisted decoding has
    candidates behind the prompt.
    """

    real: Bool[Tensor, "batch prompt"] | None
    """False on padding; None until the first step, for a decoder beside an encoder."""
    ids: Int[Tensor, "batch prompt"] | None = None
    """Token ids, -1 if one is not known; None if the prompts were given as embeddings."""
    explicit: Int[Tensor, "batch n"] | None = None
    """`intervention_positions`, if the caller gave them."""
    past: int = 0
    """Tokens in the cache at entry."""
    offset: int = 0
    """Columns of the prompt that stand before the first column that `generate` was given."""
    has_mask: bool = False
    """Whether `generate` was given a mask, which then is one of the whole prompt."""
    memory: CacheMemory | None = None
    """Of the cache at entry."""
    subspaces: Int[Tensor, "rows m"] | None = None
    """Rows of R that the edits stay within, if the caller gave them."""
    beside: int | None = None
    """Length of the prompt of forwards that run beside `generate` (classifier-free guidance)."""
    used: dict[str, tuple[Wanted, Tensor | None]] = field(default_factory=dict)
    """What the layers asked, by adapter, and which rows it edits."""
    _others_checked: bool = False
    _resolved: dict[Wanted, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    """What `slots` returned."""
    _whole: dict[Wanted, tuple[Tensor, int]] = field(default_factory=dict)
    """Slots of the prompts and of the columns behind them, and the number of all these columns."""

    def slots(self, wanted: Wanted) -> tuple[Int[Tensor, "batch n"], list[Int[Tensor, "batch prompt"]]]:
        """The columns to edit: the counted slots, and the region of each open-ended group.

        The slots of a `gN` group hold the columns that its tokens will have.
        """
        if wanted in self._resolved:
            return self._resolved[wanted]
        assert self.real is not None
        layout, length = wanted.layout, self.real.shape[1]
        if self.explicit is None:
            # Columns behind the prompt stand for the answer to come.
            more = max(1, wanted.reach)
            seq = length + more
            whole = resolve(layout, self.turns(wanted, more).answers(None if wanted.has_marks else 1))
            self._whole[wanted] = whole, seq
            by_answer, regions = layout.split(whole, seq)
            counted = by_answer.flatten(1)
        else:
            whole = self.explicit.to(self.real.device)
            if layout.fits(whole, length):
                by_answer, regions = layout.split(whole, length)
                counted = by_answer.flatten(1)
            else:  # a caller's flat list of columns
                counted = whole
                regions = [torch.full_like(self.real, NO_POSITION, dtype=torch.long) for _ in layout.open_groups]
        self._resolved[wanted] = counted, [region[:, :length] for region in regions]
        return self._resolved[wanted]

    def turns(self, wanted: Wanted, more: int) -> Turns:
        """The turns of the prompts, with `more` columns behind each prompt that belong to its last answer."""
        assert self.real is not None
        length = self.real.shape[1]
        real = F.pad(self.real, (0, more), value=True)  # (batch, prompt + more)
        answer_at = torch.zeros_like(real)
        answer_at[:, length] = True
        ids = None if self.ids is None else F.pad(self.ids, (0, more), value=-1)
        if ids is None and wanted.needs_end and wanted.has_marks:
            warn(
                "LoReFT finds no headers of a chat template in embeddings: `generate` was given `inputs_embeds` "
                "alone, so its whole input counts as one prompt. Give `input_ids` beside them if it is a chat of "
                "several turns."
            )
        return find_turns(real, ids=ids, marks=wanted.marks, answer_at=answer_at)

    def check_cache(self, adapter: str, wanted: Wanted, rows: Bool[Tensor, " names"] | None = None) -> None:
        """Raise ValueError if the cache that `generate` was given lacks edits of the prompts, or has others."""
        self.used[adapter] = wanted, rows
        if not self.past or self.explicit is not None:
            return
        self.slots(wanted)
        memory = self.memory or CacheMemory(length=self.past)
        assert self.real is not None
        slots, columns = self._whole[wanted]
        real = F.pad(self.real, (0, columns - self.real.shape[1]))
        missing, wrong = compare(adapter, wanted, slots, real, memory, rows)
        if missing or wrong:
            holds = "edits that this prompt does not have" if wrong else "no edits where this prompt has some"
            raise ValueError(wrong_cache(adapter, wanted, holds, memory, slots))

    def check_others(self) -> None:
        """Raise ValueError if the cache that `generate` was given holds edits of an adapter that does not edit now."""
        if self.memory is not None and not self._others_checked:  # all active adapters ask in the first step
            refuse_others(self.memory, self.used)
            self._others_checked = True

    def remember(self, ids: Int[Tensor, "batch n"], length: int) -> CacheMemory:
        """Make the memory of the cache that this call leaves: it holds the first `length` columns of `ids`."""
        assert self.real is not None
        prompt = self.real.shape[1]
        if not prompt <= length <= ids.shape[1] or ids.shape[0] != self.real.shape[0] or self.explicit is not None:
            return CacheMemory.unknown(length)
        memory = CacheMemory()
        edited = {}
        for name, (wanted, rows) in self.used.items():
            turns = self.turns(wanted, length - prompt + 1)
            slots = of_rows(resolve(wanted.layout, turns.answers()), rows)
            part = wanted.layout.part(slots, seq=length + 1, start=0, stop=length)
            edited[name] = part, wanted.layout
        memory.add(ids[:, :length], length, edited, prompt)
        return memory


@dataclass
class GenerateStep:
    """The source of one forward within `generate`."""

    generation: Generation
    start: int
    """Column of the document at which the forward's tokens begin; the prompt begins at column 0."""
    shape: tuple[int, int]
    """(batch, seq) of the forward."""

    def check_cache(self, adapter: str, wanted: Wanted, rows: Bool[Tensor, " names"] | None = None) -> None:
        """See `PositionSource`. One check for each call of `generate` is enough."""
        if adapter not in self.generation.used:
            self.generation.check_cache(adapter, wanted, rows)

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"] | None:
        """See `PositionSource`."""
        batch, seq = self.shape
        layout = wanted.layout
        assert self.generation.real is not None
        length = self.generation.real.shape[1]
        decoded = [group for group in layout if group.decodes]
        if self.start >= length and all(group.count and self.start >= length + group.count for group in decoded):
            return None  # every decode step of a spec without generated tokens ends here
        counted, regions = self.generation.slots(wanted)  # (rows at entry, n); (rows at entry, prompt) each
        column = torch.arange(seq, device=counted.device)  # (seq,)
        inside = (counted >= self.start) & (counted < self.start + seq)
        pieces = [torch.where(inside, counted - self.start, NO_POSITION)]
        for group, region in zip(layout.open_groups, regions):
            in_prompt = region[:, self.start : self.start + seq] >= 0  # (rows at entry, up to seq)
            edited = F.pad(in_prompt, (0, seq - in_prompt.shape[1]), value=False)  # (rows at entry, seq)
            if group.decodes:
                edited = edited | (column + self.start >= length)
            pieces.append(torch.where(edited, column, NO_POSITION))
        slots = torch.cat(pieces, 1)
        if len(slots) != batch:  # beams, `num_return_sequences`: each row at entry stands for several
            slots = slots.repeat_interleave(batch // len(slots), 0)
        return slots
