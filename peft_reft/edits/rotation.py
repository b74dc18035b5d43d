"""R with orthonormal rows: made orthonormal, differentiated, kept on its manifold. Pure torch.

R is stored as it is used: the parameter holds R itself. Training moves it along the tangent of the Stiefel manifold
(the matrices with orthonormal rows), and every training forward pulls it back onto the manifold. A saved R is thus
exactly the R that was computed with, and training resumed from it continues as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..exporting import exports_to_onnx
from ..macs import on_cpu_of_mac
from ..shapes import Float
from .modes import in_transform, without_autocast

_TOLERANCE = 4e-6
"""Largest |L − I| that counts as orthonormal, about half of |RRᵀ − I|: above what QR leaves in float32 (4e-7), below
the promised 1e-5."""


def orthonormalise(a: Float[Tensor, "*G r d"]) -> tuple[Float[Tensor, "*G r d"], Float[Tensor, "*G r r"]]:
    """Orthonormalise the rows by Gram-Schmidt: ``a = L R``, L lower triangular with a positive diagonal, R Rᵀ = I.

    An `a` that is already orthonormal comes back bit for bit, with L = I. So a reloaded adapter equals the saved one
    exactly. QR with the signs fixed is this decomposition at any condition number; raw QR flips signs.

    Args:
        a: (..., r, d) float32, r <= d, of full rank.

    Returns:
        R (..., r, d) and L (..., r, r), float32.
    """
    q, upper = on_cpu_of_mac(torch.linalg.qr, a.mT)  # (..., d, r), (..., r, r): aᵀ = q upper
    one = torch.ones((), device=a.device)
    sign = torch.copysign(one, upper.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)  # (..., 1, r)
    lower = (upper * sign.mT).mT  # (..., r, r)
    eye = torch.eye(a.shape[-2], device=a.device)  # (r, r)
    is_orthonormal = (lower - eye).abs().amax((-2, -1), keepdim=True) <= _TOLERANCE  # (..., 1, 1)
    r = torch.where(is_orthonormal, a, (q * sign).mT)  # (..., r, d)
    return r, torch.where(is_orthonormal, eye, lower)


class _Orthonormalise(torch.autograd.Function):
    """`orthonormalise` with its gradient, and the pull back onto the manifold.

    With dX = L⁻¹dA and Φ(·) the lower triangle with half the diagonal (the differential of a Cholesky factor), let
    M = Φ(dX Rᵀ + R dXᵀ). The differentials are dR = dX − M R and dL = L M. They are written by hand, because autograd
    through `torch.where` would give an orthonormal `a` the gradient of the identity, not that of the projection.

    L is an output for second derivatives: the backward is a function of R and L, and autograd finds its way from them
    to `a`.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, pull_back: bool) -> tuple[Tensor, Tensor]:
        """Return R and L of `a` (..., r, d); with `pull_back`, also write R into `a`."""
        r, lower = orthonormalise(a)
        if pull_back:
            # `.data`: a second forward before the backward (DPO, accumulation) writes the same bits again, which must
            # not look like a change to autograd. From here on L = I.
            a.data.copy_(r)
            lower = torch.eye(r.shape[-2], device=r.device).expand(lower.shape).contiguous()
        ctx.save_for_backward(r, lower)
        ctx.set_materialize_grads(False)
        ctx.pulled_back = pull_back
        return r, lower

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        """Return the gradient of `a`, given those of R and L."""
        r, lower = ctx.saved_tensors  # (..., r, d), (..., r, r)
        grad_r, grad_lower = grads  # (..., r, d), (..., r, r)
        with without_autocast(r.device.type):
            inner = torch.zeros_like(lower) if grad_r is None else grad_r @ r.mT  # (..., r, r)
            if grad_lower is not None:  # a second derivative
                inner = inner - lower.mT @ grad_lower
            normal = (inner.tril() + inner.tril(-1).mT) @ r  # (..., r, d)
            grad: Tensor = -normal if grad_r is None else grad_r - normal  # (..., r, d)
            if not ctx.pulled_back or torch.is_grad_enabled():  # otherwise L is I, and no derivative passes through it
                grad = on_cpu_of_mac(torch.linalg.solve_triangular, lower.mT, grad, upper=True)
        return grad, None


def _in_plain_operations(a: Float[Tensor, "*G r d"]) -> Float[Tensor, "*G r d"]:
    """Return R of `a`, in operations that every mode of torch differentiates, to any order.

    L is taken for a constant. The rows of X = L⁻¹a are then orthonormal, so R = Cholesky(X Xᵀ)⁻¹X loses no digits. R
    does not depend on the lower triangular L that `a` was divided by.
    """
    with without_autocast(a.device.type):
        _, lower = orthonormalise(a.detach())
        x = on_cpu_of_mac(torch.linalg.solve_triangular, lower, a, upper=False)  # (..., r, d)
        factor = on_cpu_of_mac(torch.linalg.cholesky, x @ x.mT)  # (..., r, r)
        r: Tensor = on_cpu_of_mac(torch.linalg.solve_triangular, factor, x, upper=False)  # (..., r, d)
        return r


def _row_by_row(a: Float[Tensor, "*G r d"]) -> Float[Tensor, "*G r d"]:
    """Return R of `a`, in operations that ONNX has. It has no QR."""
    rows: list[Tensor] = []
    for row in a.unbind(-2):  # (..., d)
        row = row.unsqueeze(-2)  # (..., 1, d)
        for _ in range(2 if rows else 0):  # a second time, because the first leaves rounding errors
            before = torch.cat(rows, -2)  # (..., rows so far, d)
            row = row - row @ before.mT @ before
        rows.append(row / row.square().sum(-1, keepdim=True).sqrt())
    return torch.cat(rows, -2)


def on_manifold(stored: Float[Tensor, "*G r d"], pull_back: bool) -> Float[Tensor, "*G r d"]:
    """Return R, with orthonormal rows to 1e-5, differentiable in `stored`.

    Args:
        stored: (..., r, d) float32.
        pull_back: whether to write R into `stored`, too.
    """
    if exports_to_onnx():
        return _row_by_row(stored)
    if in_transform():
        return _in_plain_operations(stored)
    if not (stored.requires_grad and torch.is_grad_enabled()):
        return orthonormalise(stored)[0]
    apply: Callable[..., tuple[Tensor, Tensor]] = _Orthonormalise.apply  # torch gives it no types
    return apply(stored, pull_back)[0]


def pulls_back(stored: Tensor) -> bool:
    """Return whether computing with the parameter `stored` of R also pulls it back onto the manifold."""
    return (
        stored.requires_grad
        and torch.is_grad_enabled()
        and stored.dtype == torch.float32
        # A tensor that autograd or a transform computed (a replica of `nn.DataParallel`, weights given by
        # `functional_call`) is no parameter, and its gradient is that of the value it has.
        and stored.is_leaf
        and not in_transform()
        # A sharded parameter (FSDP, ZeRO-3) is a temporary copy here: a write to it would be lost, or worse, kept.
        and not torch.distributed.is_initialized()
        and not torch.compiler.is_compiling()
    )
