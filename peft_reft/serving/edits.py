"""The edits of one module: its hook, its operation in compiled graphs, and the buffers that captured graphs read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .engine.config import find_named
from .schedule import Floats, Ints
from .tables import DeviceWork, FormulaKey, Table

_ATTRIBUTE = "loreft_edits"


class Edits:
    """A module's table of weights, and what the running step computes with it.

    A compiled graph can hold no such object, but it can hold its name (see `engine.named_in_graphs`).
    """

    def __init__(self, name: str, table: Table, of_input: bool = False) -> None:
        self.name = f"peft_reft.{name}"
        self.table = table
        self.of_input = of_input
        self.work: list[tuple[FormulaKey, DeviceWork]] = []
        """Empty in a step that edits nothing here. Modules in which the adapters do the same share one list."""
        self.fixed: list[tuple[FormulaKey, Tensor, Tensor]] = []
        """If captured graphs hold edits: for each formula the set of weights of each token, (tokens,) int64, and what
        multiplies the edit, (tokens, 1) float32."""

    def apply(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the module's output, or its input, in place.

        Args:
            hidden: (tokens, d) or (1, tokens, d), changed in place.
            residual: of the same shape, or None. The formulas see `hidden + residual`.
        """
        capturing = is_capturing(hidden)
        if not capturing and not self.work:
            return  # every decode step, if the adapters edit prompts only
        if capturing and not self.fixed:
            return  # the graph holds no edits, and steps that edit tokens run without it
        hidden = hidden.view(-1, hidden.shape[-1])  # (tokens, d)
        if capturing:
            for key, sets, scale in self.fixed:
                n = len(hidden)
                self.table.edit_all(key, sets[:n], scale[:n], hidden=hidden, residual=residual)
        else:
            for key, work in self.work:
                self.table.edit(key, work, hidden=hidden, residual=residual)


def is_capturing(hidden: Tensor) -> bool:
    """Whether the running operations are being captured as a graph, which later runs them without Python."""
    return hidden.is_cuda and torch.cuda.is_current_stream_capturing()


def hook(module: nn.Module, edits: Edits) -> None:
    """Have the output of `module` edited, or its input."""
    setattr(module, _ATTRIBUTE, edits)
    if edits.of_input:
        module.register_forward_pre_hook(_edit_input)
    else:
        module.register_forward_hook(_edit_output)


def _edit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook. A block of vLLM returns hidden states and the residual that is to be added, or their sum alone.

    The hidden states are a new tensor that nothing else holds yet, so the edit changes them in place.
    """
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    _apply(module, hidden, residual)


def _edit_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook before the forward. What attention returns is given to its output projection and to nothing else."""
    _apply(module, args[0], None)


def _apply(module: nn.Module, hidden: Tensor, residual: Tensor | None) -> None:
    edits: Edits = getattr(module, _ATTRIBUTE)
    if torch.compiler.is_compiling():
        torch.ops.peft_reft.edit(hidden, residual, edits.name)
    else:
        edits.apply(hidden, residual)


def _edit(hidden: Tensor, residual: Tensor | None, name: str) -> None:
    """The operation `peft_reft::edit` of compiled graphs."""
    edits: Edits = find_named(name)
    edits.apply(hidden, residual)


def _edit_fake(hidden: Tensor, residual: Tensor | None, name: str) -> None:
    """The same for tracing. It has no result, and the operation's signature says that it changes `hidden`."""


_library = torch.library.Library("peft_reft", "FRAGMENT")
_library.define("edit(Tensor(a!) hidden, Tensor? residual, str name) -> ()")
_library.impl("edit", _edit, "CompositeExplicitAutograd")
_library._register_fake("edit", _edit_fake)


class FixedSteps:
    """The edits of a step for captured graphs: buffers that stay where they are, and are filled before each step.

    A buffer says for each formula, module and token which set of weights edits the token. Tokens that are not edited
    have the table's last set, which is 0:

        token              0  1  2  3  4  5 …      sets = 8, so 8 edits nothing
        formula 0, layer 0 2  2  8  8  5  8 …
        formula 0, layer 1 2  2  8  8  5  8 …

    Another buffer says what multiplies the edit of each token.

    Args:
        edits: of all modules.
        keys: the formulas that adapters can have. A captured graph cannot compute others.
        tokens: the largest number of tokens in a step.
        device: the model's device.
    """

    def __init__(self, edits: list[Edits], keys: list[FormulaKey], tokens: int, device: torch.device) -> None:
        self.keys = keys
        self.none = edits[0].table.sets  # the set that edits nothing
        self.staged = np.full((len(keys), len(edits), tokens), self.none, dtype=np.int64)
        self.on_device = send(self.staged, device).clone()  # (formulas, modules, tokens)
        self.staged_scale = np.ones((tokens, 1), dtype=np.float32)
        self.scale_on_device = send(self.staged_scale, device).clone()  # (tokens, 1)
        self.number = {each.name: number for number, each in enumerate(edits)}
        """From a module's name to its index in the buffers."""
        self.until = 0
        """The step's edited tokens are below this index."""
        self.stale = 0
        """The same for the step before, whose entries are still on the device."""
        for key in keys:
            for each in edits:
                each.table.reserve(key)
        for number, each in enumerate(edits):
            each.fixed = [(key, self.on_device[k, number], self.scale_on_device) for k, key in enumerate(keys)]

    def begin(self) -> None:
        """Forget the step before."""
        self.staged[..., : self.until] = self.none
        self.stale = self.until
        self.until = 0

    def note(self, key: FormulaKey, modules: list[Edits], rows: Ints, sets: Ints, scale: Floats) -> None:
        """Note edits of the coming step.

        Args:
            key: the formula.
            modules: the modules that are edited alike.
            rows: (n,) the rows of the edited tokens in the step.
            sets: (n,) the set of weights of each.
            scale: (n,) what multiplies its edit.
        """
        numbers = np.array([self.number[each.name] for each in modules])
        of_formula = self.staged[self.keys.index(key)]  # (modules, tokens), a view
        of_formula[numbers[:, None], rows] = sets
        self.staged_scale[rows, 0] = scale
        self.until = max(self.until, int(rows.max()) + 1)

    def send(self) -> None:
        """Bring the buffers on the device up to date."""
        changed = max(self.until, self.stale)
        if changed > 0:
            part = np.ascontiguousarray(self.staged[..., :changed])
            self.on_device[..., :changed].copy_(send(part, self.on_device.device))
            scale = self.staged_scale[:changed].copy()  # the buffer may change before the device has read it
            self.scale_on_device[:changed].copy_(send(scale, self.scale_on_device.device))


def send(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to the device, without waiting for the steps that the device still has to compute."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
