"""Run a forward in two parts: the untouched part of each row without gradient, then the rest behind its states."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..positions.resolve import IGNORED
from ..positions.split import OfRest, Part, Split, Untouched
from ..positions.wanted import Wanted
from ..shapes import Bool, Int, Shaped
from .beginnings import Beginning
from .saved_states import SavesRestAlone
from .states import ReadOnlyCache, States, aligned_right, map_states, states_of, to_fill

SOURCE = "_peft_reft_source"
"""Keyword argument that tells a hooked module the position source of a forward that this module runs."""

PER_TOKEN = {"input_ids": 0, "inputs_embeds": 0.0, "labels": IGNORED, "shift_labels": IGNORED, "position_ids": 0}
"""Inputs with an entry for each token, and what fills them behind a row's last token."""

_OF_SECOND_ALONE = {"labels", "shift_labels", "num_items_in_batch", "fused_lm_head"}
"""Inputs that belong to the loss, which the second part makes."""

_ZERO_WITHOUT_LABEL = {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"}
"""Outputs of TRL's fused head, which are 0 at a token without a label."""

_OF_EACH_TOKEN = {"logits", "last_hidden_state"}
"""What is joined: the output of the causal model, or of its backbone."""

_CHECKPOINTED = "_can_checkpoint_with_cache"
"""transformers' attribute of a block: whether it keeps its cache under activation checkpointing."""

_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' linear maps: whether they repack their weights in an evaluation."""

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far the two ways may differ in a trial, relative to the largest number of the output."""

_TRIAL = 12
"""Tokens of a row of a trial."""


class Impossible(Exception):
    """A forward cannot be run in two parts. The message is the reason, to stand behind "because"."""


@dataclass
class Cut:
    """A forward whose first part has run."""

    split: Split
    inputs: dict[str, Any]
    """Keyword arguments of the second part."""
    source: OfRest
    """Of the second part."""
    untouched: Shaped[Tensor, "batch untouched _"]
    """What the first part returned: logits, or the backbone's last hidden state."""
    blocks: list[nn.Module]
    """Blocks that keep their cache under activation checkpointing until the forward ends."""
    saving: SavesRestAlone
    """What autograd keeps of the keys and values, until the forward ends."""

    def join(self, output: Any) -> Any:
        """The output of the whole forward, from that of its second part.

        Raises:
            RuntimeError: the module returned something for which it is not known what the whole forward would return.
        """
        for name, value in list(output.items()):
            if name in _ZERO_WITHOUT_LABEL:
                output[name] = self._with_zeros(value)
            elif name in _OF_EACH_TOKEN:
                output[name] = self.split.join(self.untouched, value)
            elif name == "past_key_values":
                output[name] = None
            elif isinstance(value, Tensor) and value.ndim > 0:
                raise RuntimeError(
                    f"LoReFT ran this forward in two parts and does not know how to join their outputs {name!r}. "
                    "Pass runtime_config=LoReftRuntimeConfig(untouched_prompt='off')."
                )
        return output

    def _with_zeros(self, value: Shaped[Tensor, "batch rest_or_less"]) -> Shaped[Tensor, "batch seq_or_less"]:
        """An output of TRL's head. It has one column less than its input, unless labels were shifted before."""
        less = self.split.rest.width - value.shape[1]  # 0 or 1
        value = F.pad(value, (0, less))  # (batch, rest)
        zeros = value.new_zeros(len(value), self.split.untouched.width)
        return self.split.join(zeros, value)[:, : self.split.seq - less]

    def finish(self) -> None:
        """Undo what was set for this forward alone."""
        self.saving.stop()
        _drop_caches(self.blocks)


@dataclass
class TwoParts:
    """Runs the forwards of one module in two parts."""

    module: nn.Module
    given: dict[str, Any]
    """The inputs of the forward, by name."""
    is_model: bool
    """Whether the module is the causal model; else it is the backbone in it."""
    ways: dict[Hashable, str | Impossible] = field(default_factory=dict)
    """By kind of forward: how tokens learn their positions (see `way`), or why it cannot be run in two parts."""

    @property
    def tokens_name(self) -> str:
        return "input_ids" if self.given.get("inputs_embeds") is None else "inputs_embeds"

    @property
    def tokens(self) -> Tensor:
        """Token ids (batch, seq), or embeddings (batch, seq, d)."""
        tokens: Tensor = self.given[self.tokens_name]
        return tokens

    def way(self, start: Int[Tensor, " batch"], stop: Int[Tensor, " batch"]) -> str:
        """How tokens learn their positions, so that both parts give what the whole forward gives.

        "given": as the caller said; "columns": each token is told its column; "derived": the module finds it out from
        the attention mask. A trial with the first tokens of two rows shows which way is right for a family, and
        whether its states can be handed over at all. It is made once for each kind of forward. It draws no random
        numbers that the training would have drawn.

        Raises:
            Impossible: they cannot.
        """
        given = self.given.get("position_ids") is not None
        config = getattr(self.module, "config", None)
        attention = getattr(config, "_attn_implementation", None)
        recomputes = any(getattr(part, "gradient_checkpointing", False) for part in self.module.modules())
        kind = (type(self.module).__name__, attention, self.tokens_name, self.tokens.device.type, given, recomputes)
        if kind not in self.ways:
            candidates = ["given"] if given else ["columns", "derived"]
            self.ways[kind] = self._try(candidates, start, stop)
        way = self.ways[kind]
        if isinstance(way, Impossible):
            raise way
        return way

    def _try(self, candidates: list[str], start: Tensor, stop: Tensor) -> str | Impossible:
        """The first way by which a trial gives the outputs of the ordinary path, or what speaks against the last."""
        length = min(_TRIAL, int((stop - start).min()))
        if length < 4:
            raise Impossible("a row has fewer than 4 tokens")
        second = 1 % len(self.tokens)
        rows = [self.tokens[row, int(start[row]) : int(start[row]) + length] for row in (0, second)]
        pad = torch.zeros_like(rows[1][:1])
        # row 0   a b c d e f g h       row 1 is padded on both sides
        # row 1   . . i j k l m .
        tokens = torch.stack([rows[0], torch.cat([pad, pad, rows[1][: length - 3], pad])])  # (2, length[, d])
        mask = torch.ones(2, length, dtype=torch.long, device=tokens.device)
        mask[1, :2] = mask[1, -1] = 0
        half = length // 2
        split = Split.at(torch.tensor([0, 2]), torch.tensor([half, half]), torch.tensor([length, length - 1]), length)
        split = split.to(tokens.device)
        for way in candidates:
            trial = {self.tokens_name: tokens, "attention_mask": mask}
            if way == "given":
                trial["position_ids"] = torch.arange(length, device=tokens.device).expand(2, -1)
            cuda = [tokens.device] if tokens.device.type == "cuda" else []
            try:
                with torch.random.fork_rng(cuda), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    TwoParts(self.module, trial, self.is_model).check_agreement(split, way)
                return way
            except Exception as error:  # each family says in its own way that it cannot
                reason = error
        return Impossible(f"{type(self.module).__name__} cannot go on from keys and values ({reason})")

    @torch.no_grad()
    def check_agreement(self, split: Split, way: str) -> None:
        """Check that both parts give what the whole forward gives if nothing is edited, by the cache.

        Raises:
            Impossible: they do not. A model may raise what it likes.
        """
        sources = [Untouched((len(self.tokens), width)) for width in (split.seq, split.rest.width)]
        with evaluating(self.module):
            returned = self.module(**self.given, use_cache=False, **{SOURCE: sources[0]})
            if sum(isinstance(value, Tensor) and value.ndim > 0 for value in returned.values()) != 1:
                raise Impossible(f"it returns {', '.join(returned)}")
            whole = self.output(returned)
            states, first = self.first(split, way)
            inputs = self.second(split, states, way)
            rest = self.output(self.module(**inputs, **{SOURCE: sources[1]}))
        real = self.given["attention_mask"].bool()  # (batch, seq)
        difference = (split.join(first, rest) - whole)[real].abs().max() / whole[real].abs().max()
        if not difference <= _TOLERANCE.get(whole.dtype, 0.0):
            raise Impossible(f"its outputs differ by {difference:.0e}")
        # Some families drop a cache in training, under activation checkpointing.
        cache: ReadOnlyCache = inputs["past_key_values"]
        cache.layers_read.clear()
        with caches_kept(self.module):
            self.module(**inputs, **{SOURCE: sources[1]})
        if len(cache.layers_read) < len(cache.layers):
            raise Impossible("it drops its cache in training")

    def output(self, returned: Any) -> Tensor:
        """Of what the module returned, that which has an entry for each token."""
        output: Tensor = returned.logits if self.is_model else returned.last_hidden_state
        return output

    def first(
        self, split: Split, way: str, shared: Beginning | None = None
    ) -> tuple[States, Shaped[Tensor, "batch untouched _"]]:
        """Run the untouched part.

        Args:
            split: of the batch.
            way: how tokens learn their positions.
            shared: what was computed of the tokens that all rows begin with.

        Returns:
            Keys and values of each layer, each row's on the right; and the outputs, each row's on the left.
        """
        part, rows = split.untouched, len(self.tokens)
        before: States = []
        outputs = []
        if shared is not None:
            before = map_states(shared.states, lambda tensor: tensor.expand(rows, -1, -1, -1))
            outputs.append(shared.output.expand(rows, *shared.output.shape[1:]))
            part = part.behind(len(shared.ids))
        states = before
        if part.width:
            states, output = self.run(part, before, way)
            outputs.append(output)
        if not split.untouched.is_even:
            states = aligned_right(states, split.untouched.last - split.untouched.first)
        return states, torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    def run(self, part: Part, before: States, way: str) -> tuple[States, Tensor]:
        """Run some tokens of each row behind others that all rows begin with. Nothing is edited, and no gradient kept.

        Returns:
            Keys and values of all these tokens, each row's on the left; the outputs of `part`.
        """
        cache = to_fill(before)
        past = before[0][0].shape[2] if before else 0
        mask = None
        if not part.is_even:
            mask = F.pad(part.real, (past, 0), value=True)  # (batch, past + width)
        inputs = self._inputs(part, mask, way, without=_OF_SECOND_ALONE)
        needs_no_logits = bool(self.given.get("fused_lm_head"))
        if needs_no_logits and "logits_to_keep" in inspect.signature(type(self.module).forward).parameters:
            inputs["logits_to_keep"] = 1
        source = Untouched((len(part.first), part.width))
        with torch.no_grad(), not_recomputing(self.module):
            returned = self.module(**inputs, past_key_values=cache, use_cache=False, **{SOURCE: source})
        output = self.output(returned)
        if needs_no_logits:
            output = output.new_empty(len(part.first), part.width, 0)
        return states_of(cache), output

    def second(self, split: Split, states: States, way: str) -> dict[str, Any]:
        """The inputs of the rest, behind the states of the untouched part."""
        mask = None
        if not split.is_even:
            lengths = (split.untouched.last - split.untouched.first).unsqueeze(1)  # (batch, 1)
            column = torch.arange(split.untouched.width, device=lengths.device)
            before = column >= split.untouched.width - lengths  # (batch, untouched): each row's on the right
            mask = torch.cat([before, split.rest.real], 1)  # (batch, untouched + rest)
        inputs = self._inputs(split.rest, mask, way, without=set())
        return {**inputs, "past_key_values": ReadOnlyCache(states), "use_cache": False}

    def _inputs(self, part: Part, mask: Bool[Tensor, "batch _"] | None, way: str, without: set[str]) -> dict[str, Any]:
        """The inputs of one part."""
        inputs: dict[str, Any] = {}
        for name, value in self.given.items():
            if name in without or name in ("past_key_values", "use_cache"):
                continue
            if name == "attention_mask":
                value = None if mask is None else mask.to(dtype=torch.long)
            elif name in PER_TOKEN and isinstance(value, Tensor):
                value = part.take(value, PER_TOKEN[name])
            inputs[name] = value
        if way == "columns":
            inputs["position_ids"] = part.columns.clamp(max=self.tokens.shape[1] - 1)
        return inputs


def cut_in_two(
    parts: TwoParts, split: Split, way: str, whole: dict[Wanted, Tensor | None], shared: Beginning | None
) -> Cut:
    """Run the first part of a forward; see `TwoParts.first`."""
    split = split.to(parts.tokens.device)
    states, output = parts.first(split, way, shared)
    inputs = parts.second(split, states, way)
    saving = SavesRestAlone(inputs["past_key_values"], split.rest.width)
    saving.start()
    return Cut(split, inputs, OfRest(whole, split), output, _keep_caches(parts.module), saving)


def run_alone(parts: TwoParts, split: Split, way: str, key: Hashable, ids: tuple[int, ...]) -> Beginning:
    """Run the tokens `ids`, with which all rows begin, for the first row alone. `split` is on the CPU."""
    of_row = {
        name: value[:1] if name in PER_TOKEN and isinstance(value, Tensor) else value
        for name, value in parts.given.items()
    }
    first = split.untouched.first[:1]
    start = first.to(parts.tokens.device)
    part = Part(start, start + len(ids), len(ids), slice_from=int(first))
    states, output = TwoParts(parts.module, of_row, parts.is_model).run(part, (), way)
    return Beginning(key, ids, states, output)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module and its parts to evaluation, each to be as it was before in the end.

    Linear maps of bitsandbytes stay as they are: on some CPUs they repack their weights in their first evaluation, and
    nothing can be trained through them any more.
    """
    training = [part for part in module.modules() if part.training and not hasattr(part, _REPACKS)]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def not_recomputing(module: nn.Module) -> Iterator[None]:
    """Turn activation checkpointing off, which drops caches and saves nothing where no gradient is kept."""
    recomputing = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in recomputing:
        part.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for part in recomputing:
            part.__dict__["gradient_checkpointing"] = True


@contextmanager
def caches_kept(module: nn.Module) -> Iterator[None]:
    """Have blocks keep their cache under activation checkpointing."""
    blocks = _keep_caches(module)
    try:
        yield
    finally:
        _drop_caches(blocks)


def _keep_caches(module: nn.Module) -> list[nn.Module]:
    blocks = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    blocks = [block for block in blocks if _CHECKPOINTED not in block.__dict__ and hasattr(block, _CHECKPOINTED)]
    for block in blocks:
        block.__dict__[_CHECKPOINTED] = True
    return blocks


def keeps_caches(module: nn.Module) -> bool:
    """Whether all blocks under activation checkpointing can keep a cache that is only read."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    checkpointed = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    return not any(
        isinstance(part, GradientCheckpointingLayer) and not hasattr(part, _CHECKPOINTED) for part in checkpointed
    )


def has_dropout(module: nn.Module) -> bool:
    """Whether the base model drops anything, so that two forwards of one row differ."""
    config = getattr(module, "config", None)
    rates = [value for name, value in vars(config).items() if "drop" in name] if config is not None else []
    if any(isinstance(rate, float) and rate > 0 for rate in rates):
        return True
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules())


def _drop_caches(blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.__dict__.pop(_CHECKPOINTED, None)
