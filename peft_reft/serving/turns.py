"""Where the prompts and answers of a request are, by the marks of its adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import LoReftConfig
from ..positions.turns import answers_of
from .schedule import Spans


@dataclass(frozen=True)
class Reading:
    """How an adapter reads requests. It has only ints and lists, so that one process can send it to another.

    Args:
        response: `response_template` of the adapter's config, empty if it has none.
        instruction: its `instruction_template`, likewise.
    """

    response: list[list[int]]
    instruction: list[list[int]]

    @staticmethod
    def of(config: LoReftConfig) -> Reading:
        """The reading of an adapter with this config."""
        return Reading(_lists(config.response_template), _lists(config.instruction_template))

    def answers(self, ids: Sequence[int] | None, length: int) -> Spans:
        """Find the answers in what a request was given. The last one goes on with what is generated.

        Args:
            ids: its token ids; None if it was given embeddings.
            length: how many tokens or embeddings it was given.
        """
        if ids is None or not self.response:
            return [(length, length)]
        return answers_of(ids, self.response, self.instruction, given=length)


def _lists(templates: Iterable[Iterable[int]] | None) -> list[list[int]]:
    return [] if templates is None else [list(template) for template in templates]
