"""One adapter for each row in modules that PEFT trains beside LoReFT: heads (`modules_to_save`), trained tokens.

PEFT wraps such modules, and hands the wrappers `adapter_names` by hooks. This module does so with two differences.
The names count only in the thread that gave them. And one row of the caller's may have become several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

_current: ContextVar[Sequence[str] | None] = ContextVar("adapter_names of this thread", default=None)


@contextmanager
def hand_adapter_names(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Let each row of a batch run through the heads and trained tokens of its own adapter.

    A row of `"__base__"` runs through the base's modules. So does a row whose adapter does not train a module. Several
    threads may use one model at a time, each with its own names.

    Args:
        model: the base model.
        adapter_names: adapter of each row; beams and `num_return_sequences` repeat it.

    Raises:
        ValueError: in the forward, if the number of rows is no multiple of the number of names.
        TypeError: in the forward, if a module is not linear, an embedding or a convolution: PEFT splits batches for
            these alone.

    Examples:
        >>> with hand_adapter_names(model, ["french", "__base__"]):  # doctest: +SKIP
        ...     model(input_ids=torch.tensor([[1, 2], [3, 4]]))
    """
    names = list(adapter_names)  # a new object: a hook knows its own context by it
    handles = [
        module.register_forward_pre_hook(partial(_hand_names, names=names), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    token = _current.set(names)
    try:
        yield
    finally:
        _current.reset(token)
        for handle in handles:
            handle.remove()


def _hand_names(
    wrapper: AuxiliaryTrainingWrapper,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    names: list[str],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook before a wrapper's forward: adds `adapter_names`, one for each row."""
    # Without `kwargs`: another thread has not registered or not removed this hook completely.
    if _current.get() is not names or kwargs is None:
        return None
    rows = len(args[0] if args else next(iter(kwargs.values())))
    if not names or rows % len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )
    known = wrapper._get_available_adapters()
    of_names = [name if name in known else "__base__" for name in names]
    of_rows = [name for name in of_names for _ in range(rows // len(names))]
    return args, {**kwargs, "adapter_names": of_rows}
