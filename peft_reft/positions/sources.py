"""Where the positions of one forward come from: the caller, the batch, a cache, or `generate`. No hooks here."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch import POSITIONS, SUBSPACES, Batch, can_be_read
from .index import group_bits
from .marks import Marks
from .memory import CacheMemory, joined_mask, part_of
from .resolve import IGNORED, Turns, find_turns, resolve
from .spec import NO_POSITION, Layout, slots_per_answer

WAYS_OUT = (
    "Ways to say it: `response_template` and `instruction_template` in the config, the headers of the chat template "
    "as token ids (`peft_reft.chat_marks(tokenizer)` finds them); the collator `peft_reft.DataCollatorForLoreft`; "
    f"`with peft_reft.prompt_lengths([...]):` around the forward; or `{POSITIONS}`."
)


@dataclass(frozen=True)
class Wanted:
    """What a layer wants to know: where these groups are."""

    layout: Layout
    """Groups of all the config's specs: how `intervention_positions` is laid out."""
    marks: Marks | None
    """Of the chat template; None if they are not known."""
    everything: bool = False
    """Whether prompt and answer are edited alike, all of both: then no prompt's end matters."""

    @property
    def kinds(self) -> set[str]:
        """Letters of the groups for which a prompt's end matters."""
        return set() if self.everything else {group.kind for group in self.layout}


class Source(Protocol):
    """Where the positions of one forward come from."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq)."""

    def slots(self, wanted: Wanted) -> Tensor | None:
        """(batch, n) columns laid out by `wanted.layout`, or None if this forward edits nothing."""

    def check_cache(self, adapter: str, wanted: Wanted) -> None:
        """Raise ValueError if the cache of this forward does not hold the edits of `adapter` that its rows need."""


class _WithoutCache:
    """A forward of whole rows."""

    def check_cache(self, adapter: str, wanted: Wanted) -> None:
        """There is no cache."""


CONTINUOUS_BATCHING = (
    "LoReFT does not support continuous batching (`generate_batch`, cache_implementation='paged'): it packs pieces of "
    "several requests into one row, and the forward does not say where their prompts end. Use `generate`."
)


@dataclass
class Unread(_WithoutCache):
    """A forward that was given no text: an image, whose patches the first block that is edited will show."""

    positions: Any
    attention_mask: Any
    shape: tuple[int, int] = (0, 0)

    def read(self, hidden: Tensor) -> Source:
        """What hidden states (batch, seq, d) of the first edited block say: every one of them is a prompt's token."""
        if hidden.ndim != 3:
            raise ValueError(
                "LoReFT edits tokens, but this forward has neither `input_ids` nor `inputs_embeds` (batch, seq), and "
                f"hidden states of shape {tuple(hidden.shape)} instead of (batch, seq, d) do not say where they are."
            )
        shape = (hidden.shape[0], hidden.shape[1])
        if self.positions is not None:
            return Given(check_positions(self.positions, shape).to(hidden.device), shape)
        return FromBatch(Batch.read({"attention_mask": self.attention_mask}, hidden, has_answers=False))

    def slots(self, wanted: Wanted) -> Tensor:
        raise AssertionError("to be read first")


@dataclass
class Given(_WithoutCache):
    """Positions given by the caller or the collator."""

    positions: Tensor
    shape: tuple[int, int]

    def slots(self, wanted: Wanted) -> Tensor:
        return self.positions


