"""From a model's inputs to token positions, once per forward: the hooks, and the wrapped `generate`.

A hook before the base model's forward sees its inputs on every path that PEFT, transformers and TRL take to it, and
notes where positions can be had from: the caller (`intervention_positions`), `generate`, or the inputs themselves.
The first layer that asks has them computed; all others share the result. A hook after the forward forgets them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .positions import (
    NO_POSITION,
    Answers,
    Arrangement,
    Layout,
    PositionIndex,
    answers_of_batch,
    arrange,
    find_answers,
    resolve,
    slots_per_answer,
)

ATTRIBUTE = "peft_reft_state"
POSITIONS = "intervention_positions"


class _Source(Protocol):
    """Where the positions of one forward come from."""

    shape: tuple[int, int]

    def slots(self, layout: Layout) -> Tensor | None:
        """(batch, n) columns laid out by `layout`, or None if this forward edits nothing."""


class PositionState:
    """Positions of the running forward. One object a base model, held by it and by all its LoReFT layers.

    Args:
        model: the base model; not kept.
        labels_mark_prompts: whether labels are one a token, -100 over the prompt (causal language models).
    """

    def __init__(self, model: nn.Module, labels_mark_prompts: bool) -> None:
        self.labels_mark_prompts = labels_mark_prompts
        self.argument_names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._source: _Source | None = None
        self._computed: dict[Any, Any] = {}

    def begin(self, source: _Source) -> None:
        self._source = source
        self._computed = {}

    def end(self) -> None:
        self._source = None
        self._computed = {}

    @contextmanager
    def recomputing(self, moment: tuple[_Source | None, dict[Any, Any]]) -> Iterator[None]:
        """The state as it was at `moment`, for a part of that forward that activation checkpointing runs again."""
        now = self.moment
        self._source, self._computed = moment
        try:
            yield
        finally:
            self._source, self._computed = now

    @property
    def moment(self) -> tuple[_Source | None, dict[Any, Any]]:
        return self._source, self._computed

    def index(self, layout: Layout, groups: Layout, by: Arrangement) -> PositionIndex | None:
        """Positions of `groups` for the running forward, or None if it edits none; computed once."""
        if self._source is None:
            raise RuntimeError(
                "A module edited by LoReFT ran outside a forward of its model, so the positions of the prompt are "
                "unknown. Call the model itself (or its `generate`), not one of its parts."
            )
        key = (layout, groups, by)
        if key not in self._computed:
            if layout not in self._computed:
                self._computed[layout] = self._source.slots(layout)
            slots = self._computed[layout]
            self._computed[key] = None if slots is None else arrange(slots, self._source.shape[1], layout, groups, by)
        return self._computed[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_computed": {}}  # a copy of the model is not in a forward


@dataclass
class _Explicit:
    """Positions given by the caller or the collator."""

    positions: Tensor
    shape: tuple[int, int]

    def slots(self, layout: Layout) -> Tensor:
        return self.positions


@dataclass
class _Derived:
    """Positions worked out from masks, labels and position ids."""

    tokens: Tensor
    shape: tuple[int, int]
    attention_mask: Any
    position_ids: Any
    labels: Any
    cache: Any
    needs_labels: bool
    """Whether this is a causal language model in training, whose prompts end where labels begin."""

    def slots(self, layout: Layout) -> Tensor | None:
        kinds = {group.kind for group in layout}
        if self.cache is not None and self.labels is None and _cached(self.cache):
            return self._continuation(layout)
        if self.needs_labels and self.labels is None and kinds - {"f"}:
            raise ValueError(
                "LoReFT cannot tell where the prompts end: the model is in training, and got neither `labels` nor "
                f"`{POSITIONS}`. (Label smoothing and `compute_loss_func` keep labels from the model.) Use the "
                "collator `peft_reft.DataCollatorForLoreft(collator, config)`, or pass labels."
            )
        if self.attention_mask is not None and not _is_matrix(self.attention_mask, self.shape):
            got = tuple(self.attention_mask.shape) if isinstance(self.attention_mask, Tensor) else "no tensor"
            raise ValueError(
                f"LoReFT needs an attention mask of shape {self.shape} (batch, seq) to tell prompt from padding, got "
                f"{got}. Pass `{POSITIONS}` instead."
            )
        position_ids = self.position_ids if _is_matrix(self.position_ids, self.shape) else None
        answers = answers_of_batch(self.tokens, self.attention_mask, self.labels, position_ids)
        slots = resolve(layout, answers)
        if self.needs_labels and self.labels is not None:
            check_batch(layout, slots, answers, self.labels, position_ids if self.attention_mask is None else None)
        return slots

    def _continuation(self, layout: Layout) -> Tensor | None:
        """Tokens fed to a filled cache outside `generate`: they come after the prompt."""
        if any(group.kind == "g" and group.count for group in layout):
            raise ValueError(
                "LoReFT cannot count generated tokens in a decoding loop of your own: the forward does not say how "
                f"long the prompt was. Use `generate`, or pass `{POSITIONS}`."
            )
        if all(group.kind != "g" for group in layout):
            return None
        column = torch.arange(self.shape[1], device=self.tokens.device).expand(self.shape)
        none = torch.full((self.shape[0], slots_per_answer(layout)), NO_POSITION, device=self.tokens.device)
        empty = torch.full_like(column, NO_POSITION)
        regions = [column if group.kind == "g" else empty for group in layout if group.count is None]
        return torch.cat([none, *regions], 1)


def check_batch(layout: Layout, slots: Tensor, answers: Answers, labels: Tensor, position_ids: Tensor | None) -> None:
    """Refuse a training batch that cannot train anything, or whose prompts were cut off.

    Args:
        layout: the groups that are edited.
        slots: (batch, n) resolved positions.
        answers: of the batch.
        labels: (batch, seq) int64.
        position_ids: (batch, seq) int64 of packed rows, else None.

    Raises:
        ValueError: no row has a position to edit, or a row starts in the middle of a document.
    """
    real = answers.real
    supervised = real & (labels != -100)
    none_supervised = ~supervised.any()
    none_edited = ~(slots >= 0).any()
    first = real.long().argmax(1, keepdim=True)
    # A row that is supervised from its first token on and again after a gap has lost the prompt of its first answer.
    resumes = (supervised[:, 1:] & ~supervised[:, :-1]).any(1)
    cut = (supervised.gather(1, first).squeeze(1) & resumes).any()
    if position_ids is not None:
        cut = cut | (position_ids.gather(1, first) != 0).any()
        # TRL takes the label off the first token of every packed document. So a prompt of one token is what it leaves
        # of a document without a prompt, and of the second part of one that was split.
        answered = answers.first & (answers.document_ends > answers.ends)
        lone = answered & (answers.ends - answers.starts == 1)
        all_lone = (lone == answered).all() & lone.any()
        if all(group.kind != "g" for group in layout):
            none_edited = none_edited | all_lone
        if any(group.count is not None for group in layout):  # "all" edits every token, whatever came before it
            cut = cut | (lone.any() & ~all_lone)
    if torch.compiler.is_compiling():
        torch._assert_async(~(none_edited | cut), "LoReFT: no position to edit, or rows that start mid-document")
        return
    nothing_to_edit, starts_within, no_labels = torch.stack([none_edited, cut, none_supervised]).tolist()
    if starts_within:
        raise ValueError(
            "A row or a packed document starts in the middle of a document (it begins inside an answer, its first "
            "position id is not 0, or packing left it a prompt of one token), so its prompt is missing and LoReFT "
            "would edit the wrong tokens. Keep documents whole when packing or truncating (TRL: "
            "packing_strategy='bfd'); prompts of a single token cannot be packed."
        )
    if nothing_to_edit and not no_labels:
        raise ValueError(
            "No row of this training batch has a token for LoReFT to edit, so nothing would train: every row is "
            "supervised from its first token on. LoReFT learns at the prompt, so the data needs one: use "
            "prompt-completion data (TRL: columns `prompt` and `completion`, or `completion_only_loss=True`, or "
            "`assistant_only_loss=True` for chats), or positions that include generated tokens ('all', 'gN')."
        )


@dataclass
class Generation:
    """The prompts of one call of `generate`, kept until it returns.

    Capturing them at entry is what holds for every way of decoding. What a later forward shows (an empty cache, the
    number of its tokens) does not: without a cache every forward has the whole row, a chunk of a prompt has a filled
    cache, and assisted decoding's first forward has candidates behind the prompt.
    """

    real: Tensor
    """(rows at entry, prompt length) bool."""
    explicit: Tensor | None
    seen: int
    """Tokens in the cache."""
    rolls_back: bool
    """Whether rejected candidates are taken out of the cache again (assisted decoding)."""
    _resolved: dict[Layout, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def advance(self, cache: Any, tokens: int) -> int:
        """Column at which the coming forward of `tokens` tokens starts."""
        if cache is None:
            return 0
        start = int(cache.get_seq_length()) if self.rolls_back else self.seen
        self.seen = start + tokens
        return start

    def slots(self, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """Columns to edit: the counted slots (rows, n), and a region (rows, prompt length) for each open-ended group.

        The slots of a `gN` group hold the columns that its tokens will have.
        """
        if layout in self._resolved:
            return self._resolved[layout]
        length, width = self.real.shape[1], slots_per_answer(layout)
        open_groups = sum(group.count is None for group in layout)
        if self.explicit is None:
            whole = resolve(layout, find_answers(self.real, count=1))
            at = 0
            for group in layout:
                if group.kind == "g" and group.count:
                    whole[:, at : at + group.count] = length + torch.arange(group.count, device=whole.device)
                at += group.count or 0
        else:
            whole = self.explicit.to(self.real.device)
        counted = whole.shape[1] - open_groups * length
        if counted >= 0 and (counted % width == 0 if width else counted == 0):
            regions = list(whole[:, counted:].split(length, 1)) if open_groups else []
        else:  # a caller's flat list of columns
            counted, regions = (
                whole.shape[1],
                [torch.full_like(self.real, NO_POSITION, dtype=torch.long)] * open_groups,
            )
        self._resolved[layout] = whole[:, :counted], regions
        return self._resolved[layout]


@dataclass
class _Step:
    """One forward within `generate`: columns `start` to `start + seq` of rows that begin with the prompt."""

    generation: Generation
    start: int
    shape: tuple[int, int]

    def slots(self, layout: Layout) -> Tensor | None:
        batch, seq = self.shape
        length = self.generation.real.shape[1]
        decoded = [group for group in layout if group.kind == "g"]
        if self.start >= length and all(group.count and self.start >= length + group.count for group in decoded):
            return None  # every decode step of a spec without generated tokens ends here
        counted, regions = self.generation.slots(layout)
        column = torch.arange(seq, device=counted.device)
        pieces = [
            torch.where((counted >= self.start) & (counted < self.start + seq), counted - self.start, NO_POSITION)
        ]
        for group, region in zip([group for group in layout if group.count is None], regions):
            here = F.pad(
                region[:, self.start : self.start + seq], (0, max(0, self.start + seq - max(length, self.start)))
            )
            generated = (column + self.start >= length) & (group.kind == "g")
            inside = (here >= 0) & (column + self.start < length)
            pieces.append(torch.where(inside | generated, column, NO_POSITION))
        slots = torch.cat(pieces, 1)
        return slots.repeat_interleave(batch // len(slots), 0) if len(slots) != batch else slots


_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes that hold a module's checkpoint function: transformers' models; torch's CheckpointWrapper."""


