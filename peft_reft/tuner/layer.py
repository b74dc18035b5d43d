"""`LoReftLayer`: the child of a block that holds its adapters and edits its output."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn import functional as F

from ..edits.apply import Edit, add_edits, gather, may_change
from ..edits.factors import Factors
from ..edits.formulas import Interchange
from ..edits.intervention import Intervention
from ..positions.index import PositionIndex
from ..shapes import Float
from .exchange import exchange
from .folding import NEW_BIAS, Folded, fold, gains_bias, is_plain, not_known, onloaded, projection_of, unfold
from .forward import Attachment, Forward, LayerPlan, current, current_adapter_names

Editing = tuple[str, LayerPlan, PositionIndex]
"""An adapter that edits in a forward: its name, what it does here, and where."""

CHILD = "loreft"
"""Name of the layer in its block. Keys read `...layers.3.loreft.loreft_weights.<adapter>.R`."""

PREFIX = "loreft_"
"""What the names of the layer's adapter modules begin with, as PEFT asks of each method."""


class LoReftLayer(nn.Module, BaseTunerLayer):
    """Edits the output of its block, or its input, at the positions of the forward that runs.

    The layer is a child of the block, and a hook on the block calls it.

    Args:
        block: the module whose output or input is edited.
        attachment: what all layers of the model have in common.
        parent: if the input is edited, the module that has `block` as its child; else None.
        quantisation: what PEFT needs to know of a quantised model (`get_quantization_kwargs`).
    """

    adapter_layer_names = ("loreft_weights",)
    other_param_names = ("plans", "scaling")
    cast_input_dtype_enabled = True
    """Part of PEFT's contract, set by `peft.helpers`. Edits are computed in float32 whatever it is."""

    if TYPE_CHECKING:

        @property
        def active_adapters(self) -> list[str]:
            """PEFT's property, which mypy does not see."""

    def __init__(
        self,
        block: nn.Module,
        attachment: Attachment,
        parent: nn.Module | None = None,
        quantisation: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.loreft_weights = nn.ModuleDict()
        self.plans: dict[str, LayerPlan] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._folded: Folded | None = None
        self._quantisation = {"get_apply_tensor_subclass": not_known, **quantisation}
        self.attachment = attachment
        attachment.layers.append(self)
        self._block = (block,)  # in a tuple, or it would be registered as a child of its own child
        self.edits_input = parent is not None
        self._place: tuple[nn.Module, str] | None = None
        if parent is not None:
            self._place = parent, next(name for name, child in parent.named_children() if child is block)
        # `prepend`: transformers' recorder of hidden states is a hook too, and must see the edited ones.
        if self.edits_input:
            self._handle = block.register_forward_pre_hook(_edit_input, prepend=True, with_kwargs=True)
        else:
            self._handle = block.register_forward_hook(_edit_output, prepend=True)

    def update_layer(self, adapter_name: str, intervention: Intervention, plan: LayerPlan) -> None:
        """Add an adapter, or replace the adapter of that name."""
        self.loreft_weights[adapter_name] = intervention
        self.scaling[adapter_name] = 1.0
        self.plans[adapter_name] = plan  # last: a forward in another thread looks into `plans` first
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def weights(self, adapter_name: str) -> Intervention:
        """The intervention of an adapter; KeyError if it does not edit here."""
        return cast(Intervention, self.loreft_weights[adapter_name])

    def forward(self, output: Any, inputs: Sequence[Any] = ()) -> Any:
        """Edit a block's output or input.

        Args:
            output: hidden states (batch, seq, d) or (batch * seq, d), or a tuple that begins with them.
            inputs: what must not be changed, such as what the block was given.

        Returns:
            The same structure with edited hidden states; the very same object if nothing is edited.

        Raises:
            RuntimeError: no forward of the model runs, so the positions are unknown.
            ValueError: positions, hidden states or `adapter_names` do not fit each other.
        """
        adapter_names = current_adapter_names(self.attachment)
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
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        editing: list[Editing] = []
        names = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        for name in names:
            if name in self.plans:
                plan = self.plans[name]
                index = forward.index(name, plan, hidden)
                if index is not None:
                    editing.append((name, plan, index))
        if not editing:
            if adapter_names is not None:  # check their number: all may be "__base__"
                forward.names_of_rows(adapter_names, forward.source.shape[0])
            return output
        batch, seq = editing[0][2].shape
        if hidden.numel() != batch * seq * hidden.shape[-1]:
            raise ValueError(
                f"LoReFT was given positions for a batch of {batch} x {seq} tokens, but the module it edits "
                f"{'was given' if self.edits_input else 'returned'} hidden states of shape {tuple(hidden.shape)}."
            )
        edits: list[Edit] = []
        if adapter_names is None:
            for name, plan, index in editing:
                edits += self._edits(forward, name, plan, index, hidden)
        else:
            edits = self._mixed_batch_forward(forward, editing, forward.names_of_rows(adapter_names, batch))
        if not edits:
            return output
        if self.edits_input:
            self._check_input(hidden, edits[0].factors.d)
        edited = add_edits(hidden, edits, may_change(hidden, inputs))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _chosen(self, adapter_names: Sequence[str] | None) -> Iterable[str]:
        """The adapters that a forward names, each once, or else the active ones."""
        if adapter_names is not None:
            return dict.fromkeys(adapter_names)
        return self.active_adapters

    def weights_of(self, adapter_names: Sequence[str] | None) -> Iterator[Intervention]:
        """The interventions that edit here: of the adapters named, or else of the active ones."""
        if not self.disable_adapters:
            for name in self._chosen(adapter_names):
                if name in self.plans:
                    yield self.weights(name)

    def _edits(
        self,
        forward: Forward,
        name: str,
        plan: LayerPlan,
        index: PositionIndex,
        hidden: Float[Tensor, "*tokens d"],
    ) -> list[Edit]:
        """The edits of one adapter in all rows."""
        weights = self.weights(name)
        factors = forward.factors(weights)
        if isinstance(weights, Interchange):
            flat = hidden.reshape(-1, hidden.shape[-1])  # (batch * seq, d)
            edited = gather(flat, index.rows, factors.lead)  # ([G,] n, d)
            given = exchange(forward, (id(self), name), edited, index, factors)
        else:
            given = [(factors, forward.keep(index, factors))]
        scale = self.scaling[name]
        edits: list[Edit] = []
        for factors, keep in given:
            edits += self._by_group(index, keep if scale == 1.0 else keep * scale, plan, factors)
        return edits

    def _by_group(
        self, index: PositionIndex, keep: Float[Tensor, "*G n _"], plan: LayerPlan, factors: Factors
    ) -> list[Edit]:
        """One edit; behind a mask one edit for each group, since every group then reads all tokens."""
        if index.mask is None or plan.sharing != "group":
            return [Edit(index.rows, keep, self._drop(keep, plan, factors), factors)]
        return [
            Edit(None, of_group, self._drop(of_group, plan, factors), factors.map(itemgetter(g)))
            for g, of_group in enumerate(keep)
        ]

    def _mixed_batch_forward(self, forward: Forward, editing: list[Editing], names: Sequence[str]) -> list[Edit]:
        """Edits of a batch whose n-th row adapter `names[n]` edits.

        Adapters that are alike, with one plan and factors of one form, are computed in one batched product. The name
        is that of LoRA's method for such batches, by which PEFT's table of methods finds that a method has them.
        """
        alike: dict[Hashable, list[tuple[str, Factors]]] = {}
        positions: dict[Hashable, tuple[LayerPlan, PositionIndex]] = {}
        for name, plan, index in editing:
            weights = self.weights(name)
            if isinstance(weights, Interchange):
                raise ValueError(f"adapter_names has {name!r}, an interchange intervention: make it active instead.")
            factors = forward.factors(weights)
            key = (plan, factors.signature)
            alike.setdefault(key, []).append((name, factors))
            positions[key] = plan, index
        edits: list[Edit] = []
        for form, members in alike.items():
            plan, index = positions[form]
            scales = tuple([(name, self.scaling[name]) for name, _ in members])
            place, scale = forward.adapters_of_rows(scales, names, index.valid.device)  # (batch,) each
            stacked = Factors.stack([factors for _, factors in members])  # (adapters, [G,] ...)
            of_rows = stacked.map(partial(torch.index_select, dim=0, index=place))  # (batch, [G,] ...)
            edits += _by_row(index, forward.keep(index, of_rows), plan, scale, of_rows)
        return edits

    def _drop(self, keep: Float[Tensor, "*G n _"], plan: LayerPlan, factors: Factors) -> Tensor | None:
        """Dropout of an edit, ([G,] n, d), or None."""
        if not plan.dropout or not self.training:
            return None
        return F.dropout(keep.new_ones(*keep.shape[:-1], factors.d), plan.dropout)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the edits of `adapter` by `scale`: 1 as trained, 0 nothing, -1 the reverse. LoRA has it too."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters by `scale`."""
        for name in self._chosen(None):
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters by `scale`; None sets it to 1."""
        for name in self._chosen(None):
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def forget(self, adapter_name: str) -> None:
        """Take an adapter out, as `delete_adapter` does, but leave the choice of active adapters alone."""
        for held in (self.loreft_weights, self.plans, self.scaling):
            del held[adapter_name]

    def remove(self) -> None:
        """Take the hook off the block, and this layer out of it."""
        self._handle.remove()
        self.attachment.layers.remove(self)
        delattr(self.block, CHILD)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT asks for the block's `weight`, which it may lack. The type is not taken over: 4-bit weights are uint8.
        if device is None:
            device = next((parameter.device for parameter in self._parameters_of_block()), None)
        if device is None or device.type == "meta" or adapter_name not in self.loreft_weights:
            return
        weights = self.loreft_weights[adapter_name]
        if not any(parameter.is_meta for parameter in weights.parameters()):
            weights.to(device)

    def cast_to_base(self, adapter_name: str) -> None:
        """Give an adapter's weights the type of the block's, as other methods do with `autocast_adapter_dtype=False`.

        Edits are computed in float32 all the same. The stored R is then orthonormal only to the rounding of that
        type. The R that computes, and the R in a saved file, are orthonormal to 1e-5.
        """
        types = [parameter.dtype for parameter in self._parameters_of_block()]
        dtype = next((each for each in types if each.is_floating_point), None)
        if dtype is not None and adapter_name in self.loreft_weights:
            self.loreft_weights[adapter_name].to(dtype)

    def _parameters_of_block(self) -> Iterator[nn.Parameter]:
        own = {id(parameter) for parameter in self.parameters()}
        return (parameter for parameter in self.block.parameters() if id(parameter) not in own)

    def why_not_merge(self, adapter_names: Iterable[str]) -> str | None:
        """Why these adapters cannot be merged here, or None if they can."""
        for name in adapter_names:
            if name not in self.plans:
                continue
            plan, weights = self.plans[name], self.weights(name)
            if not plan.groups.edits_every_token:
                spec = str(plan.groups)
                return f"positions are {spec!r}, and a weight matrix treats every position alike (allowed: 'all')"
            if plan.sharing != "all":
                return f"prompt and answer have an edit each (tie={plan.sharing!r}; allowed: 'layer', 'model')"
            if not weights.current_factors().is_affine:
                return "the formula is not affine (allowed: those without act_fn and gate, and not 'interchange')"
            try:
                projection_of(self.block)
            except ValueError as error:
                return str(error)
        return None

    def gains_bias(self, adapter_names: Iterable[str]) -> bool:
        """Whether merging would give the linear map its first bias. The adapters can be merged here."""
        edits = self._edits_to_merge([name for name in adapter_names if name in self.plans])
        return gains_bias(projection_of(self.block), edits, self.edits_input)

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        new_parameters: bool = False,
        shared: bool = False,
    ) -> None:
        """Fold the edits into the linear map whose output or input they edit; see `LoReftModel.merge_adapter`.

        Args:
            safe_merge: whether to raise ValueError, before anything is changed, if the result is not finite.
            adapter_names: which; None for the active ones.
            new_parameters: whether the linear map may get a bias if it has none.
            shared: whether other modules have the map's weight too. The map then gets a weight of its own.

        Raises:
            ValueError: the adapters cannot be merged here; the message says which condition fails.
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
            self._folded = fold(
                projection, edits, safe_merge, shared, self.quantization_backend, of_input=self.edits_input
            )
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
        """Name, factors and scale of each adapter. The parameters are read as they are now, not as a forward kept."""
        with onload_layer(self):
            return [(name, self.weights(name).current_factors(), self.scaling[name]) for name in names]

    @property
    def block(self) -> nn.Module:
        """The module whose output or input is edited."""
        return self._block[0]

    def get_base_layer(self) -> nn.Module:
        """The module whose output or input is edited, taken out of other methods' wrappers.

        PEFT's `weight`, `bias` and `get_base_weight()` call this. The layer has no attribute `base_layer`: PEFT would
        put that in the place of this child when it unloads.
        """
        block = self.block
        return block.get_base_layer() if isinstance(block, BaseTunerLayer) else block

    @property
    def quantization_backend(  # pyright: ignore[reportIncompatibleVariableOverride]  # PEFT sets it once
        self,
    ) -> QuantizationBackend | None:
        """How PEFT reads and writes the weight of the linear map whose output is edited; None if it is not quantised.

        PEFT's status functions show it, and `merge` uses it. Edits themselves read no weight of the base.
        """
        try:
            module: nn.Module = projection_of(self.block)
        except ValueError:
            module = self.get_base_layer()
        if is_plain(module):
            return None
        return resolve_quantization_backend(module, **self._quantisation)

    @property
    def in_features(self) -> int:
        """Size of the block's input, if the block says it as a linear map does, else of its output."""
        base = self.get_base_layer()
        own = getattr(base, "in_features", getattr(base, "nx", None))  # `nx`: GPT-2's linear maps
        return own if isinstance(own, int) else self.out_features

    @property
    def out_features(self) -> int:
        """Size d of the hidden states that are edited. Raises AttributeError if no adapter is left."""
        for adapter_name in self.loreft_weights:
            return self.weights(adapter_name).d
        raise AttributeError("out_features is the size of the edits, but this layer has no adapter any more.")

    def _check_input(self, hidden: Tensor, d: int) -> None:
        """Raise ValueError if the input is not the whole one, or if another method has wrapped the block since."""
        if hidden.shape[-1] != d:
            raise ValueError(
                f"component='heads' edits hidden states of size {d}, but the module was given {hidden.shape[-1]} of "
                "them: tensor parallelism divides heads among processes. Edit blocks instead (component='block')."
            )
        assert self._place is not None
        parent, name = self._place
        wrapper: Any = parent._modules.get(name)
        if isinstance(wrapper, BaseTunerLayer) and wrapper.get_base_layer() is self.block:
            raise ValueError(
                f"{type(wrapper).__module__}.{type(wrapper).__name__} was put around {name}, whose input LoReFT edits "
                "(component='heads'): its own part would get the input without the edit. Add that adapter first, then "
                f"LoReFT; or leave {name} out of it."
            )

    @property
    def has_new_bias(self) -> bool:
        """Whether merging gave the linear map a bias that it did not have."""
        return self._folded is not None and self._folded.bias is None and projection_of(self.block).bias is not None

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.unmerge()  # now: the hook runs when the block has already run
        super().enable_adapters(enabled)


def _by_row(
    index: PositionIndex,
    keep: Float[Tensor, "*G n _"],
    plan: LayerPlan,
    scale: Float[Tensor, " batch"],
    factors: Factors,
) -> list[Edit]:
    """Edits with factors of their own for each row of the batch.

    A batched product has the leading dimension of its factors, so slots are laid out by row first::

        2 rows of 2 slots, one set of weights for each row
        rows     [3 4 8 9]              ->  [[3 4]        factors of row 0
                                             [8 9]]       factors of row 1

        with G sets of weights (groups or positions): every pair of row and set is a row of the product
        rows     [[3 8]    set 0        ->  [[3]          factors of row 0, set 0
                  [4 9]]   set 1             [4]          factors of row 0, set 1
                                             [8]          factors of row 1, set 0
                                             [9]]         factors of row 1, set 1

    Args:
        index: of the slots, over all rows.
        keep: what multiplies edits, over all rows.
        plan: of the adapters.
        scale: what multiplies the edits of each row; 0 for a row that other adapters edit.
        factors: with a leading dimension of batch, and a second one of G if there are several sets.
    """
    batch = len(scale)
    keep = keep.unflatten(-2, (batch, -1))  # ([G,] batch, slots or seq, 1 or r)
    keep = keep * scale.view(-1, 1, 1)
    if index.mask is not None:
        if plan.sharing != "group":
            return [Edit(None, keep, None, factors)]
        return [
            Edit(None, of_group, None, factors.map(partial(torch.select, dim=1, index=g)))  # (batch, ...)
            for g, of_group in enumerate(keep)
        ]
    assert index.rows is not None
    rows = index.rows.unflatten(-1, (batch, -1))  # ([G,] batch, slots)
    if index.rows.ndim == 1:
        return [Edit(rows, keep, None, factors)]
    rows = rows.transpose(0, 1).flatten(0, 1)  # (batch * G, slots)
    keep = keep.transpose(0, 1).flatten(0, 1)  # (batch * G, slots, 1 or r)
    of_pairs = factors.map(partial(torch.flatten, start_dim=0, end_dim=1))  # (batch * G, ...)
    return [Edit(rows, keep, None, of_pairs)]


def _edit_output(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a block. It is a function of the module, so that the model can be copied and pickled."""
    given = tuple(output) if isinstance(output, list) else output  # GPT's first version returns a list
    hidden = given[0] if isinstance(given, tuple) else given
    if getattr(hidden, "is_meta", False):  # it has only a shape, which no edit changes, and positions cannot be read
        return output
    edited = getattr(block, CHILD)(given, args)
    if edited is given:
        return output
    return list(edited) if isinstance(output, list) else edited


def _edit_input(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before the forward of a block whose input is edited. Linear maps have one argument."""
    if not args:
        raise ValueError(
            f"{type(block).__name__}, whose input LoReFT edits, was called with {', '.join(kwargs)} by name: give the "
            "hidden states as the first argument."
        )
    hidden = args[0]
    if hidden.is_meta:
        return None
    edited = getattr(block, CHILD)(hidden, (hidden,))  # never in place: what made it, or the caller, may have kept it
    return None if edited is hidden else ((edited, *args[1:]), kwargs)
