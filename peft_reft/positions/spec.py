"""The grammar of position specs: groups (see `groups`) joined by ``+``; ``all`` stands for ``p+g``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from .groups import GROUPS, Ends, FirstTokens, Group, LastTokens
from .layout import Layout

_SHORTHANDS = {"all": ("p", "g")}


@dataclass(frozen=True)
class Positions:
    """A parsed position spec.

    Examples:
        >>> from peft_reft import Positions
        >>> spec = Positions.parse("f7+l7")
        >>> [str(group) for group in spec.groups]
        ['f7', 'l7']
        >>> str(Positions.parse("all"))
        'p+g'
        >>> print(spec.describe())
        the first 7 and the last 7 tokens of the prompt
    """

    groups: Layout

    @staticmethod
    def parse(spec: str) -> Positions:
        """Parse `spec`. Raises ValueError that shows the spec and points at the wrong term."""
        if not isinstance(spec, str):
            raise ValueError(f"positions must be a string such as 'f7+l7', got {spec!r}. Allowed: {grammar()}.")
        return _parse(spec, tuple(GROUPS))

    @property
    def counted(self) -> bool:
        """Whether no group is open-ended, so that the number of slots does not depend on the batch."""
        return not self.groups.open_groups

    def describe(self) -> str:
        """The spec in words, for a model card."""
        in_order = sorted(self.groups, key=lambda group: GROUPS.index(type(group)))
        prompt = [group for group in in_order if not group.decodes]
        answer = [group for group in in_order if group.decodes]
        parts = []
        if prompt:
            skip = prompt[0].ends.skip
            words = f"{_phrases(prompt)} {_tokens(prompt)} of the prompt"
            if skip == 1:
                words += " without its last token"
            elif skip:
                words += f" without its last {skip} tokens"
            parts.append(words)
        if answer:
            parts.append(f"{_phrases(answer)} generated {_tokens(answer)}")
        return " and ".join(parts)

    def __str__(self) -> str:
        return str(self.groups)


def _phrases(groups: list[Group]) -> str:
    return " and ".join(group.phrase for group in groups)


def _tokens(groups: list[Group]) -> str:
    return "token" if groups[-1].count == 1 else "tokens"


def grammar() -> str:
    """All terms of a spec, in a few words."""
    terms = [group.grammar for group in GROUPS]
    return f"{', '.join([*terms, 'all (p+g)'])}; N, K >= 1"


def union(specs: Iterable[Positions]) -> Layout:
    """The distinct groups of several specs in order of first appearance: the layout of one batch tensor."""
    return Layout(tuple(dict.fromkeys(group for spec in specs for group in spec.groups)))


@lru_cache(maxsize=256)
def _parse(spec: str, classes: tuple[type[Group], ...]) -> Positions:
    groups: list[Group] = []
    start = 0
    for term in spec.split("+"):
        stripped = term.strip()
        at = start + len(term) - len(term.lstrip())
        for name in _SHORTHANDS.get(stripped, (stripped,)):
            group = _parse_term(name, classes)
            if group is None:
                raise _spec_error(spec, at, stripped, f"is not a group. Allowed: {grammar()}")
            if group.count == 0:
                raise _spec_error(spec, at, stripped, "selects no token; leave it out, or give a count of 1 or more")
            for other in groups:
                if group.overlaps(other):
                    raise _spec_error(spec, at, stripped, f"overlaps '{other}': a token is edited once")
            groups.append(group)
        start += len(term) + 1
    ends = Ends(
        prefix=next((group.count or 0 for group in groups if isinstance(group, FirstTokens)), 0),
        suffix=next((group.count or 0 for group in groups if isinstance(group, LastTokens)), 0),
        skip=max(group.ends.skip for group in groups),
    )
    return Positions(Layout(tuple(replace(group, ends=ends) for group in groups)))


def _parse_term(term: str, classes: tuple[type[Group], ...]) -> Group | None:
    """The group that a term names; None if it names none."""
    for group in classes:
        match = re.fullmatch(group.pattern, term)
        if match is None:
            continue
        given = match.groupdict()
        skip = given.get("skip")
        if skip is not None and int(skip) == 0:
            return None
        count = given.get("count")
        return group(count=None if count is None else int(count), ends=Ends(skip=int(skip or 0)))
    return None


def _spec_error(spec: str, at: int, term: str, problem: str) -> ValueError:
    return ValueError(f"positions={spec!r}: {term!r} {problem}.\n    {spec}\n    {' ' * at}{'^' * max(1, len(term))}")
