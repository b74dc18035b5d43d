"""Where LoReFT deliberately does otherwise than PEFT's tests expect: the only failures of `make test-peft`."""

from __future__ import annotations

from typing import NamedTuple


class Difference(NamedTuple):
    tests: str
    """A regular expression, searched in a test's id."""
    message: str
    """Another, searched in the type and message of its error."""
    reason: str


DIFFERENCES: list[Difference] = []
