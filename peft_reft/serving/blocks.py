"""The keys of cached blocks: a block without edited tokens has the base model's, any other says what was edited in it.

vLLM keeps keys and values in blocks of some tokens, and finds them again by a hash of the block's tokens, of the block
before, and of extra elements. This module makes one extra element for a block with edited tokens: a digest of the
adapter's fingerprint and of which of the block's tokens are edited by which set of weights. Chaining carries the rest.
So the base and all adapters share the blocks before the first edited token, and two prompts share a block if and only
if the same adapter edits the same tokens of it (design: "what is not edited is the base's").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import LoReftConfig
from ..positions.index import Sharing
from ..positions.spec import Positions
from .schedule import NONE, Ints, Pieces, ServedPlan, Spans, edited
from .turns import Reading


@dataclass(frozen=True)
class BlockKeys:
    """Makes the keys of one adapter. It has only strings, ints and lists, so that a request can carry it.

    Args:
        fingerprint: a digest of the adapter's files.
        specs: the distinct specs of its `positions`.
        sharing: which positions of a layer share weights.
        reading: how it finds prompts and answers in a request.
    """

    fingerprint: str
    specs: list[str]
    sharing: Sharing
    reading: Reading

    @staticmethod
    def of(config: LoReftConfig, fingerprint: str) -> BlockKeys:
        """The keys of an adapter with this config."""
        specs = [str(spec.groups) for spec in config.specs]
        return BlockKeys(fingerprint, specs, config.sharing, Reading.of(config))

    @staticmethod
    def read(data: dict[str, Any]) -> BlockKeys:
        """Read what `dataclasses.asdict` has written."""
        return BlockKeys(**{**data, "reading": Reading(**data["reading"])})

    def map_of(self, ids: Sequence[int] | None, given: int) -> EditedMap:
        """Which tokens of a request are edited.

        Args:
            ids: token ids that the request was given; None if it was given embeddings.
            given: how many tokens or embeddings it was given.
        """
        plans = [ServedPlan(Positions.parse(spec).groups, self.sharing) for spec in self.specs]
        spans = self.reading.answers(ids, given)
        return EditedMap(self.fingerprint, plans, spans, [_sets(plan, spans, 0, given) for plan in plans], given)


@dataclass(frozen=True)
class EditedMap:
    """Which tokens of one request are edited, and by which set of weights."""

    fingerprint: str
    plans: list[ServedPlan]
    """What the adapter does, in each way that its layers do it."""
    spans: Spans
    """The answers in what the request was given."""
    sets: list[Ints]
    """For each plan, (given,) the set of weights that edits each token, -1 for none."""
    given: int
    """How many tokens the request was given."""

    def element(self, start: int, stop: int) -> str | None:
        """The extra element of the block with the tokens `start` to `stop`; None if none of them is edited."""
        of_block = []
        for plan, sets in zip(self.plans, self.sets):
            inside = sets[start:stop]
            if stop > self.given and plan.edits_answers:
                inside = np.concatenate([inside, _sets(plan, self.spans, max(start, self.given), stop)])
            of_block.append(inside)
        if all((sets == NONE).all() for sets in of_block):
            return None
        digest = hashlib.sha256(self.fingerprint.encode())
        for sets in of_block:
            # Tokens that were not given and are not edited may be missing at the end.
            filled = np.full(stop - start, NONE, dtype=np.int64)
            filled[: len(sets)] = sets
            digest.update(filled.tobytes())
        return digest.hexdigest()[:32]


def _sets(plan: ServedPlan, spans: Spans, start: int, stop: int) -> Ints:
    """The set of weights that edits each of the tokens `start` to `stop` of a request, -1 for none."""
    found = np.full(stop - start, NONE, dtype=np.int64)
    zero = np.zeros(1, dtype=np.int64)  # (1 request,)
    pieces = Pieces(
        start=zero, count=zero + stop - start, computed=zero + start, given=zero, place=zero, answers=[spans]
    )
    rows, sets, _ = edited(pieces.by_turn(), [plan], sets_per_place=0)
    found[rows] = sets
    return found
