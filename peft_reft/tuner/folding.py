"""Fold an edit of every token into the linear map whose output it edits: exact where the edit is affine.

With y = Mx + m the output of the map and Φ(y) = y + Bᵀ(A y + b), Φ of it is a linear map again, of weight M + BᵀAM and
bias m + Bᵀ(A m + b).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..edits.factors import Affine, ElementwiseFactors, Factors, LowRankFactors

_OUTPUT_NAMES = (
    "o_proj",
    "out_proj",
    "c_proj",
    "dense",
    "dense_4h_to_h",
    "down_proj",
    "fc2",
    "fc_out",
    "linear_out",
)
"""Names by which attention and feed-forward modules know the linear map that they end with."""

_RESIDUAL_NAMES = ("residual", "input_tensor")
"""Arguments of modules that add the residual stream themselves, after their linear map."""

NEW_BIAS = (
    "a {} without a bias would get one, and who reads the weights by the base's names does not know it (TRL's sync to "
    "vLLM leaves it out; allowed: `merge_and_unload`, or `merge_adapter(new_parameters=True)`)"
)
SHARED_WEIGHT = (
    "other modules have the weight of {} too, so the merged one would be a new parameter, and who reads the weights "
    "by the base's names may not know it (allowed: `merge_and_unload`, or `merge_adapter(new_parameters=True)`)"
)


@dataclass
class Folded:
    """What a linear map was before, kept to be brought back."""

    b: Tensor
    """(r, d) float32, of all adapters."""
    inner: Tensor
    """A M, (r, size of the input) float32: what was added to the weight is the product of the two ..."""
    weight: Tensor | None
    """... unless there were edits without a rank: then the weight itself."""
    bias: Tensor | None
    """None if there was none."""
    shared: nn.Parameter | None
    """The weight itself, if other modules have it too: while merged, the linear map has one of its own."""


def projection_of(module: nn.Module) -> nn.Linear | Conv1D:
    """The linear map whose output `module` returns.

    Raises:
        ValueError: there is none that an edit could be folded into; the message says why.
    """
    name = type(module).__name__
    found: list[Any] = [module]
    if type(module) not in (nn.Linear, Conv1D):
        takes = [argument for argument in inspect.signature(module.forward).parameters if argument in _RESIDUAL_NAMES]
        if takes:
            raise ValueError(f"{name} adds the residual stream ({takes[0]!r}) to the output of its last linear map.")
        found = [child for child_name, child in module.named_children() if child_name in _OUTPUT_NAMES]
        if len(found) != 1:
            children = ", ".join(child_name for child_name, _ in module.named_children())
            raise ValueError(
                f"{name} has no single linear map at its end by a known name ({', '.join(_OUTPUT_NAMES)}); it has: "
                f"{children or 'no modules'}."
            )
    if type(found[0]) not in (nn.Linear, Conv1D) or not found[0].weight.is_floating_point():
        raise ValueError(
            f"{name} ends with {type(found[0]).__name__}: an edit can be folded into a plain `nn.Linear` or `Conv1D` "
            "only, not into quantised weights or those of another adapter."
        )
    return found[0]


def gains_bias(module: nn.Linear | Conv1D, edits: Sequence[tuple[str, Factors, float]]) -> bool:
    """Whether `fold` would give a bias to the linear map, which has none."""
    if module.bias is not None:
        return False
    # Of a map without a bias the output of 0 is 0: what an edit makes of it is the bias.
    zero = torch.zeros(1, len(_matrix(module)), device=module.weight.device)
    return bool(torch.stack([scale * factors.edit(zero) for _, factors, scale in edits]).sum(0).any())


@torch.no_grad()
def fold(
    module: nn.Linear | Conv1D, edits: Sequence[tuple[str, Factors, float]], check: bool, shared: bool = False
) -> Folded:
    """Add edits, each of the map's own output, to the map.

    Args:
        module: the linear map; gets a bias if it has none and the edits have one.
        edits: name, affine factors or scale and shift, and the factor that the edit is multiplied by.
        check: whether to raise ValueError, before anything is changed, if the result is not finite.
        shared: whether other modules have the map's weight too, which then gets one of its own.
    """
    weight = _matrix(module)
    before = module.bias
    m = torch.zeros(len(weight), device=weight.device) if before is None else before.float()
    b, inner = weight.new_zeros(0, len(weight)), weight.new_zeros(0, weight.shape[1])
    scaling, bias = torch.zeros_like(m), m.clone()
    for _, factors, scale in edits:
        assert factors.is_affine
        if isinstance(factors, LowRankFactors):
            assert isinstance(factors.coordinates, Affine)
            basis, affine = factors.basis, factors.coordinates
            a = torch.zeros_like(basis) if affine.weight is None else affine.weight
            b, inner = torch.cat([b, basis]), torch.cat([inner, scale * (a @ weight)])
            bias += scale * (a @ m + affine.bias) @ basis
        else:
            assert isinstance(factors, ElementwiseFactors)
            u = torch.zeros_like(m) if factors.scale is None else factors.scale
            scaling += scale * u
            bias += scale * (u * m + factors.shift)
    merged = weight + b.T @ inner + scaling.unsqueeze(-1) * weight
    stored = merged.to(module.weight.dtype), bias.to(module.weight.dtype)
    if check and not all(torch.isfinite(tensor).all() for tensor in stored):
        names = ", ".join(name for name, _, _ in edits)
        raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken")
    folded = Folded(b, inner, None, None if before is None else before.detach().clone(), None)
    if shared:
        folded.shared = cast(nn.Parameter, module.weight)
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
    elif scaling.any():
        folded.weight = module.weight.detach().clone()
    _set_matrix(module, merged)
    if before is not None:
        before.copy_(bias)
    elif bias.any():
        module.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
    return folded


@torch.no_grad()
def unfold(module: nn.Linear | Conv1D, folded: Folded) -> None:
    """Undo `fold`, to the rounding of the weights' type."""
    if folded.shared is not None:
        module.weight = folded.shared
    elif folded.weight is not None:
        module.weight.copy_(folded.weight)
    else:
        _set_matrix(module, _matrix(module) - folded.b.T @ folded.inner)
    if folded.bias is None:
        module.bias = None
    else:
        module.bias.copy_(folded.bias)


@contextmanager
def onloaded(module: nn.Linear | Conv1D) -> Iterator[None]:
    """While it lasts, weights that are offloaded are here; what was written to them is offloaded when it ends."""
    holder: Any = nn.Module()
    holder.base_layer = module  # the name by which PEFT knows what to write back
    with onload_layer(holder):
        yield


def _matrix(module: nn.Linear | Conv1D) -> Tensor:
    """The weight, (size of the output, size of the input) float32."""
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).float()


def _set_matrix(module: nn.Linear | Conv1D, weight: Tensor) -> None:
    module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
