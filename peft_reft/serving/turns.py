"""Where a request's prompts end, by the marks of its adapter; and with whom it shares cached blocks. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import LoReftConfig
from ..positions.turns import answers_of
from ..positions.wanted import Wanted, largest_or_none
from .schedule import Spans


@dataclass(frozen=True)
class Reading:
    """How an adapter reads requests. Made of ints and lists alone, to be sent from one process to another.

    Args:
        response: `response_template` of the adapter's config, empty if it has none.
        instruction: its `instruction_template`.
        needs_end_below: prompts of fewer tokens than this are edited in a way that depends on where they end; None:
            all prompts.
    """

    response: list[list[int]]
    instruction: list[list[int]]
    needs_end_below: int | None

    @staticmethod
    def of(config: LoReftConfig) -> Reading:
        """From an adapter's config."""
        ends = []
        for spec in config.specs:
            everything = spec.groups.edits_every_token and config.sharing == "all"
            ends.append(Wanted(spec.groups, marks=None, everything=everything).needs_end_below)
        return Reading(
            response=_lists(getattr(config, "response_template", None)),
            instruction=_lists(getattr(config, "instruction_template", None)),
            needs_end_below=largest_or_none(ends),
        )

    def answers(self, ids: Sequence[int] | None, length: int) -> Spans:
        """The answers in what a request was given; the last one goes on with what is generated.

        Args:
            ids: its token ids, None if embeddings were given.
            length: how many tokens there are.
        """
        if ids is None or not self.response:
            return [(length, length)]
        return answers_of(ids, self.response, self.instruction, given=length)

    def depends_on_length(self, ids: Sequence[int] | None, length: int) -> bool:
        """Whether the edits of what a request was given would be others if it went on, as in a chat's next turn.

        Not so if its tokens alone say where its prompts end, or if that makes no difference.
        """
        if self.needs_end_below is not None and length >= self.needs_end_below:
            return False
        if ids is None or not self.response:
            return True
        if answers_of(ids, self.response, self.instruction) != self.answers(ids, length):
            return True
        # The last tokens may be the beginning of a header, which then moves the end of a prompt.
        return any(_begins(template, ids) for template in (*self.response, *self.instruction))


def token_ids(request: Any) -> Sequence[int] | None:
    """What a request was given, None if some of it is embeddings."""
    ids: Sequence[int] | None = None if request.prompt_embeds is not None else request.prompt_token_ids
    return ids


def _begins(template: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether `ids` ends with a part of `template`: its beginning, but not all of it."""
    return any(list(ids[-n:]) == list(template[:n]) for n in range(1, min(len(template) - 1, len(ids)) + 1))


def _lists(templates: Iterable[Any] | None) -> list[list[int]]:
    return [list(template) for template in templates or ()]
