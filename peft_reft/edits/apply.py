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

from .factors import Affine, Factors, LowRankFactors
from .modes import in_transform, without_autocast


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
        if in_transform():
            return _add_in_plain_operations(hidden, edits)
        plain = in_place and not torch.is_grad_enabled() and hidden.dtype == torch.float32
        if plain and len(edits) == 1 and edits[0].drop is None:
            return _add_now(hidden, edits[0])
        # An edit of every token keeps `hidden` for its backward, as it came.
        in_place = in_place and all(edit.rows is not None for edit in edits)
        tensors: list[Tensor | None] = []
        for edit in edits:
            if (affine := _affine(edit.factors)) is not None:
                basis, inner = affine
                tensors += [edit.rows, edit.keep, edit.drop, inner.weight, basis, inner.bias]
            else:  # differentiated by autograd; only adding is left
                change = edit.factors.edit(_gathered(hidden, edit), edit.keep)
                tensors += [edit.rows, change, edit.drop, None, None, None]
        added: Tensor = _AddEdits.apply(hidden, in_place, *tensors)[0]
        return added


def _affine(factors: Factors) -> tuple[Tensor, Affine] | None:
    """B, and A and b, if there is nothing else."""
    if isinstance(factors, LowRankFactors) and factors.gate is None and isinstance(factors.coordinates, Affine):
        return factors.basis, factors.coordinates
    return None


def _gathered(hidden: Tensor, edit: Edit) -> Tensor:
    """The tokens that are edited, ([G,] n, d) float32."""
    return gather(hidden.reshape(-1, hidden.shape[-1]), edit.rows, edit.factors.lead).float()


def _add_in_plain_operations(hidden: Tensor, edits: list[Edit]) -> Tensor:
    """`add_edits` where transforms of torch must be able to look inside."""
    flat = hidden.reshape(-1, hidden.shape[-1])  # (tokens, d)
    for edit in edits:
        change = edit.factors.edit(_gathered(hidden, edit), edit.keep)  # ([G,] n, d)
        change = (change if edit.drop is None else change * edit.drop).to(flat.dtype).reshape(-1, flat.shape[-1])
        flat = flat + change if edit.rows is None else flat.index_add(0, edit.rows.flatten(), change)
    return flat.view_as(hidden)


def _add_now(hidden: Tensor, edit: Edit) -> Tensor:
    """One edit, in place and without gradients: what a decode step that edits can spare is a call of autograd."""
    flat, factors = hidden.view(-1, hidden.shape[-1]), edit.factors
    h = gather(flat, edit.rows, factors.lead)
    if edit.rows is None and h.ndim == 2 and (affine := _affine(factors)) is not None:
        basis, inner = affine
        flat.addmm_(inner.of(h) * edit.keep, basis)
    else:
        _scatter_add(flat, edit.rows, factors.edit(h, edit.keep))
    return hidden


def may_change(hidden: Tensor, inputs: Iterable[Any] = ()) -> bool:
    """Whether `hidden`, just returned by a module that was given `inputs`, can be changed in place.

    Addition, by which a residual block ends, keeps nothing for its backward; what other operations keep is not for us
    to know. A view may share memory with anything, and what was handed through still belongs to the caller.
    """
    if torch.compiler.is_compiling() or in_transform() or hidden._is_view() or not hidden.is_contiguous():
        return False
    if any(isinstance(given, Tensor) and given.data_ptr() == hidden.data_ptr() for given in inputs):
        return False
    made_by = hidden.grad_fn
    return not hidden.requires_grad if made_by is None else type(made_by).__name__ == "AddBackward0"


