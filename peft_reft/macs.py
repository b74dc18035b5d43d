"""Operations that a Mac's GPU lacks, or is slower at than the CPU beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def on_cpu_of_mac(function: Callable[..., Any], *tensors: Tensor, **settings: Any) -> Any:
    """Call `function`. If the tensors lie on a Mac's GPU, it runs on the CPU, and what it returns goes back.

    Older versions of torch have no QR, no triangular solve and no running maximum there. Newer ones have, but their QR
    of a narrow matrix takes many times as long as the CPU's and both ways (pytorch's issue 187567). Derivatives pass.

    Args:
        function: of torch; returns a tensor, or a tuple of tensors.
        tensors: on one device.
        settings: further arguments of the function.
    """
    device = tensors[0].device
    if device.type != "mps":
        return function(*tensors, **settings)
    returned = function(*[tensor.cpu() for tensor in tensors], **settings)
    if isinstance(returned, Tensor):
        return returned.to(device)
    return tuple([tensor.to(device) for tensor in returned])
