"""The edits of one module of a served model: its hook, the operation in compiled graphs, what of it a step uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .schedule import Ints
from .tables import DeviceWork, Kind, Table

_ATTRIBUTE = "loreft_edits"


class Edits:
    """A table of weights, and what of it the running step uses.

    Kept where vLLM keeps its attention layers (`static_forward_context`): a compiled graph names it by a string.
    """

    def __init__(self, name: str, table: Table) -> None:
        self.name = f"peft_reft.{name}"
        self.table = table
        self.work: list[tuple[Kind, DeviceWork]] = []
        """Empty in a step that edits nothing here. Modules with the same plans share the list."""
        self.fixed: list[tuple[Kind, Tensor]] = []
        """Where graphs are captured: for each kind, the set of weights of each token, (most tokens a step,) int64."""

    def apply(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit `hidden` (tokens, d) or (1, tokens, d) in place; what the formulas see is `hidden + residual`."""
        capturing = is_capturing(hidden)
        if not (capturing or self.work):
            return  # every decode step of positions that are the prompt's
        hidden = hidden.view(-1, hidden.shape[-1])
        if capturing:
            for kind, sets in self.fixed:
                self.table.edit_all(kind, sets[: len(hidden)], hidden, residual)
        else:
            for kind, work in self.work:
                self.table.edit(kind, work, hidden, residual)


def is_capturing(hidden: Tensor) -> bool:
    """Whether what runs now is recorded, to be run again for other tokens without passing through Python."""
    return hidden.is_cuda and torch.cuda.is_current_stream_capturing()


def hook(module: nn.Module, edits: Edits) -> None:
    """Have what `module` returns edited."""
    setattr(module, _ATTRIBUTE, edits)
    module.register_forward_hook(_edit_output)


def _edit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook. vLLM's blocks return hidden states and the residual to be added to them, or their sum.

    The hidden states are a new tensor that nobody else has yet, so they are edited in place.
    """
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    edits: Edits = getattr(module, _ATTRIBUTE)
    if torch.compiler.is_compiling():
        torch.ops.peft_reft.edit(hidden, residual, edits.name)
    else:
        edits.apply(hidden, residual)


def _edit(hidden: Tensor, residual: Tensor | None, name: str) -> None:
    from vllm.forward_context import get_forward_context

    edits: Edits = get_forward_context().no_compile_layers[name]
    edits.apply(hidden, residual)


def _edit_fake(hidden: Tensor, residual: Tensor | None, name: str) -> None:
    """For tracing: nothing but `hidden` changes."""


_library = torch.library.Library("peft_reft", "FRAGMENT")
_library.define("edit(Tensor(a!) hidden, Tensor? residual, str name) -> ()")
_library.impl("edit", _edit, "CompositeExplicitAutograd")
_library._register_fake("edit", _edit_fake)


class FixedSteps:
    """A step's edits for captured graphs: in buffers that stay where they are and are filled before the step.

    Args:
        edits: of all modules.
        kinds: of the adapters that can be served; a graph runs what it was captured with.
        tokens: most tokens a step.
    """

    def __init__(self, edits: list[Edits], kinds: list[Kind], tokens: int, device: torch.device) -> None:
        self.kinds = kinds
        self.none = edits[0].table.sets  # the set that edits nothing
        self.staged = np.full((len(kinds), len(edits), tokens), self.none, dtype=np.int64)
        self.on_device = send(self.staged, device).clone()
        self.place = {each.name: n for n, each in enumerate(edits)}
        self.until = self.stale = 0
        """Up to which token this step, and the one before, say anything."""
        for n, each in enumerate(edits):
            for kind in kinds:
                each.table.reserve(kind)
            each.fixed = [(kind, self.on_device[k, n]) for k, kind in enumerate(kinds)]

    def begin(self) -> None:
        """Forget the step before."""
        self.staged[..., : self.until] = self.none
        self.stale, self.until = self.until, 0

    def note(self, kind: Kind, modules: list[Edits], rows: Ints, sets: Ints) -> None:
        """Tokens `rows` are edited with weights `sets` in `modules`; both (n,)."""
        places = np.array([self.place[each.name] for each in modules])
        self.staged[self.kinds.index(kind)][places[:, None], rows] = sets
        self.until = max(self.until, int(rows.max()) + 1)

    def send(self) -> None:
        """Bring the buffers up to date."""
        if changed := max(self.until, self.stale):
            part = np.ascontiguousarray(self.staged[..., :changed])
            self.on_device[..., :changed].copy_(send(part, self.on_device.device))


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device, without waiting for the steps that it still has to compute."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
