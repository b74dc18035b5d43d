"""A device that this machine lacks, played by tensors that say they lie on it.

Their numbers stand in tensors on the CPU. An operation that mixes both kinds fails, as on the device; one that the
device lacks fails; and what the host reads is counted. Graphs, streams and kernels of the device are not played.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
"""Operations for which the host waits."""

FACTORIES = {torch.tensor, torch.as_tensor, torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.eye}
FACTORIES |= {torch.rand, torch.randn, torch.randint}


class Device:
    """The device: its name, what it lacks, and what the host read of it."""

    def __init__(self, name: str, lacking: tuple[str, ...] = (), has_float64: bool = True) -> None:
        self.device = torch.device(name)
        self.lacking, self.has_float64 = lacking, has_float64
        self.reads: list[str] = []
        self.makes_on_host = False
        """Whether the program, not an operation, makes a tensor."""

    @contextmanager
    def __call__(self) -> Iterator[Device]:
        """Within it the device is there."""
        fork_rng = torch.random.fork_rng
        with (
            patch.object(torch, "Event", _Event),
            patch.object(torch.random, "fork_rng", lambda devices=(), **settings: fork_rng([])),
            _Moves(self),
            _Operations(self),
        ):
            yield self

    def take(self, tensor: Tensor) -> There:
        """A CPU's tensor as one of the device."""
        return There(tensor, self)

    def take_module(self, module: nn.Module) -> nn.Module:
        """Put the parameters and buffers of a module on the device."""
        taken: dict[int, There] = {}
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None:
                    if id(parameter) not in taken:  # tied weights stay tied
                        taken[id(parameter)] = nn.Parameter(self.take(parameter.data), parameter.requires_grad)
                    each._parameters[name] = taken[id(parameter)]
            for name, buffer in each._buffers.items():
                if buffer is not None:
                    each._buffers[name] = self.take(buffer)
        return module

    def run(self, function, args, kwargs):
        """Run an operation of torch as the device would."""
        inside = tree_map_only(There, lambda tensor: tensor.inner, (args, kwargs))
        given = _tensors((args, kwargs))
        name = function.name()
        # An operation that makes a tensor like another asks for the device that torch takes this one to be on.
        is_like = name.startswith("aten::new_") or "_like" in name
        asked = None if is_like else kwargs.get("device")
        is_here = any(isinstance(tensor, There) for tensor in given)
        copies = name in ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
        if is_here:
            if name.removeprefix("aten::").startswith(self.lacking or ("?",)):
                raise NotImplementedError(f"The operator '{name}' is not currently implemented for the device.")
            if not copies and any(_is_of_host(each) for each in given):
                raise RuntimeError(f"{name}: expected all tensors to be on the same device: {self.device} and cpu")
        if name in READS and is_here:
            self.reads.append(name)
        goes_there = is_here if asked is None else torch.device(asked) == self.device
        if copies and not kwargs.get("non_blocking") and max(tensor.numel() for tensor in given) > 0:
            crosses = is_here != all(isinstance(each, There) for each in given)  # `copy_` from the one to the other
            if crosses or (asked is not None and is_here != goes_there):
                self.reads.append(name)
        result = function(*inside[0], **({**inside[1], "device": CPU} if "device" in kwargs else inside[1]))
        if not goes_there and not given and not self.makes_on_host:
            for tensor in _tensors(result):
                tensor._is_of_either = True  # made inside an operation that took the device for a CPU
        if not goes_there or not _tensors(result):
            return result
        if not self.has_float64 and any(tensor.dtype == torch.float64 for tensor in _tensors(result)):
            raise TypeError(f"Cannot convert a tensor to float64: {self.device} has none.")
        result = tree_map_only(Tensor, self.take, result)
        if asked is not None or not isinstance(result, There):
            return result
        return return_and_correct_aliasing(function, args, kwargs, result)


class There(Tensor):
    """A tensor of the device."""

    inner: Tensor
    of: Device

    @staticmethod
    def __new__(cls, inner: Tensor, of: Device) -> There:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CPU
        )

    def __init__(self, inner: Tensor, of: Device) -> None:
        self.inner, self.of = inner, of

    @property
    def device(self) -> torch.device:
        return self.of.device

    def __repr__(self) -> str:
        return f"There({self.inner!r}, {self.device})"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        of = next(tensor.of for tensor in _tensors((args, kwargs)) if isinstance(tensor, There))
        return of.run(function, args, kwargs or {})


def _tensors(tree) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def _is_of_host(tensor: Tensor) -> bool:
    return not isinstance(tensor, There) and tensor.ndim > 0 and not hasattr(tensor, "_is_of_either")


class _Event:
    """An event of the device, on which nothing ever has to wait."""

    def __init__(self, **settings) -> None:
        pass

    def record(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Operations(TorchDispatchMode):
    """Sees operations that have no tensor of the device yet: new tensors, copies to it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.of = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.of.run(function, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Takes on what torch asks its build for, which does not know the device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.of = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FACTORIES:
            return self.make(function, args, kwargs)
        if function is Tensor.tolist and isinstance(args[0], There):
            self.of.reads.append("tolist")
            return args[0].inner.tolist()
        if function in (Tensor.to, Tensor.cpu):
            return self.move(function, *args, **kwargs)
        return function(*args, **kwargs)

    def make(self, function, args, kwargs):
        """A new tensor."""
        there = torch.device(kwargs.get("device") or CPU) == self.of.device
        self.of.makes_on_host = True
        try:
            made = function(*args, **{**kwargs, "device": CPU} if there else kwargs)
        finally:
            self.of.makes_on_host = False
        if not there:
            return made
        if function in (torch.tensor, torch.as_tensor) and made.numel():
            self.of.reads.append("torch.tensor")  # the host's numbers go there, for which it waits
        return self.of.take(made)

    def move(self, function, tensor, *rest, **kwargs):
        """A copy on another device, or of another type."""
        non_blocking = bool(kwargs.pop("non_blocking", False))
        kwargs.pop("copy", None)
        like = [each for each in rest if isinstance(each, Tensor)]
        given = [*rest, *kwargs.values(), *[fact for each in like for fact in (each.device, each.dtype)]]
        devices = [torch.device(each) for each in given if isinstance(each, str | torch.device)]
        dtypes = [each for each in given if isinstance(each, torch.dtype)]
        to_device = devices[0] if devices else tensor.device
        device = CPU if function is Tensor.cpu else to_device
        dtype = dtypes[0] if dtypes else tensor.dtype
        if (tensor.device, tensor.dtype) == (device, dtype):
            return tensor
        return torch.ops.aten._to_copy.default(tensor, dtype=dtype, device=device, non_blocking=non_blocking)