class _WithPositions:
    """A checkpoint function that runs again, in the backward, with the positions of the forward it belongs to.

    Whether hooks are run again depends on who checkpoints what (transformers up to 5.20 does, later ones do not), and
    several forwards may come before one backward (DPO): without this, hooks would find the positions of none or,
    worse, of another.
    """

    def __init__(self, checkpoint: Callable[..., Any], state: PositionState) -> None:
        self.checkpoint = checkpoint
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moment = self.state.moment

        def run(*inputs: Any, **named: Any) -> Any:
            with self.state.recomputing(moment):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)


def _wrap_checkpoint_functions(model: nn.Module, state: PositionState) -> None:
    for module in model.modules():
        for name in _CHECKPOINT_FUNCTIONS:
            function = vars(module).get(name)
            if function is not None and not isinstance(function, _WithPositions):
                vars(module)[name] = _WithPositions(function, state)


def _unwrap_checkpoint_functions(model: nn.Module) -> None:
    for module in model.modules():
        for name in _CHECKPOINT_FUNCTIONS:
            if isinstance(function := vars(module).get(name), _WithPositions):
                vars(module)[name] = function.checkpoint


def attach(model: nn.Module, labels_mark_prompts: bool) -> PositionState:
    """Give `model` its state and hooks, and wrap its `generate`; if it has them already, return the state."""
    if (state := model.__dict__.get(ATTRIBUTE)) is not None:
        return state
    state = PositionState(model, labels_mark_prompts)
    before = model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    after = model.register_forward_hook(_after_forward, always_call=True)
    model.__dict__[ATTRIBUTE] = state
    model.__dict__[f"{ATTRIBUTE}_handles"] = (before, after)
    if hasattr(type(model), "generate"):
        # `partial`, not a bound method: a model with the latter cannot be pickled.
        model.__dict__["generate"] = partial(_generate, model)
    return state


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for handle in model.__dict__.pop(f"{ATTRIBUTE}_handles", ()):
        handle.remove()
    model.__dict__.pop(ATTRIBUTE, None)
    model.__dict__.pop("generate", None)
    _unwrap_checkpoint_functions(model)


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    state: PositionState = model.__dict__[ATTRIBUTE]
    positions = kwargs.pop(POSITIONS, None)
    given = {**dict(zip(state.argument_names, args)), **kwargs}
    tokens = next((t for name in ("inputs_embeds", "input_ids") if (t := given.get(name)) is not None), None)
    if tokens is None:  # not a text model's forward: layers that ask for positions say so
        state.end()
        return args, kwargs
    if model.training and torch.is_grad_enabled():
        _wrap_checkpoint_functions(model, state)
    shape = (tokens.shape[0], tokens.shape[1])
    if isinstance(positions, _Step):
        positions.shape = shape
        state.begin(positions)
    elif positions is not None:
        state.begin(_Explicit(check_positions(positions, shape).to(tokens.device), shape))
    else:
        labels = given.get("labels")
        labels = labels if state.labels_mark_prompts and _is_matrix(labels, shape) else None
        state.begin(
            _Derived(
                tokens=tokens,
                shape=shape,
                attention_mask=given.get("attention_mask"),
                position_ids=given.get("position_ids"),
                labels=labels,
                cache=given.get("past_key_values"),
                needs_labels=state.labels_mark_prompts and model.training and torch.is_grad_enabled(),
            )
        )
    return args, kwargs


