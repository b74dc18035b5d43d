"""An engine of a version of vLLM that the tests have not seen checks itself before it serves.

The core runs two requests on the engine's own path, one under a random adapter. Meanwhile each worker notes at the
model's input which token stands in which row, and at each edited module what changed. Afterwards it compares: the
tokens that the adapter's positions name have changed by what the formula gives for their hidden states, and no other
has. Neither what vLLM says of a step's requests nor the tables of weights are trusted in this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.factors import Affine, Factors, LowRankFactors
from ..positions.spec import Positions
from .adapters import ServedAdapter
from .chosen import Facts
from .edits import Edits
from .schedule import ServedPlan
from .server import Server
from .turns import Reading

NAME = "the self-check's adapter"
TOKEN, OTHER_TOKEN = 5, 6
"""The only token of the request with the adapter, and of the other one. By them rows are told apart."""
ANSWER = 4
"""How many tokens each request generates."""
_PROMPT_ONLY = "f2+l2"
_WITH_ANSWER = "f2+l2+g2"
_CLOSE = 0.02
"""The largest error, in terms of the edit and the hidden state: bf16 rounds to 0.004."""


@dataclass
class _Seen:
    """What was noted in an edited module, step by step."""

    tokens: list[Tensor] = field(default_factory=list)
    """(rows,) each: the id of each token."""
    index: list[Tensor] = field(default_factory=list)
    """(rows,) each: the index of each token in its request."""
    before: list[Tensor] = field(default_factory=list)
    """(rows, d) each: what the formula saw."""
    change: list[Tensor] = field(default_factory=list)
    """(rows, d) each."""
    after: list[Tensor] = field(default_factory=list)
    """(rows, d) each: the hidden states that were changed, without the residual."""


class SelfCheck:
    """The self-check in one worker.

    Args:
        server: the worker's adapters.
        length: how many tokens the prompt of the request with the adapter has, at least 4.
        captured: whether steps are captured as graphs. Then only prompts are edited, and steps that ran as graphs are
            not looked at.
    """

    def __init__(self, server: Server, length: int, captured: bool) -> None:
        self.server = server
        self.captured = captured
        self.expected = {0, 1, length - 2, length - 1} | (set() if captured else {length, length + 1})
        self.seen = {name: _Seen() for name in server.edits}
        self.factors = {name: _random(edits, seed) for seed, (name, edits) in enumerate(server.edits.items())}
        spec = _PROMPT_ONLY if captured else _WITH_ANSWER
        self.facts = Facts("self-check", [spec], "all", Reading([], []))
        plan = ServedPlan(Positions.parse(spec).groups, "all")
        server.add(NAME, ServedAdapter(dict.fromkeys(self.factors, plan), self.factors, self.facts))
        self._rows: tuple[Tensor, Tensor] | None = None
        self._handle = server.model.register_forward_pre_hook(self._note_rows, with_kwargs=True)
        for name, edits in server.edits.items():
            vars(edits)["apply"] = self._noting(edits.apply, self.seen[name])

    def _note_rows(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model is given."""
        positions, ids = kwargs["positions"], kwargs.get("input_ids")
        # (rows,) each. Some models have three lines of positions, which are alike for text.
        index = positions.reshape(-1, positions.shape[-1])[0].to("cpu", copy=True)
        tokens = torch.full_like(index, TOKEN) if ids is None else ids.to("cpu", copy=True)
        self._rows = (tokens, index)

    def _noting(self, apply: Callable[..., None], seen: _Seen) -> Callable[..., None]:
        def noting(hidden: Tensor, residual: Tensor | None) -> None:
            old = hidden.reshape(-1, hidden.shape[-1]).to(torch.float32, copy=True)  # (rows, d)
            apply(hidden, residual)
            if self._rows is not None:
                new = hidden.reshape(-1, hidden.shape[-1]).to(torch.float32, copy=True)
                seen.tokens.append(self._rows[0])
                seen.index.append(self._rows[1])
                seen.before.append(old if residual is None else old + residual.reshape(old.shape).float())
                seen.change.append(new - old)
                seen.after.append(new)

        return noting

    def finish(self) -> str | None:
        """Stop noting. Returns what is wrong, or None."""
        self._handle.remove()
        for edits in self.server.edits.values():
            del vars(edits)["apply"]
        return next(filter(None, (self._wrong(name) for name in self.seen)), None)

    def _wrong(self, name: str) -> str | None:
        """What is wrong in a module."""
        seen = self.seen[name]
        found: set[int] = set()
        for tokens, index, before, change, after in zip(seen.tokens, seen.index, seen.before, seen.change, seen.after):
            edit = self.factors[name].edit(before)  # (rows, d)
            error = (change - edit).norm(dim=-1)  # (rows,)
            right = (error <= _CLOSE * (edit.norm(dim=-1) + after.norm(dim=-1))).tolist()
            changed = (change != 0).any(dim=-1).tolist()
            for row, (token, at) in enumerate(zip(tokens.tolist(), index.tolist())):
                named = token == TOKEN and at in self.expected
                # Rows behind the step's tokens may hold anything, and are not edited.
                if changed[row] and not (named and right[row]):
                    what = "by something else" if named else "and should not"
                    return f"{name}: the token at {at} of a request changed {what}"
                if changed[row]:
                    found.add(at)
        if found != self.expected and not self.captured:
            return f"{name}: the tokens at {sorted(self.expected - found)} of a request were not edited"
        return None


def _random(edits: Edits, seed: int) -> Factors:
    """Random weights of LoReFT, of rank 1: they change a hidden state by about its own size."""
    table = edits.table
    generator = torch.Generator().manual_seed(seed)
    basis, a = torch.randn(2, 1, table.sizes["d"], generator=generator)  # (1, d) each
    basis = basis / basis.norm()
    tensors = LowRankFactors(basis, Affine(a / 4 - basis, torch.zeros(1)))
    return tensors.map(lambda tensor: tensor.to(table.device))
