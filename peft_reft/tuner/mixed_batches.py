"""One adapter a row for what PEFT trains beside LoReFT: classifier heads (`modules_to_save`) and trained tokens.

PEFT wraps such modules, and hands the wrappers `adapter_names` by hooks. So does this module, with two differences:
the names count in the thread that gave them and in no other, and one row of the prompt may have become several.
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
    """Let each row of a batch run through its own adapter's heads and trained tokens, while the context lasts.

    A row whose adapter does not train a module, and a row of `"__base__"`, run through the base's. Threads may do so
    side by side on one model, each with names of its own.

    Args:
        model: the base model.
        adapter_names: adapters by row; beams and `num_return_sequences` repeat each row's.

    Raises:
        ValueError: in the forward, if the rows of a batch are no multiple of the names.
        TypeError: in the forward, if a module is neither linear, nor an embedding, nor a convolution: PEFT splits the
            batches of no other.

    Examples:
        >>> with hand_adapter_names(model, ["french", "__base__"]):  # doctest: +SKIP
        ...     model(input_ids=torch.tensor([[1, 2], [3, 4]]))
    """
    names = list(adapter_names)  # an object of its own: hooks tell by it whose context they belong to
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
    # Without `kwargs` it was called while another thread had it half registered or half removed.
    if _current.get() is not names or kwargs is None:
        return None
    rows = len(args[0] if args else next(iter(kwargs.values())))
    if not names or rows % len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )
    known = wrapper._get_available_adapters()
    by_row = [name if name in known else "__base__" for name in names for _ in range(rows // len(names))]
    return args, {**kwargs, "adapter_names": by_row}
