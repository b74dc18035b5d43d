"""The position groups, one class each: the terms that a spec such as ``f7+l7`` is made of.

=======  ===============================  =======  ======  =================
group    tokens                           prefill  decode  class
=======  ===============================  =======  ======  =================
``fN``   first N of the prompt            yes      no      `FirstTokens`
``lN``   last N of the prompt             yes      no      `LastTokens`
``lN~K`` the N before its last K          yes      no      `LastTokens`
``p``    the whole prompt                 yes      no      `WholePrompt`
``gN``   first N generated                no       yes     `Generated`
``g``    all generated                    no       yes     `Generated`
=======  ===============================  =======  ======  =================

A class says everything in which its group differs from the others. Training (`resolve`), generation, serving, the
model card and `show_positions` ask it, and none of them knows a letter. To add a group, write a class and put it into
`GROUPS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

Number = Any
"""An int, a NumPy array or a tensor of ints: the arithmetic below holds for each of them."""


class Turn(NamedTuple):
    """A prompt and the answer behind it; or many at once, as arrays.

    An *index* counts the tokens of a document from 0, without padding:

        index     0  1  2  3  4  5  6  7
        token     u  u  u  u  a  a  a  u      the first turn of a document:
                  begin=0     answer=4 stop=7
    """

    begin: Number
    """Index of the prompt's first token."""
    answer: Number
    """Index of the answer's first token, which is the prompt's length in the first turn."""
    stop: Number
    """Index behind the answer's last token."""
    is_first: Number
    """Bool: whether this is the first turn of its document."""


class Span(NamedTuple):
    """The tokens that a group takes in a turn: slot k is the token at index `start + k`, if `lower <= index < upper`.

    Slots outside of these bounds are empty.
    """

    start: Number
    lower: Number
    upper: Number


