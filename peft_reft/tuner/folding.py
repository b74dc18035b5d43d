"""Fold an edit of every token into the linear map whose output or input it edits: exact if the edit is affine.

The output of the map is y = Mx + m. With Φ(y) = y + Bᵀ(A y + b), Φ of the output is a linear map of x again. Its
weight is M + BᵀAM, its bias m + Bᵀ(A m + b). The map of the edited input Φ(x) has the weight M + MBᵀA and the bias
m + MBᵀb.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
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
"""Names that attention and feed-forward modules have for the linear map that they end with."""

_RESIDUAL_NAMES = ("residual", "input_tensor")
"""Arguments by which modules are given the residual stream, if they add it themselves after their linear map."""

NEW_BIAS = (
    "a {} without a bias would get one, which code that reads the weights by the base's names would miss (TRL's sync "
    "to vLLM leaves it out; allowed: `merge_and_unload`, or `merge_adapter(new_parameters=True)`)"
)
SHARED_WEIGHT = (
    "other modules have the weight of {} too, so the merged one would be a new parameter, which code that reads the "
    "weights by the base's names may miss (allowed: `merge_and_unload`, or `merge_adapter(new_parameters=True)`)"
)
QUANTISED = (
    "the weights are quantised ({}), so the merged ones are new parameters, rounded again, of which code that reads "
    "the weights by the base's names would get packed numbers (allowed: `merge_and_unload`, or "
    "`merge_adapter(new_parameters=True)`)"
)


@dataclass
class Folded:
    """What `unfold` needs to bring a linear map back."""

    basis: Tensor
    """B of all adapters, or B Mᵀ if the input is edited, (r, size of the output) float32."""
    inner: Tensor
    """A M of all adapters, or A if the input is edited, (r, size of the input) float32.

    The product basisᵀ inner was added to the weight."""
    weight: Tensor | None
    """The weight as it was, if an edit had no rank; it is then copied back, and nothing is subtracted."""
    bias: Tensor | None
    """The bias as it was, or None if the map had none."""
    shared: nn.Parameter | None
    """The parameter itself, if other modules have it too. The map has a weight of its own until it is unfolded."""
    quantised: Quantised | None
    """The quantised weight as it was, or None if the map is not quantised."""


class Quantised:
    """The weight of a quantised linear map, with all that says what its numbers mean. A few bits each: it is kept."""

    def __init__(self, module: nn.Module) -> None:
        self._weight = cast(nn.Parameter, module.weight)
        self._of_weight = dict(self._weight.__dict__)
        self._of_module = {
            name: copy.copy(vars(module)[name]) for name in ("state", "quant_state") if name in vars(module)
        }

    def put_back(self, module: nn.Module) -> None:
        self._weight.__dict__.update(self._of_weight)  # PEFT marks it as not quantised
        module.weight = self._weight
        for name, value in self._of_module.items():
            setattr(module, name, value)


def projection_of(module: nn.Module) -> nn.Linear | Conv1D:
    """The linear map whose output `module` returns.

    Raises:
        ValueError: no edit can be folded into a linear map of `module`; the message says why.
    """
    name = type(module).__name__
    found: list[Any] = [module]
    if not isinstance(module, nn.Linear | Conv1D):
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
    projection = found[0]
    backend = None
    if not is_plain(projection):
        backend = resolve_quantization_backend(projection, get_apply_tensor_subclass=not_known)
    if backend is None:
        allowed = type(projection) in (nn.Linear, Conv1D) and projection.weight.is_floating_point()
    else:
        allowed = backend.supports_merge and isinstance(projection, nn.Linear)
    if not allowed:
        raise ValueError(
            f"{name} ends with {type(projection).__name__}: an edit can be folded into a plain `nn.Linear` or "
            "`Conv1D`, or into weights quantised by bitsandbytes or torchao, but not into others or those of another "
            "adapter."
        )
    if getattr(getattr(projection.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has repacked the weights of {name}'s {type(projection).__name__} for this CPU, so they "
            "cannot be read. Set `support_avx512bf16_for_cpu = False` on it before the first forward in eval mode."
        )
    return projection


def is_plain(module: nn.Module) -> bool:
    """Whether types alone show that a module is not quantised. PEFT 0.20 fails to look if torchao is newer than it."""
    if type(module) in (nn.Linear, Conv1D):
        return type(module.weight) is nn.Parameter
    return not module._parameters and not module._buffers  # a block, which holds other modules


def not_known() -> None:
    """Stands for the way to quantise torchao's weights again. Transformers knows it of models that it has loaded."""
    raise ValueError("torchao has quantised the weights without transformers, so it is not known how to do it again.")


def gains_bias(module: nn.Linear | Conv1D, edits: Sequence[tuple[str, Factors, float]], of_input: bool) -> bool:
    """Whether `fold` would give a bias to a linear map that has none."""
    if module.bias is not None:
        return False
    # A map without a bias makes 0 of 0. What an edit makes of that 0 is the bias.
    zero = torch.zeros(1, _sizes(module)[1 if of_input else 0], device=module.weight.device)  # (1, d)
    of_zero = torch.stack([scale * factors.edit(zero) for _, factors, scale in edits]).sum(0)  # (1, d)
    return bool(of_zero.any())


