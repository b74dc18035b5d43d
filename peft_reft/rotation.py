"""R with orthonormal rows: brought in form, differentiated, kept on its manifold. Pure torch.

R is stored as it is used: the parameter holds R itself, training moves it along the tangent of the Stiefel manifold,
and every training forward pulls it back onto it. A saved R is thus exactly the R that computed, and training resumed
from it goes on as if it had never stopped.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

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

    With dX = L⁻¹dA, the differential is dR = dX − Φ(dX Rᵀ + R dXᵀ)R, Φ the lower triangle with half the diagonal
    (the differential of a Cholesky factor). Written by hand because autograd through `torch.where` would take the
    gradient of the identity, not of the projection, where `a` is orthonormal.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, pull_back: bool) -> Tensor:
        r, lower = orthonormalise(a)
        if pull_back:
            # `.data`: the next forward before this one's backward (DPO, accumulation) writes the same bits again, and
            # must not look like a change to autograd. From here on L = I.
            a.data.copy_(r)
            ctx.save_for_backward(r)
        else:
            ctx.save_for_backward(r, lower)
        return r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        r, *lower = ctx.saved_tensors
        inner = grads[0] @ r.mT
        symmetric = inner.tril() + inner.tril(-1).mT
        grad = grads[0] - symmetric @ r
        if lower:
            grad = torch.linalg.solve_triangular(lower[0].mT, grad, upper=True)
        return grad, None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off for what runs inside; nothing at all where it is off already, which is nearly always."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def on_manifold(stored: Tensor, pull_back: bool) -> Tensor:
    """R, (..., r, d) with orthonormal rows to 1e-5, differentiable in `stored` (float32).

    Args:
        stored: (..., r, d) float32.
        pull_back: whether to write R into `stored`, too.
    """
    return _Orthonormalise.apply(stored, pull_back)


def pulls_back(stored: Tensor) -> bool:
    """Whether computing with the parameter `stored` of R also brings it back onto the manifold."""
    return (
        stored.requires_grad
        and torch.is_grad_enabled()
        and stored.dtype == torch.float32
        # A sharded parameter (FSDP, ZeRO-3) is a temporary copy here: writing to it would be lost, or worse, kept.
        and not torch.distributed.is_initialized()
        and not torch.compiler.is_compiling()
    )