def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    model.__dict__[ATTRIBUTE].end()


def check_positions(positions: Any, shape: tuple[int, int]) -> Tensor:
    """`positions`, if it can be `intervention_positions` for a batch of `shape`; else ValueError."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.is_floating_point():
        is_tensor = isinstance(positions, Tensor)
        got = f"{positions.dtype} {tuple(positions.shape)}" if is_tensor else type(positions).__name__
        raise ValueError(f"{POSITIONS} must be an integer tensor of shape (batch, n), -1 for none; got {got}.")
    if positions.shape[0] != shape[0]:
        raise ValueError(f"{POSITIONS} has {positions.shape[0]} rows for a batch of {shape[0]}.")
    if positions.device.type == "cpu" and positions.numel():  # elsewhere the look would make the host wait
        low, high = int(positions.min()), int(positions.max())
        if low < NO_POSITION or high >= shape[1]:
            raise ValueError(
                f"{POSITIONS} has columns from {low} to {high}; allowed are 0 to {shape[1] - 1} in a batch of "
                f"{shape[1]} tokens a row, and -1 for none."
            )
    return positions.long()


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model with LoReFT: notes the prompts, and hands each forward its positions."""
    explicit = kwargs.pop(POSITIONS, None)
    original: Callable[..., Any] = type(model).generate
    if model.config.is_encoder_decoder:  # the prompt is the encoder's input
        return original(model, *args, **kwargs)
    generation = _note_prompts(model, args, kwargs, explicit)
    outer = model.__dict__.get("prepare_inputs_for_generation")  # a draft model may be this model itself
    prepare = partial(_prepare_inputs, model, generation)
    # `generate` reads from the signature what the model can take (`inputs_embeds`).
    prepare.__signature__ = inspect.signature(model.prepare_inputs_for_generation)  # type: ignore[attr-defined]
    model.__dict__["prepare_inputs_for_generation"] = prepare
    try:
        return original(model, *args, **kwargs)
    finally:
        if outer is None:
            model.__dict__.pop("prepare_inputs_for_generation", None)
        else:
            model.__dict__["prepare_inputs_for_generation"] = outer


