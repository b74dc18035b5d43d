"""Training below the floor: what stands before the first edited token is the base's, so it runs without gradient.

A training forward whose positions leave a prompt's beginning untouched is run in two parts::

    tokens       s s s u u u u u u u e e e a a a a        s shared by all rows, u untouched, e edited, a answer
    first part   ───────────────────►                     without gradient: keys and values, outputs
    second part                      ─────────────►       with gradient, behind these keys and values

The caller sees the output of one forward. Tokens whose next token is supervised always belong to the second part, so
the loss is the second part's.

The hook before a module's forward runs the first part and hands the module the inputs of the second; the hook after it
joins the outputs. That module is the causal model or, if the model's head needs every token, the backbone in it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..edits.formulas import Interchange
from ..positions.batch import can_be_read, is_matrix
from ..positions.resolve import IGNORED
from ..positions.sources import PositionSource
from ..positions.split import Split, common_beginning, first_edited, leaves_a_beginning
from ..positions.wanted import Wanted
from ..shapes import Int
from .beginnings import Beginning, fingerprint
from .forward import Attachment
from .layer import LoReftLayer
from .two_parts import PER_TOKEN, Cut, Impossible, TwoParts, cut_in_two, has_dropout, keeps_caches, run_alone

GAIN = 0.85
"""`auto` cuts a batch if both parts are at most this share of the ordinary path's work."""

SHARED = 16
"""Fewest tokens at the rows' beginning that are worth being run once for all rows."""

_STATES_OF_ALL = ("output_hidden_states", "output_attentions", "output_router_logits")


class NotHere(Exception):
    """The causal model cannot be run in two parts, or not well; its backbone perhaps can."""


def cut_forward(
    attachment: Attachment,
    module: nn.Module,
    given: dict[str, Any],
    source: PositionSource,
    known: dict[Wanted, Tensor | None],
    is_model: bool,
) -> tuple[Cut | None, bool]:
    """Run the first part of a training forward, if the forward can be cut and that pays.

    Args:
        attachment: of the model.
        module: whose forward begins: the causal model, or its backbone.
        given: the inputs of the forward, by name.
        source: of the whole batch.
        known: slots of the whole batch, as far as they are known; what is found is added.
        is_model: whether `module` is the causal model.

    Returns:
        What the second part needs, None if the ordinary path is to be taken; and whether the backbone may be cut then.

    Raises:
        ValueError: `untouched_prompt="on"`, and the forward cannot be cut.
    """
    plans = active_plans(attachment)
    settings = [attachment.runtime[name] for name in plans]
    modes = {each.untouched_prompt for each in settings}
    if not modes or "off" in modes:
        return None, False
    must = "on" in modes
    try:
        if not must and (not _was_measured(given) or (is_model and _may_want_cache(module, given))):
            return None, False
        wanted = {each for of_adapter in plans.values() for each in of_adapter}
        _check_inputs(attachment, given, wanted)
        _check_module(attachment, module)
        if is_model:
            _check_head(given)
        for each in wanted:
            if each not in known:
                known[each] = source.slots(each)
        beginnings = attachment.beginnings
        beginnings.limit = max(each.kept_mb for each in settings) * 2**20
        beginnings.device = settings[0].kept_device
        parts = TwoParts(module, given, is_model, attachment.ways)
        return _cut(attachment, parts, {each: known[each] for each in wanted}, must), False
    except NotHere:
        return None, True
    except Impossible as reason:
        if must:
            raise ValueError(
                f"untouched_prompt='on', but this forward cannot be run in two parts, because {reason}. 'auto' takes "
                "the ordinary path then."
            ) from reason
        return None, False


def active_plans(attachment: Attachment) -> dict[str, set[Wanted]]:
    """What the active adapters ask a forward, by adapter."""
    found: dict[str, set[Wanted]] = {}
    for layer in attachment.layers:
        if not isinstance(layer, LoReftLayer) or layer.disable_adapters or layer.merged:
            continue
        for name in layer.active_adapters:
            if name in layer.plans:
                found.setdefault(name, set()).add(layer.plans[name].wanted)
    return found


def _was_measured(given: Mapping[str, Any]) -> bool:
    """Whether two parts were measured to be faster on this kind of device (docs/untouched.md)."""
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    return isinstance(tokens, Tensor) and tokens.device.type == "cpu"