@torch.no_grad()
def fold(
    module: nn.Linear | Conv1D,
    edits: Sequence[tuple[str, Factors, float]],
    check: bool,
    shared: bool = False,
    backend: QuantizationBackend | None = None,
    of_input: bool = False,
) -> Folded:
    """Add edits to a linear map. Each of them edits the output, or the input, that the map has without the others.

    Args:
        module: the linear map; it gets a bias if it has none and the edits have one.
        edits: adapter's name, its affine factors, and the scale that multiplies its edit.
        check: whether to raise ValueError, before anything is changed, if the result is not finite.
        shared: whether other modules have the map's weight too. The map then gets a weight of its own.
        backend: how a quantised weight is read and written; None if it is not quantised.
        of_input: whether the input is edited.
    """
    stored_weight = module.weight if backend is None else backend.get_base_weight(module)
    dtype = stored_weight.dtype
    weight = _matrix(module, stored_weight)  # M, (d_out, d_in)
    before = module.bias
    m = torch.zeros(len(weight), device=weight.device) if before is None else before.float()  # (d_out,)
    bases, inner = [weight.new_zeros(0, len(weight))], [weight.new_zeros(0, weight.shape[1])]
    bias = m.clone()  # (d_out,)
    scaling = torch.zeros_like(weight[:1] if of_input else weight[:, :1])  # (1, d_in) or (d_out, 1)
    for _, factors, scale in edits:
        assert factors.is_affine
        if isinstance(factors, LowRankFactors):
            assert isinstance(factors.coordinates, Affine)
            affine = factors.coordinates
            a = torch.zeros_like(factors.basis) if affine.weight is None else affine.weight  # (r, d)
            basis = factors.basis @ weight.T if of_input else factors.basis  # (r, d_out)
            bases.append(basis)
            inner.append(scale * (a if of_input else a @ weight))  # (r, d_in)
            bias += scale * (affine.bias if of_input else a @ m + affine.bias) @ basis
        else:
            assert isinstance(factors, ElementwiseFactors)
            if factors.scale is not None:
                scaling += scale * factors.scale.view_as(scaling)
                if not of_input:
                    bias += scale * factors.scale * m
            if factors.shift is not None:
                bias += scale * (weight @ factors.shift if of_input else factors.shift)
    basis_of_all, inner_of_all = torch.cat(bases), torch.cat(inner)  # (sum of r, d_out), (sum of r, d_in)
    merged = weight + basis_of_all.T @ inner_of_all + scaling * weight  # (d_out, d_in)
    stored = merged.to(dtype), bias.to(dtype)
    if check and not all(torch.isfinite(tensor).all() for tensor in stored):
        names = ", ".join(name for name, _, _ in edits)
        raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken")
    folded = Folded(
        basis=basis_of_all,
        inner=inner_of_all,
        weight=None,
        bias=None if before is None else before.detach().clone(),
        shared=None,
        quantised=None,
    )
    if backend is not None:
        folded.quantised = Quantised(module)
    elif shared:
        folded.shared = cast(nn.Parameter, module.weight)
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
    elif scaling.any():
        folded.weight = module.weight.detach().clone()
    if backend is None:
        _set_matrix(module, merged)
    else:
        assert folded.quantised is not None
        try:
            backend.set_base_weight(_Holder(module), merged.to(dtype))
        except Exception:
            folded.quantised.put_back(module)
            raise
    if before is not None:
        before.copy_(bias)
    elif bias.any():
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=module.weight.requires_grad)
    return folded


@torch.no_grad()
def unfold(module: nn.Linear | Conv1D, folded: Folded) -> None:
    """Undo `fold`, to the rounding of the weights' type."""
    if folded.quantised is not None:
        folded.quantised.put_back(module)
    elif folded.shared is not None:
        module.weight = folded.shared
    elif folded.weight is not None:
        module.weight.copy_(folded.weight)
    else:
        _set_matrix(module, _matrix(module, module.weight) - folded.basis.T @ folded.inner)
    if folded.bias is None:
        module.bias = None
    else:
        module.bias.copy_(folded.bias)


@contextmanager
def onloaded(module: nn.Linear | Conv1D) -> Iterator[None]:
    """Load offloaded weights, and offload them again at the end with what was written to them."""
    holder: Any = nn.Module()
    holder.base_layer = module  # the name by which PEFT knows what to write back
    with onload_layer(holder):
        yield


class _Holder:
    """What a backend of PEFT writes a weight through: an object that has the linear map as a tuner's layer has it."""

    def __init__(self, module: nn.Module) -> None:
        self.base_layer = module

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


def _matrix(module: nn.Linear | Conv1D, weight: Tensor) -> Tensor:
    """The weight as (size of the output, size of the input) float32; `Conv1D` stores the transpose."""
    return (weight.T if isinstance(module, Conv1D) else weight).float()


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """The sizes of output and input."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    return module.out_features, module.in_features


def _set_matrix(module: nn.Linear | Conv1D, weight: Tensor) -> None:
    module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
