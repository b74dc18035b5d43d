"""R with orthonormal rows: brought in form, differentiated, kept on its manifold. Pure torch.

R is stored as it is used: the parameter holds R itself, training moves it along the tangent of the Stiefel manifold,
and every training forward pulls it back onto it. A saved R is thus exactly the R that computed, and training resumed
from it goes on as if it had never stopped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .modes import in_transform, without_autocast

_TOLERANCE = 4e-6
"""Largest |L − I|, about half of |RRᵀ − I|, that counts as orthonormal: above what QR leaves in fp32 (4e-7), below the
promised 1e-5."""


def orthonormalise(a: Tensor) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt of the rows: ``a = L R`` with L lower triangular, positive diagonal, and R Rᵀ = I.

    An `a` that is orthonormal already comes back bit for bit (L = I). That is what makes a reloaded adapter equal the
    saved one exactly. QR with the signs fixed is this decomposition at any condition number; raw QR flips signs.

    Args:
        a: (..., r, d) float32, r <= d, of full rank.

    Returns:
        R (..., r, d) and L (..., r, r), float32.
    """
    q, upper = torch.linalg.qr(a.mT)
    sign = torch.copysign(torch.ones((), device=a.device), upper.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
    lower = (upper * sign.mT).mT
    eye = torch.eye(a.shape[-2], device=a.device)
    is_orthonormal = (lower - eye).abs().amax((-2, -1), keepdim=True) <= _TOLERANCE
    return torch.where(is_orthonormal, a, (q * sign).mT), torch.where(is_orthonormal, eye, lower)


class _Orthonormalise(torch.autograd.Function):
    """`orthonormalise` with its gradient, and the pull back onto the manifold.

    With dX = L⁻¹dA and Φ the lower triangle with half the diagonal (the differential of a Cholesky factor),
    M = Φ(dX Rᵀ + R dXᵀ): the differentials are dR = dX − M R and dL = L M. Written by hand because autograd through
    `torch.where` would take the gradient of the identity, not of the projection, where `a` is orthonormal.

    L is an output for the sake of second derivatives: the backward is a function of R and L, and autograd finds its
    way from there to `a`.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, pull_back: bool) -> tuple[Tensor, Tensor]:
        r, lower = orthonormalise(a)
        if pull_back:
            # `.data`: the next forward before this one's backward (DPO, accumulation) writes the same bits again, and
            # must not look like a change to autograd. From here on L = I.
            a.data.copy_(r)
            lower = torch.eye(r.shape[-2], device=r.device).expand(lower.shape).contiguous()
        ctx.save_for_backward(r, lower)
        ctx.set_materialize_grads(False)
        ctx.pulled_back = pull_back
        return r, lower

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        r, lower = ctx.saved_tensors  # (..., r, d), (..., r, r)
        grad_r, grad_lower = grads
        with without_autocast(r.device.type):
            inner = torch.zeros_like(lower) if grad_r is None else grad_r @ r.mT  # (..., r, r)
            if grad_lower is not None:  # of a second derivative
                inner = inner - lower.mT @ grad_lower
            projected = (inner.tril() + inner.tril(-1).mT) @ r
            grad = -projected if grad_r is None else grad_r - projected  # (..., r, d)
            if not ctx.pulled_back or torch.is_grad_enabled():  # else L is I, and nobody differentiates by it
                grad = torch.linalg.solve_triangular(lower.mT, grad, upper=True)
        return grad, None


def _in_plain_operations(a: Tensor) -> Tensor:
    """R of `a`, (..., r, d), in operations that every mode of torch differentiates, to any order.

    With L taken for a constant, the rows of X = L⁻¹a are orthonormal, so that R = Cholesky(X Xᵀ)⁻¹X loses no digits.
    Which lower triangular L was divided by makes no difference to R.
    """
    with without_autocast(a.device.type):
        _, lower = orthonormalise(a.detach())
        x = torch.linalg.solve_triangular(lower, a, upper=False)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(x @ x.mT), x, upper=False)


def on_manifold(stored: Tensor, pull_back: bool) -> Tensor:
    """R, (..., r, d) with orthonormal rows to 1e-5, differentiable in `stored` (float32).

    Args:
        stored: (..., r, d) float32.
        pull_back: whether to write R into `stored`, too.
    """
    if in_transform():
        return _in_plain_operations(stored)
    if not (stored.requires_grad and torch.is_grad_enabled()):
        return orthonormalise(stored)[0]
    r: Tensor = _Orthonormalise.apply(stored, pull_back)[0]
    return r


def pulls_back(stored: Tensor) -> bool:
    """Whether computing with the parameter `stored` of R also brings it back onto the manifold."""
    return (
        stored.requires_grad
        and torch.is_grad_enabled()
        and stored.dtype == torch.float32
        # What autograd or a transform computed (a replica of `nn.DataParallel`, weights given by `functional_call`) is
        # no parameter, and its gradient is that of the value it has.
        and stored.is_leaf
        and not in_transform()
        # A sharded parameter (FSDP, ZeRO-3) is a temporary copy here: writing to it would be lost, or worse, kept.
        and not torch.distributed.is_initialized()
        and not torch.compiler.is_compiling()
    )
