"""Our positions against the authors' `get_intervention_locations`, and where they part, against the paper.

The paper cuts prefix and suffix only where they would meet; the authors' code caps each at half of the prompt always.
"""

import json
from pathlib import Path

import pytest
import torch

from peft_reft import Positions
from peft_reft.positions.index import make_index
from peft_reft.positions.resolve import find_answers, resolve

GRID = json.loads((Path(__file__).parent / "locations.json").read_text())


def ours(positions, length):
    """(prefix, suffix) as sorted lists of columns."""
    groups = Positions.parse(positions).groups
    slots = resolve(groups, find_answers(torch.ones(1, length, dtype=torch.bool)))
    index = make_index(slots, length, groups, groups, "group")
    found = {"f": [], "l": []}
    for group, rows, keep in zip(groups, index.rows, index.valid.squeeze(-1)):
        found[group.letter] = sorted(rows[keep > 0].tolist())
    return found["f"], found["l"]


def counts(positions):
    return tuple(next((g.count for g in Positions.parse(positions).groups if g.letter == kind), 0) for kind in "fl")


def theirs(entry):
    """As `ours`; of a tied entry only their union is known."""
    filled = [sorted(column for column in group if column >= 0) for group in entry["locations"]]
    p, s = counts(entry["positions"])
    if entry["tied"] or not (p and s):  # the same list for each of the two interventions
        assert filled[0] == filled[1]
        return filled[0]
    return tuple(filled)


def agree(entry):
    return entry["length"] >= 2 * max(counts(entry["positions"]))


def ident(entry):
    return f"{entry['positions']}-{entry['length']}-{'tied' if entry['tied'] else 'untied'}"


@pytest.mark.parametrize("entry", [entry for entry in GRID if agree(entry)], ids=ident)
def test_long_prompts(entry):
    prefix, suffix = ours(entry["positions"], entry["length"])
    expected = theirs(entry)
    assert (prefix, suffix) == expected if isinstance(expected, tuple) else prefix + suffix == expected


@pytest.mark.parametrize("entry", [entry for entry in GRID if not agree(entry)], ids=ident)
def test_short_prompts_follow_the_paper(entry):
    n = entry["length"]
    p, s = counts(entry["positions"])
    if n < p + s:
        p, s = min(p, n // 2), min(s, n - n // 2)
    prefix, suffix = ours(entry["positions"], n)
    assert prefix == list(range(p))
    assert suffix == list(range(n - s, n))
    expected = theirs(entry)
    expected = expected[0] + expected[1] if isinstance(expected, tuple) else expected
    assert set(expected) <= set(prefix + suffix)  # the paper never edits less


@pytest.mark.parametrize(
    "positions, length, paper, code",
    [
        ("f4+l1", 5, [0, 1, 2, 3, 4], [0, 1, 4]),
        ("f1+l3", 4, [0, 1, 2, 3], [0, 2, 3]),
        ("f1+l3", 5, [0, 2, 3, 4], [0, 3, 4]),
        ("f3+l3", 5, [0, 1, 2, 3, 4], [0, 1, 3, 4]),
        ("f7+l7", 13, list(range(13)), [*range(6), *range(7, 13)]),
        ("f1+l1", 1, [0], []),
        ("f5", 8, [0, 1, 2, 3, 4], [0, 1, 2, 3]),
        ("l5", 5, [0, 1, 2, 3, 4], [3, 4]),
    ],
)
def test_where_they_part(positions, length, paper, code):
    prefix, suffix = ours(positions, length)
    assert prefix + suffix == paper
    (entry,) = (e for e in GRID if e["positions"] == positions and e["length"] == length and e["tied"])
    assert theirs(entry) == code
