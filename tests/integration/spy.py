"""Which tokens LoReFT edits, seen at the moment of editing."""

from collections import defaultdict
from contextlib import contextmanager

import torch

from peft_reft.layer import LoreftLayer
from peft_reft.runtime import PositionState, _Derived, _Step


def expected_offsets(length, first=2, last=2):
    """Tokens that `f2+l2` edits of a prompt of that many tokens: the paper's rule for short ones."""
    if length < first + last:
        first, last = min(first, length // 2), min(last, (length + 1) // 2)
    return frozenset(range(first)) | frozenset(range(length - last, length))


class Spy:
    """Records, for each kind of forward, the tokens of each row that were edited.

    `seen[kind]` has one entry a row and forward: (row's real tokens, edited tokens counted from the first of these).
    Kinds: "rollout" (within `generate`, the tokens are the prompt's), "train" (with gradients), "no_grad".
    All layers of a forward must edit the same tokens. A forward that checkpointing runs again counts as one more.
    """

    def __init__(self, monkeypatch):
        self.seen = defaultdict(list)
        self.forwards = defaultdict(list)
        self._kind = None
        self._prompts = None
        begin, edit = PositionState.begin, LoreftLayer._edit

        def spied_begin(state, source):
            if isinstance(source, _Step):
                self._kind = "rollout"
            else:
                self._kind = "train" if torch.is_grad_enabled() else "no_grad"
                source._kind = self._kind
            begin(state, source)

        def spied_edit(layer, edited, flat, weights, plan, index, rows):
            self._record(layer.state._source, index)
            return edit(layer, edited, flat, weights, plan, index, rows)

        monkeypatch.setattr(PositionState, "begin", spied_begin)
        monkeypatch.setattr(LoreftLayer, "_edit", spied_edit)

    def _record(self, source, index):
        batch, seq = index.shape
        valid = index.valid.reshape(-1)
        flat = index.rows.reshape(-1)[valid]
        columns = [{int(i) - row * seq for i in flat if int(i) // seq == row} for row in range(batch)]
        if isinstance(source, _Step):
            assert source.start == 0, "a generated token was edited"
            real, tokens, kind = source.generation.real, self._prompts, "rollout"
            if real.shape[0] != batch:
                real = real.repeat_interleave(batch // real.shape[0], 0)
        else:
            assert isinstance(source, _Derived)
            mask = source.attention_mask
            real = torch.ones(batch, seq, dtype=torch.bool) if mask is None else mask.bool()
            tokens, kind = source.tokens, source._kind
        rows = []
        for row in range(batch):
            assert all(real[row, column] for column in columns[row]), "padding was edited"
            rank = (real[row].cumsum(0) - 1).tolist()
            offsets = frozenset(rank[column] for column in columns[row])
            assert len(offsets) == len(columns[row])
            rows.append((tuple(tokens[row][real[row]].tolist()), offsets))
        if kind == "train" and source.labels is not None:
            supervised = [int((source.labels[row] != -100).int().argmax()) for row in range(batch)]
            prompts = [int(real[row, :first].sum()) for row, first in enumerate(supervised)]
            rows = [(*entry, length) for entry, length in zip(rows, prompts)]
        elif source.__class__ is _Derived:
            labels = source.labels
            lengths = [
                int(real[row, : int((labels[row] != -100).int().argmax())].sum())
                if labels is not None and bool((labels[row] != -100).any())
                else int(real[row].sum())
                for row in range(batch)
            ]
            rows = [(*entry, length) for entry, length in zip(rows, lengths)]
        else:
            rows = [(*entry, len(entry[0])) for entry in rows]
        self.seen[kind].extend(rows)

    @contextmanager
    def prompts(self, ids):
        """Within: `generate` is given these ids."""
        self._prompts = ids
        try:
            yield
        finally:
            self._prompts = None

    def prompt_edits(self, kind):
        """{(prompt's tokens, edited tokens)} of that kind."""
        return {(tokens[:length], offsets) for tokens, offsets, length in self.seen[kind]}
