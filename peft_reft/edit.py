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

from .factors import Factors
from .rotation import without_autocast


@dataclass(frozen=True)
class Edit:
    """An edit, to be added at some tokens. Float32 but for `rows`."""

    rows: Tensor | None
    """(n,) or (G, n) int64 into the tokens; None: all of them, in order, in G equal parts if there are G factors."""
    keep: Tensor
    """(n, 1) or (G, n, 1): 0 drops an empty slot, another number scales; (..., r): for each coordinate."""
    drop: Tensor | None
    """(n, d) or (G, n, d): dropout, on what is added."""
    factors: Factors
    """Leading dimension G, or none."""


def add_edits(hidden: Tensor, edits: list[Edit], in_place: bool) -> Tensor:
    """`hidden` plus all `edits`, each computed from `hidden` as it came.

    Args:
        hidden: (..., d), any float type; its tokens count in order.
        edits: at least one.
        in_place: whether `hidden` itself may be changed; see `may_change`.

    Returns:
        (..., d) of the type of `hidden`; `hidden` itself if it was changed.
    """
    with without_autocast(hidden.device.type):
        plain = in_place and not torch.is_grad_enabled() and hidden.dtype == torch.float32
        if plain and len(edits) == 1 and edits[0].drop is None:
            return _add_now(hidden, edits[0])
        # An edit of every token keeps `hidden` for its backward, as it came.
        in_place = in_place and all(edit.rows is not None for edit in edits)
        tensors: list[Tensor | None] = []
        for edit in edits:
            factors = edit.factors
            if factors.is_affine and factors.b is not None:
                tensors += [edit.rows, edit.keep, edit.drop, factors.a, factors.b, factors.bias]
            else:  # differentiated by autograd; only adding is left
                h = gather(hidden.reshape(-1, hidden.shape[-1]), edit.rows, factors.lead).float()
                tensors += [edit.rows, factors.edit(h, edit.keep), edit.drop, None, None, None]
        return _AddEdits.apply(hidden, in_place, *tensors)


def _add_now(hidden: Tensor, edit: Edit) -> Tensor:
    """One edit, in place and without gradients: what a decode step that edits can spare is a call of autograd."""
    flat, factors = hidden.view(-1, hidden.shape[-1]), edit.factors
    h = gather(flat, edit.rows, factors.lead)
    if edit.rows is None and h.ndim == 2 and factors.is_affine and factors.b is not None:
        flat.addmm_(factors.inner(h) * edit.keep, factors.b)
    else:
        _scatter_add(flat, edit.rows, factors.edit(h, edit.keep))
    return hidden


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
        """Six tensors an edit: rows, keep, drop, A, B and b; or without B, the change itself instead of `keep`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        saved: list[Tensor | None] = []
        added, leads = [], []
        for at in range(0, len(tensors), 6):
            rows, keep, drop, a, b, bias = tensors[at : at + 6]
            h = inner = None
            assert keep is not None
            if b is None:
                change, keep = keep, None
            else:
                h = gather(flat, rows, len(b) if b.ndim == 3 else None).float()
                inner = Factors(a, b, bias).inner(h) * keep
                change = inner @ b
            leads.append(len(change) if change.ndim == 3 else None)
            if drop is not None:
                change = change * drop
            added.append((rows, change.to(flat.dtype)))
            saved += [rows, keep, drop, a, b, None if a is None else h, inner]
        ctx.save_for_backward(*saved)
        ctx.leads = leads
        if in_place:
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out = hidden.clone(memory_format=torch.contiguous_format)
        for rows, change in added:
            _scatter_add(out.view_as(flat), rows, change)
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
        for n, lead in enumerate(ctx.leads):
            rows, keep, drop, a, b, h, inner = saved[7 * n : 7 * n + 7]
            g = gather(flat, rows, lead).float()
            if drop is not None:
                g = g * drop
            if b is None:
                out += [None, g, None, None, None, None]
                continue
            g_inner = g @ b.mT * keep
            g_a = None if a is None else g_inner.mT @ h
            out += [None, None, None, g_a, inner.mT @ g, g_inner.sum(-2)]
            if grad_hidden is not None and a is not None:
                _scatter_add(grad_hidden.view_as(flat), rows, (g_inner @ a).to(grad.dtype))
        return grad_hidden, None, *out


def gather(flat: Tensor, rows: Tensor | None, lead: int | None) -> Tensor:
    """(n, d), or (G, n, d) with `lead` = G."""
    if rows is None:
        return flat if lead is None else flat.unflatten(0, (lead, -1))
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
