"""`LoreftLayer`: the child of a block that holds its adapters and edits its output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from .edit import Edit, add_edits, may_change
from .interventions import Factors, Intervention
from .positions import PositionIndex
from .runtime import LayerPlan, PositionState

CHILD = "loreft"
"""Name of the layer in its block. Keys read `...layers.3.loreft.loreft_weights.<adapter>.R`."""


class LoreftLayer(nn.Module, BaseTunerLayer):
    """Edits the output of the block it is a child of, at the positions that the model's `PositionState` has.

    Args:
        block: the module whose output is edited; a forward hook on it calls this layer.
        state: positions of the running forward, shared by all layers of the model.
    """

    adapter_layer_names = ("loreft_weights",)
    other_param_names = ("plans",)

    def __init__(self, block: nn.Module, state: PositionState) -> None:
        super().__init__()
        self.loreft_weights = nn.ModuleDict()
        self.plans: dict[str, LayerPlan] = {}
        self.state = state
        state.layers.append(self)
        self._block = (block,)  # in a tuple, or it would be registered as a child of its own child
        # `prepend`: transformers' recorder of hidden states is a hook too, and must see the edited ones.
        self._handle = block.register_forward_hook(_edit_output, prepend=True)

    def update_layer(self, adapter_name: str, intervention: Intervention, plan: LayerPlan) -> None:
        """Add an adapter, or replace the one of that name."""
        self.loreft_weights[adapter_name] = intervention
        self.plans[adapter_name] = plan
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, output: Any, inputs: Sequence[Any] = (), adapter_names: Sequence[str] | None = None) -> Any:
        """Edit a block's output.

        Args:
            output: hidden states (batch, seq, d) or (batch * seq, d), or a tuple that begins with them.
            inputs: what the block was given, which is never changed.
            adapter_names: one adapter a row (`"__base__"` for none) instead of the active ones for all.

        Returns:
            The same structure with edited hidden states; the very same object where nothing is edited.
        """
        if self.disable_adapters:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        wanted = cast(Iterable[str], self.active_adapters) if adapter_names is None else dict.fromkeys(adapter_names)
        found: list[tuple[str, LayerPlan, PositionIndex]] = []
        for name in wanted:
            if name in self.plans and (index := self.state.index(self.plans[name], hidden)) is not None:
                found.append((name, self.plans[name], index))
        if not found:
            return output
        batch, seq = found[0][2].shape
        if hidden.numel() != batch * seq * hidden.shape[-1]:
            raise ValueError(
                f"LoReFT was given positions for a batch of {batch} x {seq} tokens, but the module it edits returned "
                f"hidden states of shape {tuple(hidden.shape)}."
            )
        if adapter_names is None:
            edits = [edit for name, plan, index in found for edit in self._edits(name, plan, index)]
        else:
            edits = self._edits_by_row(found, self.state.names_of_rows(adapter_names, batch))
        edited = add_edits(hidden, edits, may_change(hidden, inputs))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _edits(self, name: str, plan: LayerPlan, index: PositionIndex) -> list[Edit]:
        """One adapter's edits of all rows."""
        a, b, bias = self.state.factors(cast(Intervention, self.loreft_weights[name]))
        if index.mask is None or plan.by != "group":
            return [Edit(index.rows, self._drop(index.keep, plan, b.shape[-1]), a, b, bias)]
        return [
            Edit(None, self._drop(keep, plan, b.shape[-1]), None if a is None else a[g], b[g], bias[g])
            for g, keep in enumerate(index.keep)
        ]

    def _edits_by_row(self, found: list[tuple[str, LayerPlan, PositionIndex]], names: Sequence[str]) -> list[Edit]:
        """Edits of a batch whose row n is edited by adapter `names[n]`: adapters alike in one batched product."""
        alike: dict[Any, list[tuple[str, Factors]]] = {}
        shared: dict[Any, tuple[LayerPlan, PositionIndex]] = {}
        for name, plan, index in found:
            factors = self.state.factors(cast(Intervention, self.loreft_weights[name]))
            key = (plan, factors[0] is None, factors[1].shape)
            alike.setdefault(key, []).append((name, factors))
            shared[key] = plan, index
        edits: list[Edit] = []
        for key, adapters in alike.items():
            plan, index = shared[key]
            which, chosen = self.state.rows_of([name for name, _ in adapters], names, index.keep.device)
            a, b, bias = (
                None if parts[0] is None else torch.stack(parts).index_select(0, which)
                for parts in zip(*(factors for _, factors in adapters))
            )
            assert b is not None and bias is not None
            edits += _by_row(index, plan, chosen, a, b, bias)
        return edits

    def active_weights(self) -> Iterator[Intervention]:
        """What edits in a forward that names no adapters."""
        if not self.disable_adapters:
            for name in cast(Iterable[str], self.active_adapters):
                if name in self.plans:
                    yield cast(Intervention, self.loreft_weights[name])

    def _drop(self, keep: Tensor, plan: LayerPlan, d: int) -> Tensor:
        if not plan.dropout or not self.training:
            return keep
        return F.dropout(keep.expand(*keep.shape[:-1], d), plan.dropout)

    def remove(self) -> None:
        """Take the hook off the block, and this layer out of it."""
        self._handle.remove()
        self.state.layers.remove(self)
        delattr(self._block[0], CHILD)

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
        return (p for p in self._block[0].parameters() if id(p) not in own)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_REASON)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


MERGE_REASON = (
    "LoReFT cannot be merged into the base model: it edits hidden states at a few token positions, and a weight "
    "matrix treats every position alike. Keep the adapter beside the model: it costs nothing while decoding. "
    "`unload()` gives the base model back without it."
)


def _by_row(
    index: PositionIndex, plan: LayerPlan, chosen: Tensor, a: Tensor | None, b: Tensor, bias: Tensor
) -> list[Edit]:
    """Edits with factors of their own for each of the rows, (rows, ...); `chosen` (rows,) is 0 for rows left alone."""
    rows = len(chosen)
    if index.mask is not None:
        masks = index.keep.unflatten(-2, (rows, -1)) * chosen.view(-1, 1, 1)  # ([G,] rows, seq, 1)
        if plan.by != "group":
            return [Edit(None, masks, a, b, bias)]
        return [Edit(None, m, None if a is None else a[:, g], b[:, g], bias[:, g]) for g, m in enumerate(masks)]
    assert index.rows is not None
    at, keep = index.rows.unflatten(-1, (rows, -1)), index.keep.unflatten(-2, (rows, -1)) * chosen.view(-1, 1, 1)
    if index.rows.ndim == 1:
        return [Edit(at, keep, a, b, bias)]
    # (G, rows, slots) and (rows, G, r, d): each pair of row and group has factors of its own.
    at, keep = at.transpose(0, 1).flatten(0, 1), keep.transpose(0, 1).flatten(0, 1)
    return [Edit(at, keep, None if a is None else a.flatten(0, 1), b.flatten(0, 1), bias.flatten(0, 1))]


def _edit_output(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a block. A module-level function, so that the model can be copied and pickled."""
    return getattr(block, CHILD)(output, args)
