"""Gather, edit, scatter: all edits of one module's output in one autograd function.

What autograd would make of the same few lines costs a copy of the hidden states and several of their gradient. Written
by hand, a layer saves the gathered tokens and nothing else, and changes the hidden states where they are, wherever
nothing else can have kept them for its own backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """``keep · Bᵀ(A h + b)``, to be added at some tokens. Float32 but for `rows`."""

    rows: Tensor | None
    """(n,) or (G, n) int64 into the tokens; None: all of them, in order."""
    keep: Tensor
    """(n, 1) or (G, n, 1): 0 drops an empty slot; or (n, d) with dropout."""
    a: Tensor | None
    """(r, d) or (G, r, d), or None for a formula without one."""
    b: Tensor
    """As `a`."""
    bias: Tensor
    """(r,) or (G, r)."""


def add_edits(flat: Tensor, edits: list[Edit], in_place: bool) -> Tensor:
    """`flat` plus all `edits`, each computed from `flat` as it came.

    Args:
        flat: (tokens, d), any float type.
        edits: at least one.
        in_place: whether `flat` itself may be changed; see `may_change`.

    Returns:
        (tokens, d) of the type of `flat`; `flat` itself if it was changed.
    """
    # An edit of every token keeps `flat` for its backward, as it came.
    in_place = in_place and all(edit.rows is not None for edit in edits)
    tensors = [tensor for e in edits for tensor in (e.rows, e.keep, e.a, e.b, e.bias)]
    device = flat.device.type
    if not torch.is_autocast_enabled(device):
        return _AddEdits.apply(flat, in_place, *tensors)
    with torch.autocast(device, enabled=False):
        return _AddEdits.apply(flat, in_place, *tensors)


def may_change(hidden: Tensor) -> bool:
    """Whether `hidden`, just returned by a module, can be changed in place.

    Addition, by which a residual block ends, keeps nothing for its backward; what other operations keep is not for us
    to know. A view may share memory with anything.
    """
    if torch.compiler.is_compiling() or hidden._is_view():
        return False
    made_by = hidden.grad_fn
    return not hidden.requires_grad if made_by is None else type(made_by).__name__ == "AddBackward0"


class _AddEdits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, in_place: bool, *tensors: Tensor | None) -> Tensor:
        edits = [Edit(*tensors[at : at + 5]) for at in range(0, len(tensors), 5)]  # type: ignore[arg-type]
        ctx.d = flat.shape[-1]
        saved: list[Tensor | None] = []
        added = []
        for edit in edits:
            h = _gather(flat, edit.rows).float()
            inner = edit.bias.unsqueeze(-2)
            inner = inner.expand(*h.shape[:-1], -1) if edit.a is None else torch.matmul(h, edit.a.mT) + inner
            added.append((torch.matmul(inner, edit.b) * edit.keep).to(flat.dtype))
            saved += [edit.rows, edit.keep, edit.a, edit.b, None if edit.a is None else h, inner]
        ctx.save_for_backward(*saved)
        out = flat if in_place else flat.clone()
        if in_place:
            ctx.mark_dirty(flat)
        for edit, change in zip(edits, added):
            _scatter_add(out, edit.rows, change)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0]
        device = grad.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _AddEdits._backward(ctx, grad)
        return _AddEdits._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # Not in place: autograd may have given the same gradient to the other branch of a residual sum.
        grad_flat = grad.clone() if ctx.needs_input_grad[0] else None
        out: list[Tensor | None] = []
        for which in range(len(saved) // 6):
            rows, keep, a, b, h, inner = saved[6 * which : 6 * which + 6]
            g = _gather(grad, rows).float() * keep
            g_inner = torch.matmul(g, b.mT)
            g_a = None if a is None else torch.matmul(g_inner.mT, h)
            out += [None, None, g_a, torch.matmul(inner.mT, g), g_inner.sum(-2)]
            if grad_flat is not None and a is not None:
                _scatter_add(grad_flat, rows, torch.matmul(g_inner, a).to(grad.dtype))
        return grad_flat, None, *out


def _gather(flat: Tensor, rows: Tensor | None) -> Tensor:
    """(n, d) or (G, n, d)."""
    return flat if rows is None else flat.index_select(0, rows.flatten()).view(*rows.shape, flat.shape[-1])


def _scatter_add(flat: Tensor, rows: Tensor | None, change: Tensor) -> None:
    if rows is None:
        flat.add_(change)
    else:
        flat.index_add_(0, rows.flatten(), change.flatten(0, -2))
