"""Rollouts of a training: a prompt that ended where the forward that trains on its row does not see it is refused.

`generate` knows where its prompt ends: there, where what it was given ends. A rollout with tools is several calls of
`generate`, each of which is given the row so far. The forward that trains on the whole row finds these ends by the
headers of the chat template; without headers it finds the first end alone, by the labels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .batch import Batch
from .turns import answers_of
from .wanted import WAYS_OUT, Wanted

_MOST = 4096
"""Prompts that are kept, so that they do not pile up if a training was interrupted."""


@dataclass(frozen=True)
class _Unseen:
    """A prompt of a rollout whose end no header says."""

    wanted: Wanted
    ids: tuple[int, ...]
    following: int
    """The first token that was generated."""
    marked: bool
    """Whether headers say where other answers of it begin. Then labels count for nothing."""


class Rollouts:
    """The prompts of the rollouts since the last training forward, as far as no header says where they end."""

    def __init__(self) -> None:
        self._unseen: deque[_Unseen] = deque(maxlen=_MOST)
        self._calls = 0
        """Calls of `generate`."""
        self._trained = False
        """Whether there was a training forward, which has checked them."""

    def note(self, asked: Iterable[Wanted], prompts: Sequence[Sequence[int]], following: Sequence[int]) -> None:
        """Note a call of `generate`.

        Args:
            asked: what the layers asked in it.
            prompts: token ids of each row, without padding.
            following: the first token that was generated in each row.
        """
        asked = {wanted for wanted in asked if wanted.needs_end}
        if not asked:
            return
        if self._trained:
            self._unseen.clear()
            self._calls, self._trained = 0, False
        self._calls += 1
        for wanted in asked:
            for ids, token in zip(prompts, following):
                spans = _answers(ids, wanted)
                if not spans or spans[-1][1] < len(ids):
                    self._unseen.append(_Unseen(wanted, tuple(ids), token, marked=bool(spans)))

    def check(self, batch: Batch) -> None:
        """Check that a training forward finds the end of each prompt of its rows' rollouts.

        Raises:
            ValueError: it does not find one.
        """
        self._trained = True
        if not self._unseen or batch.ids is None or batch.packed:
            return
        for wanted in {each.wanted for each in self._unseen}:
            turns = batch.turns(wanted.marks)
            for row, ids in enumerate(batch.ids):
                tokens = ids[batch.real[row]].tolist()
                ends = turns.end[row][turns.event[row]].tolist()
                # If there was one call, labels say where its prompts end; unless the model has written a header.
                labels_count = self._calls == 1 and not _answers(tokens, wanted)
                for each in self._unseen:
                    if labels_count and not each.marked:
                        continue
                    length = len(each.ids)
                    if each.wanted != wanted or length in ends or tokens[length : length + 1] != [each.following]:
                        continue
                    below = wanted.needs_end_below
                    if tuple(tokens[:length]) != each.ids or (below is not None and below <= min(length, *ends)):
                        continue
                    raise ValueError(_refusal(wanted, length))


def _answers(ids: Sequence[int], wanted: Wanted) -> list[tuple[int, int]]:
    """The answers that headers of the chat template begin."""
    return answers_of(ids, wanted.marks.response, wanted.marks.instruction) if wanted.marks else []


def _refusal(wanted: Wanted, length: int) -> str:
    why = "no header of the chat template is known" if not wanted.has_marks else "no header of the assistant stands"
    return (
        f"LoReFT: a rollout was given {length} tokens of this row as its prompt, to whose end "
        f"positions={str(wanted.layout)!r} refers. The forward that trains on the row cannot see that a prompt ended "
        f"there: {why} there. So it would edit other tokens than the rollout did. Rollouts of several turns (tools, "
        "environments) need headers; in plain text the model may have written one itself: `response_template=[]` then "
        "says that there are none. " + WAYS_OUT
    )
