"""`LoReftLayer`: the child of a block that holds its adapters and edits its output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch.nn import functional as F

from ..edits.apply import Edit, add_edits, gather, may_change
from ..edits.factors import Factors
from ..edits.formulas import Interchange
from ..edits.intervention import Intervention, factors_of
from ..positions.index import PositionIndex
from .exchange import exchange
from .forward import Attachment, Forward, LayerPlan, current, current_names
from .merging import NEW_BIAS, Folded, fold, gains_bias, onloaded, projection_of, unfold

CHILD = "loreft"
"""Name of the layer in its block. Keys read `...layers.3.loreft.loreft_weights.<adapter>.R`."""


class LoReftLayer(nn.Module, BaseTunerLayer):
    """Edits the output of the block it is a child of, at the positions of the forward that runs.

    Args:
        block: the module whose output is edited; a forward hook on it calls this layer.
        attachment: what all layers of the model have in common.
    """

    adapter_layer_names = ("loreft_weights",)
    other_param_names = ("plans", "scaling")
    cast_input_dtype_enabled = True
    """Part of PEFT's contract, set by `peft.helpers`; edits are computed in float32 whatever it is."""

    def __init__(self, block: nn.Module, attachment: Attachment) -> None:
        super().__init__()
        self.loreft_weights = nn.ModuleDict()
        self.plans: dict[str, LayerPlan] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._folded: Folded | None = None
        self.attachment = attachment
        attachment.layers.append(self)
        self._block = (block,)  # in a tuple, or it would be registered as a child of its own child
        # `prepend`: transformers' recorder of hidden states is a hook too, and must see the edited ones.
        self._handle = block.register_forward_hook(_edit_output, prepend=True)

    def update_layer(self, adapter_name: str, intervention: Intervention, plan: LayerPlan) -> None:
        """Add an adapter, or replace the one of that name."""
        self.loreft_weights[adapter_name] = intervention
        self.scaling[adapter_name] = 1.0
        self.plans[adapter_name] = plan  # last: a forward in another thread looks here first
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def weights(self, adapter_name: str) -> Intervention:
        """The intervention of an adapter; KeyError if it does not edit here."""
        return cast(Intervention, self.loreft_weights[adapter_name])

    def forward(self, output: Any, inputs: Sequence[Any] = ()) -> Any:
        """Edit a block's output.

        Args:
            output: hidden states (batch, seq, d) or (batch * seq, d), or a tuple that begins with them.
            inputs: what the block was given, which is never changed.

        Returns:
            The same structure with edited hidden states; the very same object where nothing is edited.
        """
        adapter_names = current_names(self.attachment)
        if self.disable_adapters or self.merged:
            if adapter_names is not None and self.merged:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            return output
        forward = current(self.attachment)
        if forward is None:
            raise RuntimeError(
                "A module edited by LoReFT ran outside a forward of its model, so the positions of the prompt are "
                "unknown. Call the model, its `generate`, or a part of it that is given tokens (`model.model`)."
            )
        hidden = output[0] if isinstance(output, tuple) else output
        wanted = cast(Iterable[str], self.active_adapters) if adapter_names is None else dict.fromkeys(adapter_names)
        found: list[tuple[str, LayerPlan, PositionIndex]] = []
        for name in wanted:
            if name in self.plans and (index := forward.index(name, self.plans[name], hidden)) is not None:
                found.append((name, self.plans[name], index))
        if not found:
            if adapter_names is not None:  # all of them "__base__", perhaps of another number of rows
                forward.names_of_rows(adapter_names, forward.source.shape[0])
            return output
        batch, seq = found[0][2].shape
        if hidden.numel() != batch * seq * hidden.shape[-1]:
            raise ValueError(
                f"LoReFT was given positions for a batch of {batch} x {seq} tokens, but the module it edits returned "
                f"hidden states of shape {tuple(hidden.shape)}."
            )
        if adapter_names is None:
            edits = [edit for name, plan, index in found for edit in self._edits(forward, name, plan, index, hidden)]
        else:
            edits = self._edits_by_row(forward, found, forward.names_of_rows(adapter_names, batch))
        if not edits:
            return output
        edited = add_edits(hidden, edits, may_change(hidden, inputs))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _edits(self, forward: Forward, name: str, plan: LayerPlan, index: PositionIndex, hidden: Tensor) -> list[Edit]:
        """One adapter's edits of all rows."""
        weights = self.weights(name)
        factors = forward.factors(weights)
        if isinstance(weights, Interchange):
            at = gather(hidden.reshape(-1, hidden.shape[-1]), index.rows, factors.lead)
            given = exchange(forward, (id(self), name), at, index, factors)
        else:
            given = [(factors, forward.keep(index, factors))]
        scale = self.scaling[name]
        return [
            edit
            for factors, keep in given
            for edit in self._by_group(index, keep if scale == 1.0 else keep * scale, plan, factors)
        ]

    def _by_group(self, index: PositionIndex, keep: Tensor, plan: LayerPlan, factors: Factors) -> list[Edit]:
        if index.mask is None or plan.by != "group":
            return [Edit(index.rows, keep, self._drop(keep, plan, factors), factors)]
        return [
            Edit(None, part, self._drop(part, plan, factors), factors.map(itemgetter(g)))
            for g, part in enumerate(keep)
        ]

    def _edits_by_row(
        self, forward: Forward, found: list[tuple[str, LayerPlan, PositionIndex]], names: Sequence[str]
    ) -> list[Edit]:
        """Edits of a batch whose row n is edited by adapter `names[n]`: adapters alike in one batched product."""
        alike: dict[Any, list[tuple[str, Factors]]] = {}
        shared: dict[Any, tuple[LayerPlan, PositionIndex]] = {}
        for name, plan, index in found:
            weights = self.weights(name)
            if isinstance(weights, Interchange):
                raise ValueError(f"adapter_names has {name!r}, an interchange intervention: make it active instead.")
            factors = forward.factors(weights)
            key = (plan, factors.signature)
            alike.setdefault(key, []).append((name, factors))
            shared[key] = plan, index
        edits: list[Edit] = []
        for key, adapters in alike.items():
            plan, index = shared[key]
            scales = tuple((name, self.scaling[name]) for name, _ in adapters)
            which, scale = forward.rows_of(scales, names, index.keep.device)
            factors = Factors.stack([each for _, each in adapters]).map(partial(_of_rows, which=which))
            edits += _by_row(index, forward.keep(index, factors), plan, scale, factors)
        return edits

    def weights_of(self, adapter_names: Sequence[str] | None) -> Iterator[Intervention]:
        """What edits here: of the adapters named, one a row, or else of the active ones."""
        if not self.disable_adapters:
            names = (
                cast(Iterable[str], self.active_adapters) if adapter_names is None else dict.fromkeys(adapter_names)
            )
            for name in names:
                if name in self.plans:
                    yield self.weights(name)

    def _drop(self, keep: Tensor, plan: LayerPlan, factors: Factors) -> Tensor | None:
        if not plan.dropout or not self.training:
            return None
        return F.dropout(keep.new_ones(*keep.shape[:-1], factors.d), plan.dropout)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the edits of `adapter` by `scale`: 1 as trained, 0 nothing, -1 the reverse; as in LoRA."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters by `scale`."""
        for name in cast(Iterable[str], self.active_adapters):
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters by `scale`; None sets it to 1."""
        for name in cast(Iterable[str], self.active_adapters):
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def forget(self, adapter_name: str) -> None:
        """Take an adapter out, as `delete_adapter` does, but leave the choice of active ones to who replaces it."""
        for held in (self.loreft_weights, self.plans, self.scaling):
            del held[adapter_name]

    def remove(self) -> None:
        """Take the hook off the block, and this layer out of it."""
        self._handle.remove()
        self.attachment.layers.remove(self)
        delattr(self.block, CHILD)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # A block has no `weight`. Only the device is taken from its parameters: 4-bit weights are of type uint8.
        if device is None:
            device = next((parameter.device for parameter in self._parameters_of_block()), None)
        if device is None or device.type == "meta" or adapter_name not in self.loreft_weights:
            return
        weights = self.loreft_weights[adapter_name]
        if not any(parameter.is_meta for parameter in weights.parameters()):
            weights.to(device)

    def cast_to_base(self, adapter_name: str) -> None:
        """Give an adapter's weights the type of the block's, as other methods do with `autocast_adapter_dtype=False`.

        They are computed with in float32 all the same; R is orthonormal then only to the rounding of that type where
        it is stored, and to 1e-5 where it computes and in a saved file.
        """
        dtype = next((p.dtype for p in self._parameters_of_block() if p.is_floating_point()), None)
        if dtype is not None and adapter_name in self.loreft_weights:
            self.loreft_weights[adapter_name].to(dtype)

    def _parameters_of_block(self) -> Iterator[nn.Parameter]:
        own = {id(parameter) for parameter in self.parameters()}
        return (p for p in self.block.parameters() if id(p) not in own)

    def why_not_merge(self, adapter_names: Iterable[str]) -> str | None:
        """Why these adapters cannot be merged here, or None if they can."""
        for name in adapter_names:
            if name not in self.plans:
                continue
            plan, weights = self.plans[name], self.weights(name)
            if {group.kind for group in plan.groups} != {"p", "g"}:
                spec = "+".join(map(str, plan.groups))
                return f"positions are {spec!r}, and a weight matrix treats every position alike (allowed: 'all')"
            if plan.by != "all":
                return f"prompt and answer have an edit each (tie={plan.by!r}; allowed: 'layer', 'model')"
            if not weights.current_factors().is_affine:
                return "the formula is not affine (allowed: those without act_fn and gate, and not 'interchange')"
            try:
                projection_of(self.block)
            except ValueError as error:
                return str(error)
        return None

    def gains_bias(self, adapter_names: Iterable[str]) -> bool:
        """Whether merging these adapters, which can be merged here, would give the linear map its first bias."""
        edits = self._edits_to_merge([name for name in adapter_names if name in self.plans])
        return gains_bias(projection_of(self.block), edits)

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        new_parameters: bool = False,
        shared: bool = False,
    ) -> None:
        """Fold the edits into the linear map whose output they edit; see `LoReftModel.merge_adapter`.

        Args:
            safe_merge: whether to raise ValueError, before anything is changed, if the result is not finite.
            adapter_names: which; None for the active ones.
            new_parameters: whether the linear map may get a bias if it has none.
            shared: whether other modules have its weight too: it then gets one of its own.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.plans]
        if not names:
            return
        reason = self.why_not_merge(names)
        if reason is None and not new_parameters and self.gains_bias(names):
            reason = NEW_BIAS.format(type(projection_of(self.block)).__name__)
        if reason:
            raise ValueError(f"LoReFT cannot be merged: {reason}.")
        names = self.merged_adapters + names
        shared = shared or (self._folded is not None and self._folded.shared is not None)
        self.unmerge()  # each edit is of the output as it was without the others
        edits = self._edits_to_merge(names)
        projection = projection_of(self.block)
        with onloaded(projection):
            self._folded = fold(projection, edits, safe_merge, shared)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Take merged edits out of the weights."""
        if self._folded is not None:
            projection = projection_of(self.block)
            with onloaded(projection):
                unfold(projection, self._folded)
            self._folded = None
            self.merged_adapters = []

    def _edits_to_merge(self, names: Sequence[str]) -> list[tuple[str, Factors, float]]:
        # Of the parameters as they are now, whatever is kept for forwards.
        with onload_layer(self):
            return [(name, factors_of([self.weights(name)])[0], self.scaling[name]) for name in names]

    @property
    def block(self) -> nn.Module:
        """The module whose output is edited."""
        return self._block[0]

    def get_base_layer(self) -> nn.Module:
        """The module whose output is edited, taken out of other methods' wrappers.

        PEFT's `weight`, `bias` and `get_base_weight()` ask here. There is no attribute `base_layer`: PEFT would put
        that in the place of this child when it unloads.
        """
        block = self.block
        return block.get_base_layer() if isinstance(block, BaseTunerLayer) else block

    @property
    def in_features(self) -> int:
        """Size of what the block reads, where it says so as a linear map does, else of what it returns."""
        base = self.get_base_layer()
        own = getattr(base, "in_features", getattr(base, "nx", None))  # `nx`: GPT-2's linear maps
        return own if isinstance(own, int) else self.out_features

    @property
    def out_features(self) -> int:
        """Size d of the hidden states that are edited. AttributeError when the last adapter is deleted."""
        for name in self.loreft_weights:
            weights = self.weights(name)
            widest = next(name for name, dimensions in weights.shapes.items() if dimensions.endswith("d"))
            return int(getattr(weights, widest).shape[-1])
        raise AttributeError("out_features is the size of the edits, but this layer has no adapter any more.")

    @property
    def has_new_bias(self) -> bool:
        """Whether merging gave the linear map a bias that it did not have."""
        return self._folded is not None and self._folded.bias is None and projection_of(self.block).bias is not None

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.unmerge()  # before the block runs: the hook comes behind it
        super().enable_adapters(enabled)


def _of_rows(tensor: Tensor, which: Tensor) -> Tensor:
    return tensor.index_select(0, which)


def _by_row(index: PositionIndex, keep: Tensor, plan: LayerPlan, scale: Tensor, factors: Factors) -> list[Edit]:
    """Edits with factors of their own for each of the rows, (rows, ...); `scale` (rows,) is 0 for rows left alone."""
    rows = len(scale)
    keep = keep.unflatten(-2, (rows, -1)) * scale.view(-1, 1, 1)  # ([G,] rows, slots or seq, 1)
    if index.mask is not None:
        if plan.by != "group":
            return [Edit(None, keep, None, factors)]
        return [Edit(None, part, None, factors.map(partial(_of_group, g=g))) for g, part in enumerate(keep)]
    assert index.rows is not None
    at = index.rows.unflatten(-1, (rows, -1))
    if index.rows.ndim == 1:
        return [Edit(at, keep, None, factors)]
    # (G, rows, slots) and (rows, G, r, d): each pair of row and group has factors of its own.
    at, keep = at.transpose(0, 1).flatten(0, 1), keep.transpose(0, 1).flatten(0, 1)
    return [Edit(at, keep, None, factors.map(partial(torch.flatten, start_dim=0, end_dim=1)))]


def _of_group(tensor: Tensor, g: int) -> Tensor:
    return tensor[:, g]


def _edit_output(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a block. A module-level function, so that the model can be copied and pickled.

    On the meta device there are shapes alone, which no edit changes; positions could not be read there.
    """
    given = tuple(output) if isinstance(output, list) else output  # GPT's first version returns a list
    if getattr(given[0] if isinstance(given, tuple) else given, "is_meta", False):
        return output
    edited = getattr(block, CHILD)(given, args)
    if edited is given:
        return output
    return list(edited) if isinstance(output, list) else edited
