"""Where the prompts and answers of a request are, by the marks of its adapter; which requests share cached blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import LoReftConfig
from ..positions.turns import answers_of
from ..positions.wanted import Wanted, largest_or_none
from .schedule import Spans


@dataclass(frozen=True)
class Reading:
    """How an adapter reads requests. It has only ints and lists, so that one process can send it to another.

    Args:
        response: `response_template` of the adapter's config, empty if it has none.
        instruction: its `instruction_template`, likewise.
        needs_end_below: prompts of fewer tokens than this are edited in a way that depends on where they end. None:
            all prompts are.
    """

    response: list[list[int]]
    instruction: list[list[int]]
    needs_end_below: int | None

    @staticmethod
    def of(config: LoReftConfig) -> Reading:
        """The reading of an adapter with this config."""
        ends: list[int | None] = []
        for spec in config.specs:
            everything = spec.groups.edits_every_token and config.sharing == "all"
            ends.append(Wanted(spec.groups, marks=None, everything=everything).needs_end_below)
        return Reading(
            response=_lists(config.response_template),
            instruction=_lists(config.instruction_template),
            needs_end_below=largest_or_none(ends),
        )

    def answers(self, ids: Sequence[int] | None, length: int) -> Spans:
        """Find the answers in what a request was given. The last one goes on with what is generated.

        Args:
            ids: its token ids; None if it was given embeddings.
            length: how many tokens or embeddings it was given.
        """
        if ids is None or not self.response:
            return [(length, length)]
        return answers_of(ids, self.response, self.instruction, given=length)

    def depends_on_length(self, ids: Sequence[int] | None, length: int) -> bool:
        """Whether a longer request that begins with the same tokens may edit other ones of them.

        It does not if the tokens alone say where prompts end, or if that makes no difference.
        """
        if self.needs_end_below is not None and length >= self.needs_end_below:
            return False
        if ids is None or not self.response:
            return True
        if answers_of(ids, self.response, self.instruction) != self.answers(ids, length):
            return True
        # The last tokens may be the beginning of a header. If the rest follows, a prompt ends elsewhere.
        return any(_may_go_on(ids, template) for template in (*self.response, *self.instruction))


def _may_go_on(ids: Sequence[int], template: Sequence[int]) -> bool:
    """Whether `ids` ends with a beginning of `template` that is not all of it."""
    longest = min(len(template) - 1, len(ids))
    return any(list(ids[-n:]) == list(template[:n]) for n in range(1, longest + 1))


def _lists(templates: Iterable[Iterable[int]] | None) -> list[list[int]]:
    return [] if templates is None else [list(template) for template in templates]
