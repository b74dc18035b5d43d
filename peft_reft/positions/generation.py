"""Positions of the forwards of one call of `generate`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .cached import compare, of_rows, refuse_others, wrong_cache
from .memory import CacheMemory, part_of
from .resolve import Turns, find_turns, resolve
from .spec import NO_POSITION, slots_per_answer
from .wanted import Wanted, warn


@dataclass
class Generation:
    """The prompts of one call of `generate`, kept until it returns.

    Capturing them at entry is what holds for every way of decoding. What a later forward shows (an empty cache, the
    number of its tokens) does not: without a cache every forward has the whole row, a chunk of a prompt has a filled
    cache, and assisted decoding's first forward has candidates behind the prompt.
    """

    real: Tensor | None
    """(rows at entry, prompt length) bool; None until the first step, for a decoder beside an encoder."""
    ids: Tensor | None = None
    """(rows at entry, prompt length) int64, -1 where they are not known."""
    explicit: Tensor | None = None
    past: int = 0
    """Tokens in the cache at entry."""
    offset: int = 0
    """Columns of the prompt before the first that `generate` was given."""
    has_mask: bool = False
    """Whether `generate` was given a mask, which then is one of the whole prompt."""
    memory: CacheMemory | None = None
    """Of the cache at entry."""
    subspaces: Tensor | None = None
    beside: int | None = None
    """Length of the prompt of forwards that are made beside `generate` (classifier-free guidance)."""
    used: dict[str, tuple[Wanted, Tensor | None]] = field(default_factory=dict)
    """What the layers asked, by adapter, and which rows it edits."""
    _others_checked: bool = False
    _resolved: dict[Wanted, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    _whole: dict[Wanted, tuple[Tensor, int]] = field(default_factory=dict)
    """Slots of the prompts and what comes right behind them, and the number of their columns."""

    def slots(self, wanted: Wanted) -> tuple[Tensor, list[Tensor]]:
        """Columns to edit: the counted slots (rows, n), and a region (rows, prompt length) for each open-ended group.

        The slots of a `gN` group hold the columns that its tokens will have.
        """
        if wanted in self._resolved:
            return self._resolved[wanted]
        assert self.real is not None
        layout, length = wanted.layout, self.real.shape[1]
        width, open_groups = slots_per_answer(layout), sum(group.count is None for group in layout)
        if self.explicit is None:
            # Columns behind the prompt stand for what will be written.
            more = max([1, *(group.count or 0 for group in layout if group.kind == "g")])
            whole = resolve(layout, self.turns(wanted, more).answers(1 if not _has_marks(wanted) else None))
            seq = length + more
            self._whole[wanted] = whole, seq
            counted = whole.shape[1] - open_groups * seq
            regions = [r[:, :length] for r in whole[:, counted:].split(seq, 1)] if open_groups else []
        else:
            whole = self.explicit.to(self.real.device)
            counted = whole.shape[1] - open_groups * length
            if counted >= 0 and (counted % width == 0 if width else counted == 0):
                regions = list(whole[:, counted:].split(length, 1)) if open_groups else []
            else:  # a caller's flat list of columns
                counted = whole.shape[1]
                regions = [torch.full_like(self.real, NO_POSITION, dtype=torch.long)] * open_groups
        self._resolved[wanted] = whole[:, :counted], regions
        return self._resolved[wanted]

    def turns(self, wanted: Wanted, more: int) -> Turns:
        """Of the prompts, with `more` columns behind each that belong to its last answer."""
        assert self.real is not None
        length = self.real.shape[1]
        real = F.pad(self.real, (0, more), value=True)
        answer_at = torch.zeros_like(real)
        answer_at[:, length] = True
        ids = None if self.ids is None else F.pad(self.ids, (0, more), value=-1)
        if ids is None and wanted.kinds and _has_marks(wanted):
            warn(
                "LoReFT finds no headers of a chat template in embeddings: `generate` was given `inputs_embeds` "
                "alone, so its whole input counts as one prompt. Give `input_ids` beside them if it is a chat of "
                "several turns."
            )
        return find_turns(real, ids=ids, marks=wanted.marks, answer_at=answer_at)

    def check_cache(self, adapter: str, wanted: Wanted, rows: Tensor | None = None) -> None:
        """Raise ValueError if the cache that `generate` was given does not hold what its part of the prompts needs."""
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
            raise ValueError(wrong_cache(adapter, wanted, holds))

    def check_others(self) -> None:
        """Raise ValueError if the cache that `generate` was given holds edits of adapters that do not edit now."""
        if self.memory is not None and not self._others_checked:  # all active adapters ask in the first step
            refuse_others(self.memory, self.used)
            self._others_checked = True

    def remember(self, ids: Tensor, length: int) -> CacheMemory:
        """What a cache holds that this call leaves: the first `length` columns of `ids` (rows, n)."""
        assert self.real is not None
        prompt = self.real.shape[1]
        if not prompt <= length <= ids.shape[1] or ids.shape[0] != self.real.shape[0] or self.explicit is not None:
            return CacheMemory.unknown(length)
        memory = CacheMemory()
        edited = {}
        for name, (wanted, rows) in self.used.items():
            turns = self.turns(wanted, length - prompt + 1)
            slots = of_rows(resolve(wanted.layout, turns.answers()), rows)
            edited[name] = part_of(slots, wanted.layout, length + 1, 0, length), wanted.layout
        memory.add(ids[:, :length], length, edited, prompt)
        return memory


def _has_marks(wanted: Wanted) -> bool:
    return wanted.marks is not None and bool(wanted.marks.response)


@dataclass
class GenerateStep:
    """One forward within `generate`: columns `start` to `start + seq` of rows that begin with the prompt."""

    generation: Generation
    start: int
    shape: tuple[int, int]

    def check_cache(self, adapter: str, wanted: Wanted, rows: Tensor | None = None) -> None:
        """See `Source`. Once a call is enough."""
        if adapter not in self.generation.used:
            self.generation.check_cache(adapter, wanted, rows)

    def slots(self, wanted: Wanted) -> Tensor | None:
        batch, seq = self.shape
        layout = wanted.layout
        assert self.generation.real is not None
        length = self.generation.real.shape[1]
        decoded = [group for group in layout if group.kind == "g"]
        if self.start >= length and all(group.count and self.start >= length + group.count for group in decoded):
            return None  # every decode step of a spec without generated tokens ends here
        counted, regions = self.generation.slots(wanted)
        column = torch.arange(seq, device=counted.device)
        inside = (counted >= self.start) & (counted < self.start + seq)
        pieces = [torch.where(inside, counted - self.start, NO_POSITION)]
        for group, region in zip([group for group in layout if group.count is None], regions):
            in_prompt = region[:, self.start : self.start + seq] >= 0
            edited = F.pad(in_prompt, (0, seq - in_prompt.shape[1]), value=False)
            if group.kind == "g":
                edited = edited | (column + self.start >= length)
            pieces.append(torch.where(edited, column, NO_POSITION))
        slots = torch.cat(pieces, 1)
        return slots.repeat_interleave(batch // len(slots), 0) if len(slots) != batch else slots