class _AddEdits(torch.autograd.Function):
    """Takes the hidden states in their own shape: changing a view in place would cost autograd copies of its base.

    The gathered tokens are outputs, too, for the sake of second derivatives: the backward is a function of them, and
    autograd finds its way from there to `hidden`, of which nothing else is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, in_place: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Six tensors an edit: rows, keep, drop, A, B and b; or without B, the change itself instead of `keep`."""
        flat = hidden.reshape(-1, hidden.shape[-1])  # (tokens, d)
        saved: list[Tensor | None] = []
        added, leads, gathered = [], [], []
        keeps_hidden = False
        for at in range(0, len(tensors), _GIVEN):
            rows, keep, drop, a, b, bias = tensors[at : at + _GIVEN]
            h = inner = None
            assert keep is not None
            if b is None:
                change, keep = keep, None  # ([G,] n, d)
            else:
                assert bias is not None
                h = gather(flat, rows, len(b) if b.ndim == 3 else None).float()  # ([G,] n, d)
                inner = Affine(a, bias).of(h) * keep  # ([G,] n, r)
                change = inner @ b
                if a is None:
                    h = None
                elif rows is None:
                    h, keeps_hidden = None, True
                else:
                    gathered.append(h)
            leads.append(len(change) if change.ndim == 3 else None)
            if drop is not None:
                change = change * drop
            added.append((rows, change.to(flat.dtype)))
            saved += [rows, keep, drop, a, b, bias, h, inner]
        ctx.save_for_backward(hidden if keeps_hidden else None, *saved)
        ctx.set_materialize_grads(False)
        ctx.leads, ctx.shape, ctx.dtype = leads, hidden.shape, hidden.dtype
        if in_place:
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out = hidden.clone(memory_format=torch.contiguous_format)
        for rows, change in added:
            _scatter_add(out.view_as(flat), rows, change)
        return out, *gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        device = next(grad.device for grad in grads if grad is not None)
        grad, *of_gathered = grads
        if grad is None:  # a second derivative that passes through the gathered tokens alone
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=device)
        with without_autocast(device.type):
            return _AddEdits._backward(ctx, grad, of_gathered)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor, of_gathered: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        hidden, *saved = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # (tokens, d)
        # Not in place: autograd may have given the same gradient to the other branch of a residual sum.
        grad_hidden = grad.clone(memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        grads_of_h = iter(of_gathered)
        out: list[Tensor | None] = []
        for n, lead in enumerate(ctx.leads):
            rows, keep, drop, a, b, bias, h, inner = saved[_SAVED * n : _SAVED * (n + 1)]
            g = gather(flat, rows, lead).float()  # ([G,] n, d)
            if drop is not None:
                g = g * drop
            if b is None:
                out += [None, g, None, None, None, None]
                continue
            if a is not None and rows is None:
                h = gather(hidden.reshape(flat.shape), None, lead).float()
            if torch.is_grad_enabled():  # `create_graph`: what was saved of this has no history
                inner = (bias.unsqueeze(-2) if h is None else Affine(a, bias).of(h)) * keep
            g_inner = g @ b.mT * keep  # ([G,] n, r)
            g_a = None if a is None else g_inner.mT @ h
            out += [None, None, None, g_a, inner.mT @ g, g_inner.sum(-2)]
            if a is None:
                continue
            g_h = g_inner @ a
            if rows is not None and (more := next(grads_of_h)) is not None:
                g_h = g_h + more
            if grad_hidden is not None:
                _scatter_add(grad_hidden.view_as(flat), rows, g_h.to(grad.dtype))
        return grad_hidden, None, *out


_GIVEN, _SAVED = 6, 8
"""Tensors an edit that `_AddEdits` is given, and that it saves."""


def gather(flat: Tensor, rows: Tensor | None, lead: int | None) -> Tensor:
    """(n, d), or (G, n, d) with `lead` = G."""
    if rows is None:
        return flat if lead is None else flat.reshape(lead, -1, flat.shape[-1])
    if rows.ndim == 1:
        return flat.index_select(0, rows)
    return flat.index_select(0, rows.flatten()).view(*rows.shape, flat.shape[-1])


def _scatter_add(flat: Tensor, rows: Tensor | None, change: Tensor) -> None:
    if rows is None:
        flat.add_(change.view_as(flat))
    elif rows.ndim == 1:
        flat.index_add_(0, rows, change)
    else:
        flat.index_add_(0, rows.reshape(-1), change.reshape(-1, flat.shape[-1]))
