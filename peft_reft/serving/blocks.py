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
from functools import lru_cache

import numpy as np

from ..positions.index import Sharing
from ..positions.spec import Positions
from .chosen import Choice
from .schedule import NONE, Ints, ServedPlan, Spans


def map_of(choice: Choice, ids: Sequence[int] | None, given: int) -> EditedMap:
    """Which tokens of a request are edited.

    Args:
        choice: the request's adapter.
        ids: token ids that the request was given; None if it was given embeddings.
        given: how many tokens or embeddings it was given.
    """
    plans = [_plan(spec, choice.facts.sharing) for spec in choice.facts.specs]
    spans = choice.answers(ids, given)
    return EditedMap(
        weights=f"{choice.facts.fingerprint} {choice.scale!r}",
        plans=plans,
        spans=spans,
        sets=[plan.sets_in(spans, 0, given) for plan in plans],
        given=given,
    )


@dataclass(frozen=True)
class EditedMap:
    """Which tokens of one request are edited, and by which set of weights."""

    weights: str
    """Says with what they are edited: the adapter's fingerprint, and the scale."""
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
                inside = np.concatenate([inside, plan.sets_in(self.spans, max(start, self.given), stop)])
            of_block.append(inside)
        if all((sets == NONE).all() for sets in of_block):
            return None
        digest = hashlib.sha256(self.weights.encode())
        for sets in of_block:
            # Tokens that were not given and are not edited may be missing at the end.
            filled = np.full(stop - start, NONE, dtype=np.int64)
            filled[: len(sets)] = sets
            digest.update(filled.tobytes())
        return digest.hexdigest()[:32]


@lru_cache(maxsize=1024)
def _plan(spec: str, sharing: Sharing) -> ServedPlan:
    return ServedPlan(Positions.parse(spec).groups, sharing)