@dataclass
class FromBatch(_WithoutCache):
    """Positions worked out from a batch of whole documents."""

    batch: Batch
    has_answers: bool = False
    """Whether rows hold prompt and answer (causal language models)."""
    training: bool = False
    is_prompt: bool = False
    """Whether whoever made the forward knows that it holds prompts alone, so that nothing is to be warned of."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch.shape

    def slots(self, wanted: Wanted) -> Tensor:
        batch, kinds = self.batch, wanted.kinds if self.has_answers else set()
        unknown = self.has_answers and not batch.says_where_prompts_end
        has_marks = self.has_answers and wanted.marks is not None and bool(wanted.marks.response)
        if unknown and not has_marks:
            self._refuse_or_warn(wanted, kinds)
        turns = batch.turns(wanted.marks if self.has_answers else None)
        most = None if has_marks else batch.most_answers
        checks = _Checks(self, wanted, turns, kinds) if kinds else None
        if not can_be_read(turns.real):
            if checks is not None and torch.compiler.is_compiling():
                checks.assert_later()
            return resolve(wanted.layout, turns.answers(most or 1))
        facts = [] if checks is None else checks.facts(unknown and not has_marks)
        if most is None:
            facts.append(("most", turns.event.sum(1).amax()))
        if facts:  # the one host read
            found = dict(zip([name for name, _ in facts], torch.stack([fact.long() for _, fact in facts]).tolist()))
            most = most or max(1, found.pop("most"))
            if checks is not None:
                checks.act(found)
        return resolve(wanted.layout, turns.answers(most))

    def _refuse_or_warn(self, wanted: Wanted, kinds: set[str]) -> None:
        """Nothing but a forward's tokens is there to say where its prompts end, and they cannot."""
        if not kinds or self.is_prompt:
            return
        spec = "+".join(map(str, wanted.layout))
        if self.training and kinds != {"f"}:
            raise ValueError(
                f"LoReFT cannot tell where the prompts end, which positions={spec!r} needs: the model is in training, "
                f"and got neither `labels` nor `{POSITIONS}`, and no header of a chat template is known. (Label "
                "smoothing, `compute_loss_func` and some trainers keep labels from the model.) " + WAYS_OUT
            )
        if self.training:
            warn(
                f"LoReFT was given no labels in training, so it cannot tell how long the prompts are: "
                f"positions={spec!r} edits tokens of the answer if a prompt is shorter than that. " + WAYS_OUT
            )
        elif kinds != {"f"}:
            warn_of_plain_forward(spec)


def warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def warn_of_plain_forward(spec: str) -> None:
    warn(
        f"LoReFT takes every row of this forward for a prompt, to whose end positions={spec!r} refers: it got no "
        "labels, and found no header of a chat template. That is right for a prefill. If a row holds an answer too, "
        "other tokens are edited than in training and in `generate`. " + WAYS_OUT
    )