def _prepare_inputs(model: Any, generation: Generation, *args: Any, **kwargs: Any) -> dict[str, Any]:
    inputs = type(model).prepare_inputs_for_generation(model, *args, **kwargs)
    tokens = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
    cache = next((c for name in ("past_key_values", "cache_params") if (c := inputs.get(name)) is not None), None)
    start = generation.advance(cache, tokens.shape[1])
    inputs[POSITIONS] = _Step(generation, start, (tokens.shape[0], tokens.shape[1]))
    return inputs


def _note_prompts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], explicit: Any) -> Generation:
    names = ("inputs_embeds", "input_ids", "inputs")
    tokens = next((t for name in names if (t := kwargs.get(name)) is not None), args[0] if args else None)
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if tokens is None:  # generation from the begin-of-sequence token alone, one row
        real = torch.ones(1, 1, dtype=torch.bool, device=model.device)
    elif mask is not None:
        real = mask.bool()
    else:
        real = _infer_mask(model, tokens, kwargs)
        if past >= real.shape[1]:  # only what is new was passed, behind a cache
            real = F.pad(real, (past, 0), value=True)
    if explicit is not None:
        explicit = check_positions(explicit, (real.shape[0], real.shape[1]))
    settings = kwargs.get("generation_config") or model.generation_config
    drafts = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    rolls_back = kwargs.get("assistant_model") is not None or any(
        kwargs.get(name, getattr(settings, name, None)) for name in drafts
    )
    return Generation(real.to(model.device), explicit, past, rolls_back)


def _infer_mask(model: Any, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Without a mask, what `generate` assumes: padding tokens are padding, unless they may end an answer too."""
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    settings = kwargs.get("generation_config") or model.generation_config
    pad = kwargs.get("pad_token_id", settings.pad_token_id)
    eos = kwargs.get("eos_token_id", settings.eos_token_id)
    eos = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or tokens.ndim != 2 or pad in eos:
        return everything
    return tokens != pad


def _is_matrix(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape


def _cached(cache: Any) -> bool:
    return bool(cache.get_seq_length() > 0) if hasattr(cache, "get_seq_length") else True
