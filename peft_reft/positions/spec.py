"""Where in time LoReFT acts: the grammar of position specs.

A spec is a union of groups joined by ``+``:

=======  ===============================  =======  ======
group    tokens                           prefill  decode
=======  ===============================  =======  ======
``fN``   first N of the prompt            yes      no
``lN``   last N of the prompt             yes      no
``lN~K`` the N before its last K          yes      no
``p``    the whole prompt                 yes      no
``gN``   first N generated                no       yes
``g``    all generated                    no       yes
``all``  ``p+g``                          yes      yes
=======  ===============================  =======  ======

"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

NO_POSITION = -1
"""Marks a slot that no token fills; PEFT and transformers use -100 for labels, positions start at 0."""

_TOKEN = re.compile(r"(?P<kind>[flg])(?P<count>[0-9]+)(?:~(?P<skip>[0-9]+))?|(?P<open>all|[pg])")
_GRAMMAR = (
    "fN, lN (first or last N prompt tokens), lN~K (N before the last K), p (the prompt), gN, g (generated tokens), "
    "all (p+g); N, K >= 1"
)


@dataclass(frozen=True)
class Group:
    """One term of a spec, with what it must know of the other terms.

    Two terms that read alike in different specs are different groups: how far ``f5`` is cut in a short prompt depends
    on whether an ``l5`` stands beside it.
    """

    kind: str
    """One of ``f l p g``."""
    count: int | None
    """None for an open-ended group (``p``, ``g``)."""
    p: int = 0
    """N of the spec's ``fN``, 0 without one."""
    s: int = 0
    """N of the spec's ``lN``, 0 without one."""
    skip: int = 0
    """K of the spec's ``lN~K``: how many tokens at the prompt's end are left out of it, 0 without one."""

    def __str__(self) -> str:
        skip = f"~{self.skip}" if self.kind == "l" and self.skip else ""
        return f"{self.kind}{'' if self.count is None else self.count}{skip}"


Layout = tuple[Group, ...]


def slots_per_answer(layout: Layout) -> int:
    """Number of slots that the counted groups of `layout` take for each answer."""
    return sum(group.count for group in layout if group.count is not None)


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
        """Parse `spec`. Raises ValueError that shows the spec and points at the term that is wrong."""
        if not isinstance(spec, str):
            raise ValueError(f"positions must be a string such as 'f7+l7', got {spec!r}. Allowed: {_GRAMMAR}.")
        return _parse(spec)

    @property
    def counted(self) -> bool:
        """Whether every group has a count, so that the number of slots is known before the batch is."""
        return all(group.count is not None for group in self.groups)

    def describe(self) -> str:
        """The spec in words, for a model card."""
        ends = [
            ("first" if g.kind == "f" else "last", g.count)
            for g in sorted(self.groups, key=lambda g: g.kind)
            if g.kind in "fl"
        ]
        in_words = [f"the {end}" if count == 1 else f"the {end} {count}" for end, count in ends]
        tokens = "token" if ends and ends[-1][1] == 1 else "tokens"
        parts = [f"{' and '.join(in_words)} {tokens} of the prompt"] if ends else []
        if ends and (skip := self.groups[0].skip):
            parts[0] += f" without its last {'token' if skip == 1 else f'{skip} tokens'}"
        parts += ["all tokens of the prompt" for g in self.groups if g.kind == "p"]
        generated = [g for g in self.groups if g.kind == "g"]
        how_many = {None: "all generated tokens", 1: "the first generated token"}
        parts += [how_many.get(g.count, f"the first {g.count} generated tokens") for g in generated]
        return " and ".join(parts)

    def __str__(self) -> str:
        return "+".join(map(str, self.groups))


@lru_cache(maxsize=256)
def _parse(spec: str) -> Positions:
    groups: list[Group] = []
    start = 0
    for term in spec.split("+"):
        stripped = term.strip()
        at = start + len(term) - len(term.lstrip())
        match = _TOKEN.fullmatch(stripped)
        if match is None:
            raise _spec_error(spec, at, stripped, f"is not a group. Allowed: {_GRAMMAR}")
        if match["open"] == "all":
            new = [Group("p", None), Group("g", None)]
        elif match["open"]:
            new = [Group(match["open"], None)]
        else:
            new = [Group(match["kind"], int(match["count"]), skip=int(match["skip"] or 0))]
            if new[0].count == 0:
                raise _spec_error(spec, at, stripped, "selects no token; leave it out, or give a count of 1 or more")
            if match["skip"] is not None and (match["kind"] != "l" or not new[0].skip):
                raise _spec_error(spec, at, stripped, f"is not a group. Allowed: {_GRAMMAR}")
        for group in new:
            for other in groups:
                kinds = {group.kind, other.kind}
                if len(kinds) == 1 or ("p" in kinds and kinds & {"f", "l"}):
                    raise _spec_error(spec, at, stripped, f"overlaps '{other}': a token is edited once")
            groups.append(group)
        start += len(term) + 1
    counts = {group.kind: group.count for group in groups}
    p, s, skip = counts.get("f") or 0, counts.get("l") or 0, max(group.skip for group in groups)
    return Positions(tuple(replace(group, p=p, s=s, skip=skip) for group in groups))


def _spec_error(spec: str, at: int, term: str, problem: str) -> ValueError:
    return ValueError(f"positions={spec!r}: {term!r} {problem}.\n    {spec}\n    {' ' * at}{'^' * max(1, len(term))}")


def union(specs: Iterable[Positions]) -> Layout:
    """The distinct groups of several specs in order of first appearance: the slot layout of one batch tensor."""
    return tuple(dict.fromkeys(group for spec in specs for group in spec.groups))