class _Checks:
    """What is wrong with a batch, found on the device, read together, and refused or warned of."""

    def __init__(self, source: FromBatch, wanted: Wanted, turns: Turns, kinds: set[str]) -> None:
        self.source, self.wanted, self.turns, self.kinds = source, wanted, turns, kinds
        self.labelled = source.batch.labels is not None and source.batch.prompt_lengths is None
        self.spec = "+".join(map(str, wanted.layout))

    def facts(self, plain: bool) -> list[tuple[str, Tensor]]:
        """Named bool tensors of one element.

        Args:
            plain: whether nothing at all is known of the batch, and that has been dealt with.
        """
        turns, found = self.turns, []
        unmarked = turns.real & ~turns.marked
        if self.labelled:
            found += [("several", self._several()), ("nothing", self._nothing())]
            if self.source.training:
                found += [("unsupervised", ~self._supervised().any()), ("cut", self._cut())]
        elif plain:
            if self.kinds == {"f"} and not (self.source.is_prompt or self.source.training):
                shortest = min(group.count or 0 for group in self.wanted.layout)
                found.append(("short", (turns.begins & (turns.length < shortest)).any()))
        elif not self.source.batch.says_where_prompts_end:  # marks were looked for
            found.append(("unmarked", unmarked.any()))
            if self.kinds == {"f"}:
                shortest = min(group.count or 0 for group in self.wanted.layout)
                found.append(("short", (unmarked & (turns.length < shortest)).any()))
        return found

    def act(self, found: dict[str, int]) -> None:
        """Raise ValueError, or warn."""
        if found.get("cut"):
            raise ValueError(
                "A row or a packed document starts in the middle of a document (it begins inside an answer, its first "
                "position id is not 0, or packing left it a prompt of one token), so its prompt is missing and LoReFT "
                "would edit the wrong tokens. Keep documents whole when packing or truncating (TRL: "
                "packing_strategy='bfd'); prompts of a single token cannot be packed."
            )
        if found.get("several"):
            raise ValueError(
                f"The labels of a row have several supervised spans, and positions={self.spec!r} needs to know where "
                "each prompt ends. Labels alone cannot tell a second answer from an answer of which some tokens are "
                "not trained on. " + WAYS_OUT
            )
        if found.get("nothing") and not found.get("unsupervised"):
            if self.source.training:
                raise ValueError(
                    "No row of this training batch has a token for LoReFT to edit, so nothing would train: every row "
                    "is supervised from its first token on. LoReFT learns at the prompt, so the data needs one: use "
                    "prompt-completion data (TRL: columns `prompt` and `completion`, or `completion_only_loss=True`, "
                    "or `assistant_only_loss=True` for chats), marks of the chat template, or positions that include "
                    "generated tokens ('all', 'gN')."
                )
            warn(
                f"LoReFT edits no token of this batch: its labels supervise every row from the first token on, so "
                f"there is no prompt for positions={self.spec!r}, and the loss is the base model's. " + WAYS_OUT
            )
        if found.get("unmarked") and self.kinds != {"f"}:
            if self.source.training:
                self.source._refuse_or_warn(self.wanted, self.kinds)
            elif not self.source.is_prompt:
                warn_of_plain_forward(self.spec)
        if found.get("short") and self.kinds == {"f"}:
            warn_of_plain_forward(self.spec)

    def assert_later(self) -> None:
        """In a traced graph: what can be refused only when it runs."""
        if self.labelled:
            wrong = self._several()
            if self.source.training:
                wrong = wrong | self._cut() | (self._nothing() & self._supervised().any())
            torch._assert_async(~wrong, "LoReFT: no position to edit, rows with several answers, or cut off prompts")

    def _supervised(self) -> Tensor:
        assert self.source.batch.labels is not None
        return self.turns.real & (self.source.batch.labels != IGNORED)

    def _several(self) -> Tensor:
        """Whether labels alone would have to tell several answers of a document apart."""
        if self.kinds == {"f"}:  # which needs the first answer alone
            return self.turns.real.new_zeros(())
        several = self.turns.begins & ~self.turns.marked & (self.turns.spans > 1)
        if self.kinds == {"g"} and all(group.count is None for group in self.wanted.layout):
            several = several & ~self._supervised()  # without a prompt, all of it is the answer
        return several.any()

    def _nothing(self) -> Tensor:
        """Whether no token is edited."""
        turns, none = self.turns, ~self.turns.real.new_zeros(())
        if self.kinds & {"f", "l", "p"}:
            none = none & ~(turns.event & (turns.end > turns.starts)).any()
            if self.source.batch.packed and "g" not in self.kinds:
                lone, answered = self._lone()
                none = none | ((lone == answered).all() & lone.any())
        if "g" in self.kinds:
            none = none & ~turns.answer.any()
        return none

    def _lone(self) -> tuple[Tensor, Tensor]:
        """(batch, seq): documents, at their event, whose labels leave them a prompt of one token; those answered.

        TRL takes the label off the first token of every packed document. So a prompt of one token is what it leaves of
        a document without a prompt, and of the second part of one that was split.
        """
        turns = self.turns
        first = turns.event & (turns.starts < turns.end) & ~turns.marked
        answered = first & (turns.starts + turns.length > turns.end)
        return answered & (turns.end - turns.starts == 1), answered

    def _cut(self) -> Tensor:
        """Whether a row or a document begins in mid-document, which matters to what counts from its beginning."""
        turns, labels = self.turns, self._supervised()
        counts_from_the_beginning = bool(self.kinds & {"f", "p"}) or any(
            group.kind == "g" and group.count for group in self.wanted.layout
        )
        cut = turns.real.new_zeros(())
        first = turns.real.long().argmax(1, keepdim=True)
        if counts_from_the_beginning:
            # A row that is supervised from its first token on, and again after a gap, has lost its first prompt.
            resumes = (labels[:, 1:] & ~labels[:, :-1]).any(1)
            cut = cut | (labels.gather(1, first).squeeze(1) & resumes & ~turns.marked.any(1)).any()
        if self.source.batch.packed and self.source.batch.position_ids is not None:
            lone, answered = self._lone()
            if counts_from_the_beginning:
                cut = cut | (self.source.batch.position_ids.gather(1, first) != 0).any()
            if any(group.count is not None for group in self.wanted.layout):
                cut = cut | (lone.any() & ~(lone == answered).all())
        return cut