@dataclass(frozen=True)
class Ends:
    """How many tokens all groups of one spec together take at the two ends of a prompt."""

    prefix: int = 0
    """N of the spec's ``fN``; 0 if it has none."""
    suffix: int = 0
    """N of the spec's ``lN``; 0 if it has none."""
    skip: int = 0
    """K of the spec's ``lN~K``: the prompt is taken without its last K tokens."""

    def length(self, turn: Turn) -> Number:
        """Length of the prompt without the tokens that are skipped."""
        length = turn.answer - turn.begin - self.skip
        return length * (length > 0)

    def kept_prefix(self, turn: Turn) -> Number:
        """How many tokens of its prefix a prompt keeps. Only the first prompt of a document has one."""
        length = self.length(turn)
        return self._cut(self.prefix, half=length // 2, length=length, turn=turn) * turn.is_first

    def kept_suffix(self, turn: Turn) -> Number:
        """How many tokens of its suffix a prompt keeps: never more than it has."""
        length = self.length(turn)
        return smaller(self._cut(self.suffix, half=(length + 1) // 2, length=length, turn=turn), length)

    def _cut(self, count: int, half: Number, length: Number, turn: Turn) -> Number:
        """The rule for short prompts (arXiv 2404.03592, section 3): each end has half of the prompt.

        With L < p + s tokens, p is cut to min(p, L // 2) and s to min(s, (L + 1) // 2). So prefix and suffix never
        meet, and the last token always counts. The rule is for the first prompt of a document.
        """
        is_short = turn.is_first & (length < self.prefix + self.suffix)
        return count - is_short * (count - smaller(count, half))


@dataclass(frozen=True)
class Group(ABC):
    """One term of a spec.

    Two terms that read alike in different specs can be different groups: how far ``f5`` is cut in a short prompt
    depends on whether an ``l5`` stands beside it.
    """

    count: int | None
    """How many tokens it takes in each turn. None: the group is *open-ended*, it takes its whole part of the turn."""
    ends: Ends = Ends()
    """Of the spec that the group stands in."""

    letter: ClassVar[str]
    """What it is called in a spec."""
    pattern: ClassVar[str]
    """Regular expression of a term; the named groups `count` and `skip` are read from it, if they are there."""
    grammar: ClassVar[str]
    """A few words for the error about an unknown term."""
    colour: ClassVar[tuple[str, str]]
    """In `show_positions`: the ANSI code of a background, and the background's colour in HTML."""
    decodes: ClassVar[bool] = False
    """Whether it takes tokens of the answer, which are edited while decoding; else it takes tokens of the prompt."""
    waits_for_end: ClassVar[bool] = False
    """Whether a token of the prompt can come to be edited only because the prompt ends behind it."""
    beside: ClassVar[frozenset[str]] = frozenset()
    """Letters of groups of the same part of a turn whose tokens are never its own."""

    @abstractmethod
    def span(self, turn: Turn) -> Span:
        """The tokens that it takes, in plain arithmetic that holds for ints, NumPy arrays and tensors."""

    @property
    @abstractmethod
    def phrase(self) -> str:
        """Which tokens, for the model card: "the first 7", to be followed by "tokens of the prompt"."""

    @property
    def needs_end_below(self) -> int | None:
        """It takes other tokens of a prompt with fewer tokens than this if the prompt ends elsewhere; None: of any."""
        return None

    @property
    def counts_from_beginning(self) -> bool:
        """Whether it takes other tokens if a document's beginning is cut off."""
        return True

    @property
    def is_open(self) -> bool:
        """Whether it is open-ended."""
        return self.count is None

    def overlaps(self, other: Group) -> bool:
        """Whether both could take the same token."""
        if self.decodes != other.decodes:
            return False
        return other.letter not in self.beside and self.letter not in other.beside

    def __str__(self) -> str:
        return self.letter if self.count is None else f"{self.letter}{self.count}"


@dataclass(frozen=True)
class FirstTokens(Group):
    """``fN``: the first N tokens of a document's first prompt."""

    letter = "f"
    pattern = "f(?P<count>[0-9]+)"
    grammar = "fN (first N tokens of the prompt)"
    colour = ("44", "#9ecbff")
    beside = frozenset({"l"})

    def span(self, turn: Turn) -> Span:
        return Span(turn.begin, turn.begin, turn.begin + self.ends.kept_prefix(turn))

    @property
    def phrase(self) -> str:
        return "the first" if self.count == 1 else f"the first {self.count}"

    @property
    def needs_end_below(self) -> int | None:
        """It takes all tokens of a shorter prompt."""
        return self.count


@dataclass(frozen=True)
class LastTokens(Group):
    """``lN``, ``lN~K``: the last N tokens of each prompt, or the N before its last K.

    In a short prompt the first slots are empty, so the last slot always holds the last token.
    """

    letter = "l"
    pattern = "l(?P<count>[0-9]+)(~(?P<skip>[0-9]+))?"
    grammar = "lN (last N tokens of the prompt), lN~K (the N before its last K)"
    colour = ("42", "#a6e3a1")
    waits_for_end = True
    beside = frozenset({"f"})

    def span(self, turn: Turn) -> Span:
        stop = turn.begin + self.ends.length(turn)
        return Span(stop - self.ends.suffix, stop - self.ends.kept_suffix(turn), stop)

    @property
    def phrase(self) -> str:
        return "the last" if self.count == 1 else f"the last {self.count}"

    @property
    def counts_from_beginning(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{super().__str__()}~{self.ends.skip}" if self.ends.skip else super().__str__()


@dataclass(frozen=True)
class WholePrompt(Group):
    """``p``: all tokens of all prompts."""

    letter = "p"
    pattern = "p"
    grammar = "p (the whole prompt)"
    colour = ("46", "#a5e8e8")

    def span(self, turn: Turn) -> Span:
        return Span(turn.begin, turn.begin, turn.answer)

    @property
    def phrase(self) -> str:
        return "all"


@dataclass(frozen=True)
class Generated(Group):
    """``gN``, ``g``: the first N tokens of each answer, or all of them."""

    letter = "g"
    pattern = "g(?P<count>[0-9]+)?"
    grammar = "gN, g (first N generated tokens, all of them)"
    colour = ("43", "#ffe08a")
    decodes = True

    def span(self, turn: Turn) -> Span:
        if self.count is None:
            return Span(turn.answer, turn.answer, turn.stop)
        return Span(turn.answer, turn.answer, smaller(turn.answer + self.count, turn.stop))

    @property
    def phrase(self) -> str:
        if self.count is None:
            return "all"
        return "the first" if self.count == 1 else f"the first {self.count}"

    @property
    def counts_from_beginning(self) -> bool:
        return self.count is not None  # of an answer that has lost its beginning


GROUPS: list[type[Group]] = [FirstTokens, LastTokens, WholePrompt, Generated]
"""All groups, in the order in which the model card names them."""


def smaller(a: Number, b: Number) -> Number:
    """The smaller of two numbers, element by element."""
    return a - (a - b) * (a > b)
