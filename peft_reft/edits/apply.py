"""Gather, edit, scatter: all edits of one module's output in one autograd function.

The hidden states are one list of tokens, ``flat`` (tokens, d), whatever their own shape. An edit names some of them::

    flat     t0  t1  t2  t3  t4  t5          (tokens, d)
                     │       │
    rows             2       4               (n,)          gather:   h = flat[rows]          (n, d)
                     ▼       ▼                             edit:     change = Φ(h) − h       (n, d)
    flat     t0  t1  t2' t3  t4' t5                        scatter:  flat[rows] += change

Left to autograd, these lines cost a copy of the hidden states and several copies of their gradient. Written by hand, a
layer saves the gathered tokens and nothing else. It changes the hidden states in place if no other operation can have
kept them for its own backward.

In shapes, ``[G,]`` is the leading dimension of factors that hold G edits side by side, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..shapes import Float, Int
from .factors import Affine, Factors, LowRankFactors
from .modes import in_transform, without_autocast


@dataclass(frozen=True)
class Edit:
    """An edit, to be added at some tokens."""

    rows: Int[Tensor, "... n"] | None
    """([G,] n) int64: rows of `flat`. None: all tokens, in order, cut into G equal parts if the factors have a G."""
    keep: Float[Tensor, "... n _"]
    """([G,] n, 1) float32, which multiplies each token's edit: 0 for an empty slot. Or ([G,] n, r), which multiplies
    each of its coordinates."""
    drop: Float[Tensor, "... n d"] | None
    """([G,] n, d) float32: dropout, which multiplies what is added."""
    factors: Factors
    """What the edit is computed from."""


def add_edits(hidden: Float[Tensor, "*shape d"], edits: list[Edit], in_place: bool) -> Float[Tensor, "*shape d"]:
    """Add edits to hidden states. Each edit is computed from `hidden` as it came.

    Args:
        hidden: (..., d), of any float type; its tokens count in order.
        edits: at least one.
        in_place: whether `hidden` itself may be changed; see `may_change`.

    Returns:
        (..., d) of the type of `hidden`; `hidden` itself if it was changed.
    """
    with without_autocast(hidden.device.type):
        if in_transform():
            return _add_in_plain_operations(hidden, edits)
        no_gradient = not torch.is_grad_enabled() and hidden.dtype == torch.float32
        if in_place and no_gradient and len(edits) == 1 and edits[0].drop is None:
            return _add_now(hidden, edits[0])
        # The backward of an edit of all tokens needs `hidden` as it came.
        in_place = in_place and all(edit.rows is not None for edit in edits)
        tensors: list[Tensor | None] = []
        for edit in edits:
            affine = _affine(edit.factors)
            if affine is not None:
                basis, inside = affine
                tensors += [edit.rows, edit.drop, None, edit.keep, inside.weight, inside.bias, basis]
            else:  # autograd differentiates the change; our function only adds it
                change = edit.factors.edit(_gathered(hidden, edit), edit.keep)  # ([G,] n, d)
                tensors += [edit.rows, edit.drop, change, None, None, None, None]
        apply: Callable[..., tuple[Tensor, ...]] = _AddEdits.apply  # torch gives it no types
        return apply(hidden, in_place, *tensors)[0]


def _affine(factors: Factors) -> tuple[Tensor, Affine] | None:
    """Return B, and A with b, of an edit that computes with nothing else; None for any other edit."""
    if isinstance(factors, LowRankFactors) and factors.gate is None and isinstance(factors.coordinates, Affine):
        return factors.basis, factors.coordinates
    return None


def _gathered(hidden: Float[Tensor, "... d"], edit: Edit) -> Float[Tensor, "... n d"]:
    """Return the tokens that `edit` edits, ([G,] n, d) float32."""
    flat = hidden.reshape(-1, hidden.shape[-1])  # (tokens, d)
    return gather(flat, edit.rows, edit.factors.lead).float()


def _add_in_plain_operations(hidden: Tensor, edits: list[Edit]) -> Tensor:
    """Do what `add_edits` does in operations that transforms of torch can look into."""
    flat = hidden.reshape(-1, hidden.shape[-1])  # (tokens, d)
    for edit in edits:
        change = edit.factors.edit(_gathered(hidden, edit), edit.keep)  # ([G,] n, d)
        if edit.drop is not None:
            change = change * edit.drop
        change = change.to(flat.dtype).reshape(-1, flat.shape[-1])  # (G * n, d)
        if edit.rows is None:
            flat = flat + change
        else:
            flat = flat.index_add(0, edit.rows.flatten(), change)
    return flat.view_as(hidden)


def _add_now(hidden: Tensor, edit: Edit) -> Tensor:
    """Add one edit in place and without gradients, which spares a decode step a call of autograd."""
    flat = hidden.view(-1, hidden.shape[-1])  # (tokens, d)
    h = gather(flat, edit.rows, edit.factors.lead)  # ([G,] n, d)
    affine = _affine(edit.factors) if edit.rows is None and h.ndim == 2 else None
    if affine is not None:
        basis, inside = affine
        flat.addmm_(inside.compute(h) * edit.keep, basis)  # (tokens, r) @ (r, d), added as it is computed
    else:
        _scatter_add(flat, edit.rows, edit.factors.edit(h, edit.keep))
    return hidden


def may_change(hidden: Tensor, inputs: Iterable[Any] = ()) -> bool:
    """Return whether `hidden`, which a module given `inputs` has just returned, can be changed in place.

    An addition, which ends a residual block, keeps nothing for its backward. Other operations may have kept their
    output. A view may share memory with any tensor, and a tensor that the module handed through belongs to its caller.
    """
    if torch.compiler.is_compiling() or in_transform() or hidden._is_view() or not hidden.is_contiguous():
        return False
    if any(isinstance(given, Tensor) and given.data_ptr() == hidden.data_ptr() for given in inputs):
        return False
    made_by = hidden.grad_fn
    if made_by is None:
        return not hidden.requires_grad
    return type(made_by).__name__ == "AddBackward0"


_GIVEN = 7
"""Tensors that `_AddEdits` is given for each edit: rows, drop, change; or keep, A, b and B in place of change."""
_SAVED = 8
"""Tensors that it saves for each edit: rows, drop, keep, A, b, B, h (gathered tokens), inner (kept coordinates)."""


class _AddEdits(torch.autograd.Function):
    """Adds edits to hidden states; its backward is written by hand.

    The hidden states come in their own shape, because changing a view in place would cost autograd copies of its base.

    The gathered tokens are outputs, too, for second derivatives: the backward is a function of them, and autograd
    finds its way from them to `hidden`, of which nothing else is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, in_place: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Compute ``hidden + Σ change · drop`` with ``change = inner B`` and ``inner = (A h + b) · keep``.

        Args:
            ctx: what the backward reads.
            hidden: (..., d), of any float type.
            in_place: whether to change `hidden` itself.
            *tensors: the tensors of `_GIVEN`, for one edit after the other.

        Returns:
            The edited hidden states; then the gathered tokens of each edit that has rows and an A.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])  # (tokens, d)
        changes: list[tuple[Tensor | None, Tensor]] = []
        leads: list[int | None] = []
        gathered: list[Tensor] = []
        saved: list[Tensor | None] = []
        needs_hidden = False
        for start in range(0, len(tensors), _GIVEN):
            # ([G,] n), ([G,] n, d), ([G,] n, d); ([G,] n, 1 or r), ([G,] r, d), ([G,] r), ([G,] r, d)
            rows, drop, change, keep, weight, bias, basis = tensors[start : start + _GIVEN]
            h = inner = None
            if change is None:
                assert keep is not None and bias is not None and basis is not None
                lead = len(basis) if basis.ndim == 3 else None
                h = gather(flat, rows, lead).float()  # ([G,] n, d)
                inner = Affine(weight, bias).compute(h) * keep  # ([G,] n, r)
                change = inner @ basis  # ([G,] n, d)
                if weight is None:
                    h = None  # no gradient needs it
                elif rows is None:
                    h, needs_hidden = None, True  # all tokens: the backward takes them from `hidden`
                else:
                    gathered.append(h)
            leads.append(len(change) if change.ndim == 3 else None)
            if drop is not None:
                change = change * drop
            changes.append((rows, change.to(flat.dtype)))
            saved += [rows, drop, keep, weight, bias, basis, h, inner]
        ctx.save_for_backward(hidden if needs_hidden else None, *saved)
        ctx.set_materialize_grads(False)
        ctx.leads, ctx.shape, ctx.dtype = leads, hidden.shape, hidden.dtype
        if in_place:
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out = hidden.clone(memory_format=torch.contiguous_format)
        for rows, change in changes:
            _scatter_add(out.view_as(flat), rows, change)
        return out, *gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the inputs, given those of the outputs of `forward`."""
        device = next(grad.device for grad in grads if grad is not None)
        grad, *grads_of_gathered = grads
        if grad is None:  # a second derivative that passes through the gathered tokens alone
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=device)
        with without_autocast(device.type):
            return _AddEdits._backward(ctx, grad, grads_of_gathered)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor, grads_of_gathered: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        hidden, *saved = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # (tokens, d)
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            # Not in place: autograd may have given the same gradient to the other branch of a residual sum.
            grad_hidden = grad.clone(memory_format=torch.contiguous_format)  # (..., d)
        following = iter(grads_of_gathered)
        grads: list[Tensor | None] = []
        for number, lead in enumerate(ctx.leads):
            rows, drop, keep, weight, bias, basis, h, inner = saved[_SAVED * number : _SAVED * (number + 1)]
            grad_change = gather(flat, rows, lead).float()  # ([G,] n, d)
            if drop is not None:
                grad_change = grad_change * drop
            if basis is None:
                grads += [None, None, grad_change, None, None, None, None]
                continue
            if weight is not None and rows is None:
                h = gather(hidden.reshape(flat.shape), None, lead).float()  # ([G,] n, d)
            if torch.is_grad_enabled():  # `create_graph`: `inner` was saved without a history
                inner = (bias.unsqueeze(-2) if h is None else Affine(weight, bias).compute(h)) * keep  # ([G,] n, r)
            grad_inner = grad_change @ basis.mT * keep  # ([G,] n, r)
            grad_weight = None if weight is None else grad_inner.mT @ h  # ([G,] r, d)
            grad_bias = grad_inner.sum(-2)  # ([G,] r)
            grad_basis = inner.mT @ grad_change  # ([G,] r, d)
            grads += [None, None, None, None, grad_weight, grad_bias, grad_basis]
            if weight is None:
                continue
            grad_h = grad_inner @ weight  # ([G,] n, d)
            if rows is not None:
                grad_of_gathered = next(following)
                if grad_of_gathered is not None:
                    grad_h = grad_h + grad_of_gathered
            if grad_hidden is not None:
                _scatter_add(grad_hidden.view_as(flat), rows, grad_h.to(grad.dtype))
        return grad_hidden, None, *grads


def gather(
    flat: Float[Tensor, "tokens d"], rows: Int[Tensor, "*G n"] | None, lead: int | None
) -> Float[Tensor, "... d"]:
    """Return rows of `flat`, ([G,] n, d).

    Args:
        flat: (tokens, d).
        rows: ([G,] n) int64; None: all tokens, in order.
        lead: G, or None if there is none; cuts all tokens into G equal parts.
    """
    if rows is None:
        return flat if lead is None else flat.reshape(lead, -1, flat.shape[-1])
    if rows.ndim == 1:
        return flat.index_select(0, rows)
    return flat.index_select(0, rows.flatten()).view(*rows.shape, flat.shape[-1])


def _scatter_add(
    flat: Float[Tensor, "tokens d"], rows: Int[Tensor, "*G n"] | None, change: Float[Tensor, "... d"]
) -> None:
    """Add `change` ([G,] n, d) to rows of `flat`, in place: the inverse of `gather`."""
    if rows is None:
        flat.add_(change.view_as(flat))
    elif rows.ndim == 1:
        flat.index_add_(0, rows, change)
    else:
        flat.index_add_(0, rows.reshape(-1), change.reshape(-1, flat.shape[-1]))