@dataclass
class Continued:
    """Positions of tokens that are fed to a filled cache outside `generate`: loops of one's own, pieces."""

    tokens: Tensor
    """(batch, seq, ...): ids or embeddings of the new piece."""
    ids: Tensor | None
    attention_mask: Any
    past: int | None
    """Columns in the cache; None if it does not say."""
    memory: CacheMemory | None
    training: bool = False
    prompt_lengths: tuple[int, ...] | None = None
    _whole: dict[Wanted, Tensor] = field(default_factory=dict)
    """Slots of the whole document."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def answer_from(self) -> int | None:
        """Column at which an answer has begun, if nothing marks it: one token at a time is how answers are written."""
        if self.memory is not None and self.memory.answer_from is not None:
            return self.memory.answer_from
        return self.past if self.shape[1] == 1 else None

    def slots(self, wanted: Wanted) -> Tensor | None:
        (batch, seq), past, memory = self.shape, self.past, self.memory
        known = memory.all_ids() if memory is not None else None
        if known is not None and known.shape[0] != batch:
            known = None
        has_marks = wanted.marks is not None and wanted.marks.response and known is not None and self.ids is not None
        decodes = seq == 1 and self.prompt_lengths is None and not has_marks
        if decodes and not (wanted.everything or "g" in wanted.kinds):
            return None
        if past is None or (decodes and memory is None):
            return self._without_a_memory(wanted)
        # The whole document: what the cache holds, and the new piece.
        real = joined_mask(self.attention_mask, self.shape, past, self.tokens.device)  # (batch, past + seq)
        ids = torch.cat([known, self.ids], 1) if known is not None and self.ids is not None else None
        labels = None
        if self.answer_from is not None:
            column = torch.arange(past + seq, device=real.device)
            labels = torch.where(column >= self.answer_from, 0, IGNORED).expand(real.shape)
        whole = Batch(real=real, ids=ids, labels=labels, prompt_lengths=self.prompt_lengths)
        turns = whole.turns(wanted.marks)
        slots = self._whole[wanted] = resolve(wanted.layout, turns.answers())
        unmarked = labels is None and self.prompt_lengths is None and not bool(turns.marked.any(1).all())
        if unmarked and wanted.kinds - {"f"}:
            warn_of_plain_forward("+".join(map(str, wanted.layout)))
        return part_of(slots, wanted.layout, past + seq, past, past + seq)

    def _without_a_memory(self, wanted: Wanted) -> Tensor | None:
        """A piece behind a cache of which nothing is known: one token at a time, it is answer."""
        if any(group.kind == "g" and group.count for group in wanted.layout):
            raise ValueError(
                "LoReFT cannot count generated tokens here: the cache does not say how long the prompt was. Use "
                f"`generate`, or pass `{POSITIONS}`."
            )
        if self.shape[1] > 1 and wanted.kinds:
            warn_of_plain_forward("+".join(map(str, wanted.layout)))
        if not (wanted.everything or "g" in wanted.kinds):
            return None
        column = torch.arange(self.shape[1], device=self.tokens.device).expand(self.shape)
        none = torch.full((self.shape[0], slots_per_answer(wanted.layout)), NO_POSITION, device=self.tokens.device)
        empty = torch.full_like(column, NO_POSITION)
        regions = [column if group.kind == "g" else empty for group in wanted.layout if group.count is None]
        return torch.cat([none, *regions], 1)

    def check_cache(self, adapter: str, wanted: Wanted) -> None:
        """See `Source`. Of a cache of which nothing is known, nothing is said."""
        memory, slots = self.memory, self._whole.get(wanted)
        if memory is None or slots is None:
            return
        assert self.past is not None
        missing, wrong = compare(adapter, wanted, slots, self.past + self.shape[1], memory)
        if wrong:
            raise ValueError(wrong_cache(adapter, wanted, "edits that this document does not have"))
        if missing:
            # A header may have been completed after the last tokens of its prompt went by.
            was_edited = adapter in memory.edited or memory.length == 0
            if not was_edited or any(wanted.layout[number].kind != "l" for number in missing):
                raise ValueError(wrong_cache(adapter, wanted, "no edits where this document has some"))
            warn(
                "LoReFT: the header behind which an answer begins was completed after the last tokens of its prompt, "
                "which positions name, had been put into the cache without their edit. Feed a header in one piece "
                "with the prompt's last tokens, or use `generate`."
            )


MOVED = (
    "LoReFT does not know what the cache holds: it comes from beam search or from a call that moved its rows. Encode "
    "the history again, without the cache."
)


def wrong_cache(adapter: str, wanted: Wanted, holds: str) -> str:
    """The message about a cache that does not fit."""
    spec = "+".join(map(str, wanted.layout))
    return (
        f"The cache holds {holds}, for adapter {adapter!r} with positions={spec!r}: it was filled with another "
        "adapter, without one, or as a prompt that ended elsewhere. Encode the history again, without the cache. "
        "(With the marks of the chat template, `response_template` and `instruction_template` in the config, the "
        "turns of a chat can share a cache.)"
    )


def compare(adapter: str, wanted: Wanted, slots: Tensor, columns: int, memory: CacheMemory) -> tuple[set[int], bool]:
    """Which groups lack edits in the part of a document that a cache holds, and whether it has an edit too many.

    Args:
        adapter: name of the adapter.
        wanted: what its layers want.
        slots: (rows, n) of the whole document.
        columns: of the whole document.
        memory: of the cache.

    Raises:
        ValueError: the rows of the cache were moved about.
    """
    if not memory.certain:
        raise ValueError(MOVED)
    needed = group_bits(slots, columns, wanted.layout)[:, : memory.length]  # (rows, columns in the cache)
    if adapter in memory.edited:
        held = memory.bits(adapter, needed.shape[1]).to(needed.device)
        if needed.shape[0] % held.shape[0]:
            raise ValueError(MOVED)
        held = held.repeat_interleave(needed.shape[0] // held.shape[0], 0)
        if memory.layout(adapter) != wanted.layout:
            held = (held != 0).long() << 62
    else:
        held = torch.zeros_like(needed)
    missing, too_many = needed & ~held, held & ~needed
    lacking = {number for number in range(len(wanted.layout)) if bool(((missing >> number) & 1).any())}
    return lacking, bool(too_many.any())


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
    memory: CacheMemory | None = None
    """Of the cache at entry."""
    subspaces: Tensor | None = None
    beside: int | None = None
    """Length of the prompt of forwards that are made beside `generate` (classifier-free guidance)."""
    used: dict[str, Wanted] = field(default_factory=dict)
    """What the layers asked, by adapter."""
    factors: dict[tuple[int, bool], Any] = field(default_factory=dict)
    """What the layers compute with, for all steps of this call."""
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
        return find_turns(real, ids=ids, marks=wanted.marks, answer_at=answer_at)

    def check_cache(self, adapter: str, wanted: Wanted) -> None:
        """Raise ValueError if the cache that `generate` was given does not hold what its part of the prompts needs."""
        self.used[adapter] = wanted
        if not self.past or self.explicit is not None:
            return
        self.slots(wanted)
        memory = self.memory or CacheMemory(length=self.past)
        missing, wrong = compare(adapter, wanted, *self._whole[wanted], memory)
        if missing or wrong:
            holds = "edits that this prompt does not have" if wrong else "no edits where this prompt has some"
            raise ValueError(wrong_cache(adapter, wanted, holds))

    def remember(self, ids: Tensor, length: int) -> CacheMemory:
        """What a cache holds that this call leaves: the first `length` columns of `ids` (rows, n)."""
        assert self.real is not None
        prompt = self.real.shape[1]
        if not prompt <= length <= ids.shape[1] or ids.shape[0] != self.real.shape[0] or self.explicit is not None:
            return CacheMemory(length=length, certain=False)
        memory = CacheMemory()
        edited = {}
        for name, wanted in self.used.items():
            turns = self.turns(wanted, length - prompt + 1)
            slots = resolve(wanted.layout, turns.answers())
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

    def check_cache(self, adapter: str, wanted: Wanted) -> None:
        """See `Source`. Once a call is enough."""
        if adapter not in self.generation.used:
            self.generation.check_cache(adapter, wanted)

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


def check_positions(positions: Any, shape: tuple[int, int]) -> Tensor:
    """`positions`, if it can be `intervention_positions` for a batch of `shape`; else ValueError."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.is_floating_point():
        is_tensor = isinstance(positions, Tensor)
        got = f"{positions.dtype} {tuple(positions.shape)}" if is_tensor else type(positions).__name__
        raise ValueError(f"{POSITIONS} must be an integer tensor of shape (batch, n), -1 for none; got {got}.")
    if positions.shape[0] != shape[0]:
        raise ValueError(f"{POSITIONS} has {positions.shape[0]} rows for a batch of {shape[0]}.")
    looks_cost_nothing = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks_cost_nothing and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < NO_POSITION or high >= shape[1]:
            raise ValueError(
                f"{POSITIONS} has columns from {low} to {high}; allowed are 0 to {shape[1] - 1} in a batch of "
                f"{shape[1]} tokens a row, and -1 for none."
            )
    return positions.long()


def check_subspaces(subspaces: Any) -> Tensor | None:
    """`subspaces` as int64 (batch, n), or (1, n) for all rows alike; -1 = none.

    Args:
        subspaces: row indices of R: a list of ints for all rows, a list of lists (one a row, of any length), or an
            integer tensor (batch, n).

    Raises:
        ValueError: it is none of these.
    """
    if subspaces is None:
        return None
    if isinstance(subspaces, list | tuple | range):
        rows: list[Any] = [list(row) if isinstance(row, list | tuple | range) else row for row in subspaces]
        rows = rows if any(isinstance(row, list) for row in rows) else [rows]
        if all(isinstance(row, list) and all(type(index) is int for index in row) for row in rows):
            width = max(len(row) for row in rows)
            subspaces = torch.tensor([row + [NO_POSITION] * (width - len(row)) for row in rows], dtype=torch.long)
    if not isinstance(subspaces, Tensor) or subspaces.ndim != 2 or subspaces.is_floating_point():
        raise ValueError(
            f"{SUBSPACES}={subspaces!r}: expected row indices of R, as a list of ints for all rows, a list of lists "
            "with one a row, or an integer tensor of shape (batch, n) with -1 for none."
        )
    return subspaces.long()