def _may_want_cache(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the caller may go on from the cache that the ordinary path would return.

    With labels the forward is one of training. Without, it may be the first of a loop.
    """
    if given.get("labels") is not None or given.get("shift_labels") is not None or given.get("use_cache") is False:
        return False
    return getattr(getattr(model, "config", None), "use_cache", None) is not False


def _check_inputs(attachment: Attachment, given: Mapping[str, Any], wanted: set[Wanted]) -> None:
    """Raise `Impossible` if a forward with these inputs cannot be cut, whatever its tokens are."""
    if not attachment.has_answers or attachment.decoder is not None:
        raise Impossible("the model is no causal language model")
    for each in wanted:
        if not leaves_a_beginning(each.layout):
            raise Impossible(f"positions={str(each.layout)!r} name the first tokens of a prompt")
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or not can_be_read(tokens):
        raise Impossible("its tokens cannot be read")
    shape = (tokens.shape[0], tokens.shape[1])
    mask = given.get("attention_mask")
    if mask is None and given.get("position_ids") is not None:
        raise Impossible("its rows may be packed (it has position ids and no attention mask)")
    if mask is not None and not is_matrix(mask, shape):
        raise Impossible(f"its attention mask is not of shape {shape}")
    if given.get("past_key_values") is not None:
        raise Impossible("it was given a cache")
    if given.get("return_dict") is False:
        raise Impossible("return_dict=False leaves its outputs without names")
    for name in ("use_cache", *_STATES_OF_ALL):
        if given.get(name) is True:
            raise Impossible(f"{name}=True asks for states of every token")
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or name == "attention_mask":
            continue
        if name not in PER_TOKEN or tuple(value.shape[:2]) != shape:
            raise Impossible(f"LoReFT does not know how to cut its input {name!r}")


def _check_module(attachment: Attachment, module: nn.Module) -> None:
    """Raise `Impossible` if the untouched part would not be the base's, or would need a gradient."""
    config = getattr(module, "config", None)
    for name in _STATES_OF_ALL:
        if getattr(config, name, None) is True:
            raise Impossible(f"{name}=True in the model's config asks for states of every token")
    if getattr(config, "return_dict", True) is False:
        raise Impossible("return_dict=False leaves its outputs without names")
    if getattr(module, "_is_replica", False):
        raise Impossible("nn.DataParallel runs it")
    own: set[int] = set()
    for layer in attachment.layers:
        if isinstance(layer, LoReftLayer):
            own.update(id(parameter) for parameter in layer.parameters())
            if any(isinstance(weights, Interchange) for weights in layer.weights_of(None)):
                raise Impossible("intervention='interchange' takes states of another run")
    get_head = getattr(module, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    of_head = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise NotHere if id(parameter) in of_head else Impossible(f"{name} is trained, too")
    for part in module.modules():
        if getattr(part, "neftune_noise_alpha", None) is not None:
            raise Impossible("NEFTune adds noise to the embeddings of all tokens")
    if not keeps_caches(module):
        raise Impossible("activation checkpointing drops the cache in this version of transformers")


def _check_head(given: Mapping[str, Any]) -> None:
    """Raise `NotHere` if the model's head needs every token."""
    kept = given.get("logits_to_keep")
    if kept is not None and (isinstance(kept, Tensor) or kept != 0):
        raise NotHere  # it counts from the end of each row
    if given.get("fused_lm_head") and given.get("labels") is None and given.get("shift_labels") is None:
        raise NotHere


def _cut(attachment: Attachment, parts: TwoParts, whole: dict[Wanted, Tensor | None], must: bool) -> Cut | None:
    """Cut a forward that can be cut, if it pays."""
    # Processes that share a model's weights must all run as many forwards, whatever their rows are.
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together and not must:
        return None
    (start, stop, cut), edited, ids = _read(parts, whole)
    if bool((cut < edited - 1).any()) and not together:
        raise NotHere  # supervised tokens stand before the first edited one; the backbone can be cut behind them
    rows, seq = len(cut), parts.tokens.shape[1]
    split = Split.at(start, cut, stop, seq, least=1 if together else 0)
    if not split.untouched.width:
        return None
    way = parts.way(start, stop)
    shared = None if together or ids is None else _Shared.look(attachment, parts, split, ids, way)
    # In tokens that run forward. A backward costs what a forward costs.
    work = rows * (split.untouched.width + 2 * split.rest.width)
    if shared is not None:
        work -= shared.saves(rows)
    if not must and work > GAIN * 2 * rows * seq:
        return None
    return cut_in_two(parts, split, way, whole, None if shared is None else shared.run(parts, split, way))


def _read(
    parts: TwoParts, whole: Mapping[Wanted, Tensor | None]
) -> tuple[Int[Tensor, "3 batch"], Int[Tensor, " batch"], list[list[int]] | None]:
    """Read the rows from the device: one host read.

    Returns:
        Columns at which each row starts, stops and is to be cut; the column of its first edited token; the token ids
        of its untouched part, None if the batch has only embeddings.

    Raises:
        Impossible: a row has padding between its tokens, or positions on padding.
    """
    given, tokens = parts.given, parts.tokens
    batch, seq = tokens.shape[:2]
    mask = given.get("attention_mask")
    real = torch.ones(batch, seq, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    start = real.long().argmax(1)  # (batch,)
    stop = seq - real.flip(1).long().argmax(1)  # (batch,)
    slots = [each for each in whole.values() if each is not None]
    edited = cut = first_edited(slots, stop)  # (batch,)
    if parts.is_model:
        for name, before in (("labels", 1), ("shift_labels", 0)):
            labels = given.get(name)
            if isinstance(labels, Tensor):
                supervised = (labels != IGNORED) & real  # (batch, seq)
                # The column that predicts the first supervised token.
                first = torch.where(supervised.any(1), supervised.long().argmax(1) - before, stop)  # (batch,)
                cut = torch.minimum(cut, torch.maximum(first, start))
    facts = [start, stop, cut, edited, real.sum(1)]
    has_ids = parts.tokens_name == "input_ids"
    table = torch.cat([torch.stack(facts), tokens.T] if has_ids else [torch.stack(facts)]).cpu()  # (5 [+ seq], batch)
    bounds, edited, tokens_of_row = table[:3], table[3], table[4]
    if bool((tokens_of_row != bounds[1] - bounds[0]).any()):
        raise Impossible("a row has padding between its tokens")
    if bool((edited < bounds[0]).any()):
        raise Impossible("positions name padding")
    if not has_ids:
        return bounds, edited, None
    rows = table[5:].T.tolist()
    return bounds, edited, [row[int(first) : int(last)] for row, first, last in zip(rows, bounds[0], bounds[2])]


@dataclass
class _Shared:
    """Tokens that all rows begin with, and that no row has edited."""

    attachment: Attachment
    ids: tuple[int, ...]
    key: Hashable
    kept: Beginning | None
    """What is known of them from an earlier step."""

    @staticmethod
    def look(attachment: Attachment, parts: TwoParts, split: Split, ids: list[list[int]], way: str) -> _Shared | None:
        """Find out what the rows share; None if nothing that is worth it.

        Args:
            attachment: of the model.
            parts: of the forward.
            split: of the batch.
            ids: token ids of each row's untouched part.
            way: how tokens learn their positions.
        """
        start = split.untouched.first
        # Only the columns are compared: "given" positions could differ.
        if way == "given" or bool((start != start[0]).any()) or has_dropout(parts.module):
            return None
        beginnings = attachment.beginnings
        rows = [*ids, beginnings.last_row] if len(ids) == 1 and beginnings.limit else ids
        beginnings.last_row = ids[0]
        tokens = common_beginning(rows)
        if tokens < SHARED:
            return None
        shared = tuple(ids[0][:tokens])
        if not beginnings.limit or _has_other_tuners(parts.module):
            return _Shared(attachment, shared, None, None) if len(ids) > 1 else None
        tensor = parts.tokens
        autocast = torch.is_autocast_enabled(tensor.device.type), torch.get_autocast_dtype(tensor.device.type)
        fused = bool(parts.given.get("fused_lm_head"))
        kind = (type(parts.module), parts.is_model, fused, way, int(start[0]), tensor.device, autocast)
        key = (kind, fingerprint(parts.module))
        found = beginnings.find(key, shared)
        if found is not None:
            beginning, common = found
            if common >= SHARED and tokens - common <= max(SHARED, tokens // 4):
                return _Shared(attachment, shared[:common], key, beginning.first(common, tensor.device))
        return _Shared(attachment, shared, key, None)

    def saves(self, rows: int) -> int:
        """How many tokens need not be run."""
        return len(self.ids) * (rows if self.kept is not None else rows - 1)

    def run(self, parts: TwoParts, split: Split, way: str) -> Beginning:
        """What the base computes of these tokens."""
        if self.kept is not None:
            return self.kept
        beginning = run_alone(parts, split, way, self.key, self.ids)
        if self.key is not None:
            self.attachment.beginnings.keep(beginning)
        return beginning


def _has_other_tuners(module: nn.Module) -> bool:
    """Whether another PEFT method is in the module. Its settings can change between two steps."""
    return any(isinstance(part, BaseTunerLayer) and not isinstance(part, LoReftLayer) for part in module.modules())
