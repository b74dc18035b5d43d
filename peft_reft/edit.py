"""Gather, edit, scatter: all edits of one module's output in one autograd function.

What autograd would make of the same few lines costs a copy of the hidden states and several of their gradient. Written
by hand, a layer saves the gathered tokens and nothing else, and changes the hidden states where they are, wherever
nothing else can have kept them for its own backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interventions import inner_of, without_autocast


@dataclass(frozen=True)
class Edit:
    """``keep · Bᵀ(A h + b)``, to be added at some tokens. Float32 but for `rows`."""

    rows: Tensor | None
    """(n,) or (G, n) int64 into the tokens; None: all of them, in order, in G equal parts if there are G factors."""
    keep: Tensor
    """(n, 1) or (G, n, 1): 0 drops an empty slot; or (n, d) with dropout."""
    a: Tensor | None
    """(r, d) or (G, r, d), or None for a formula without one."""
    b: Tensor
    """As `a`."""
    bias: Tensor
    """(r,) or (G, r)."""


def add_edits(hidden: Tensor, edits: list[Edit], in_place: bool) -> Tensor:
    """`hidden` plus all `edits`, each computed from `hidden` as it came.

    Args:
        hidden: (..., d), any float type; its tokens count in order.
        edits: at least one.
        in_place: whether `hidden` itself may be changed; see `may_change`.

    Returns:
        (..., d) of the type of `hidden`; `hidden` itself if it was changed.
    """
    # An edit of every token keeps `hidden` for its backward, as it came.
    in_place = in_place and all(edit.rows is not None for edit in edits)
    tensors = [tensor for e in edits for tensor in (e.rows, e.keep, e.a, e.b, e.bias)]
    with without_autocast(hidden.device.type):
        return _AddEdits.apply(hidden, in_place, *tensors)


def may_change(hidden: Tensor, inputs: Iterable[Any] = ()) -> bool:
    """Whether `hidden`, just returned by a module that was given `inputs`, can be changed in place.

    Addition, by which a residual block ends, keeps nothing for its backward; what other operations keep is not for us
    to know. A view may share memory with anything, and what was handed through still belongs to the caller.
    """
    if torch.compiler.is_compiling() or hidden._is_view() or not hidden.is_contiguous():
        return False
    if any(isinstance(given, Tensor) and given.data_ptr() == hidden.data_ptr() for given in inputs):
        return False
    made_by = hidden.grad_fn
    return not hidden.requires_grad if made_by is None else type(made_by).__name__ == "AddBackward0"


class _AddEdits(torch.autograd.Function):
    """Takes the hidden states in their own shape: changing a view in place would cost autograd copies of its base."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, in_place: bool, *tensors: Tensor | None) -> Tensor:
        edits = [Edit(*tensors[at : at + 5]) for at in range(0, len(tensors), 5)]  # type: ignore[arg-type]
        flat = hidden.reshape(-1, hidden.shape[-1])
        saved: list[Tensor | None] = []
        added = []
        for edit in edits:
            h = _gather(flat, edit.rows, edit.b).float()
            inner = inner_of(h, edit.a, edit.bias)
            if _is_thin(edit.keep):
                inner = inner * edit.keep
                change = inner @ edit.b
            else:
                change = inner @ edit.b * edit.keep
            added.append(change.to(flat.dtype))
            saved += [edit.rows, edit.keep, edit.a, edit.b, None if edit.a is None else h, inner]
        ctx.save_for_backward(*saved)
        if in_place:
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out = hidden.clone(memory_format=torch.contiguous_format)
        for edit, change in zip(edits, added):
            _scatter_add(out.view_as(flat), edit.rows, change)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with without_autocast(grads[0].device.type):
            return _AddEdits._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        # Not in place: autograd may have given the same gradient to the other branch of a residual sum.
        grad_hidden = grad.clone(memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        out: list[Tensor | None] = []
        for which in range(len(saved) // 6):
            rows, keep, a, b, h, inner = saved[6 * which : 6 * which + 6]
            g = _gather(flat, rows, b).float()
            if _is_thin(keep):
                g_inner = g @ b.mT * keep
            else:
                g = g * keep
                g_inner = g @ b.mT
            g_a = None if a is None else g_inner.mT @ h
            out += [None, None, g_a, inner.mT @ g, g_inner.sum(-2)]
            if grad_hidden is not None and a is not None:
                _scatter_add(grad_hidden.view_as(flat), rows, (g_inner @ a).to(grad.dtype))
        return grad_hidden, None, *out


def _is_thin(keep: Tensor) -> bool:
    """Whether `keep` is the same for all of a token's d elements: then it may as well act on r of them."""
    return keep.shape[-1] == 1


def _gather(flat: Tensor, rows: Tensor | None, b: Tensor) -> Tensor:
    """(n, d) or (G, n, d)."""
    if rows is None:
        return flat if b.ndim == 2 else flat.unflatten(0, (len(b), -1))
    if rows.ndim == 1:
        return flat.index_select(0, rows)
    return flat.index_select(0, rows.flatten()).view(*rows.shape, flat.shape[-1])


def _scatter_add(flat: Tensor, rows: Tensor | None, change: Tensor) -> None:
    if rows is None:
        flat.add_(change.view_as(flat))
    elif rows.ndim == 1:
        flat.index_add_(0, rows, change)
    else:
        flat.index_add_(0, rows.flatten(), change.flatten(0, -2))
