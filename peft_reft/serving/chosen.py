"""What every process knows of an adapter, and what a request has chosen: strings, numbers and lists, to be sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import LoReftConfig
from ..positions.index import Sharing
from .schedule import Spans
from .turns import Reading


@dataclass(frozen=True)
class Facts:
    """What must be known of an adapter to say which tokens of a request it edits.

    Args:
        fingerprint: a digest of the adapter's files. Adapters of one fingerprint have the same weights.
        specs: the distinct specs of its `positions`.
        sharing: which positions of a layer share weights.
        reading: how it finds prompts and answers in a request.
    """

    fingerprint: str
    specs: list[str]
    sharing: Sharing
    reading: Reading

    @staticmethod
    def of(config: LoReftConfig, fingerprint: str) -> Facts:
        """The facts of an adapter with this config."""
        specs = [str(spec.groups) for spec in config.specs]
        return Facts(fingerprint, specs, config.sharing, Reading.of(config))

    @staticmethod
    def read(data: dict[str, Any]) -> Facts:
        """Read what `dataclasses.asdict` has written."""
        return Facts(**{**data, "reading": Reading(**data["reading"])})


@dataclass(frozen=True)
class Choice:
    """The adapter of a request. The core writes it into the request, and the worker reads it there.

    Args:
        facts: of the adapter, as it was when the request came: another one may have its name since.
        scale: multiplies the edits.
        prompt_length: how many of the tokens that the request was given are the prompt; the others are an answer.
            None: all of them, or what the marks of the chat template say.
    """

    facts: Facts
    scale: float = 1.0
    prompt_length: int | None = None

    @staticmethod
    def read(data: dict[str, Any]) -> Choice:
        """Read what `dataclasses.asdict` has written."""
        return Choice(**{**data, "facts": Facts.read(data["facts"])})

    def answers(self, ids: Sequence[int] | None, given: int) -> Spans:
        """Find the answers in what the request was given. The last one goes on with what is generated.

        Args:
            ids: token ids that the request was given; None if it was given embeddings.
            given: how many tokens or embeddings it was given.
        """
        if self.prompt_length is not None:
            return [(self.prompt_length, given)]
        return self.facts.reading.answers(ids, given)
