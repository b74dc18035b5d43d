"""Positions against a naive oracle: plain loops over the tokens of one row, written from the contract (design, 4)."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_reft import Positions
from peft_reft.positions.index import arrange
from peft_reft.positions.resolve import find_answers, resolve
from peft_reft.positions.spec import union

NONE = -1
UNSUPERVISED = -100


# The oracle.


def documents_of(real, position_ids):
    """Columns of the real tokens of each document: one begins at the first of all and wherever positions restart."""
    documents = []
    for column, is_real in enumerate(real):
        if is_real:
            if not documents or (position_ids is not None and position_ids[column] == 0):
                documents.append([])
            documents[-1].append(column)
    return documents


def answers_of(document, labels):
    """Indices into `document` at which a supervised span begins; without any, one answer after its last token."""
    starts = []
    for i, column in enumerate(document):
        supervised = labels is not None and labels[column] != UNSUPERVISED
        follows = i > 0 and labels is not None and labels[document[i - 1]] != UNSUPERVISED
        if supervised and not follows:
            starts.append(i)
    return starts or [len(document)]


def slots_of(document, starts, nth, groups):
    """Slots of the counted groups of one answer: a list of (group, slot within the group, column or -1)."""
    p = sum(group.count for group in groups if group.kind == "f")
    s = sum(group.count for group in groups if group.kind == "l")
    skip = max(group.skip for group in groups)
    length = max(0, starts[nth] - skip)  # the prompt of an answer is all of its document before it
    if length < p + s:
        p, s = min(p, length // 2), min(s, (length + 1) // 2)
    slots = []
    for group in groups:
        if group.count is None:
            continue
        if group.kind == "l":
            reach = 0 if nth == 0 else starts[nth - 1]
            chosen = document[max(length - s, reach) : length]
            chosen = [NONE] * (group.count - len(chosen)) + chosen
        else:
            chosen = document[:p] if group.kind == "f" else document[starts[nth] : starts[nth] + group.count]
            chosen = chosen if nth == 0 else []
            chosen = chosen + [NONE] * (group.count - len(chosen))
        slots += [(group, slot, column) for slot, column in enumerate(chosen)]
    return slots


def oracle_row(real, labels, position_ids, groups):
    """(counted, regions): one list of slots an answer; one list of columns for each open-ended group."""
    counted, prompts, generated = [], [], []
    for document in documents_of(real, position_ids):
        starts = answers_of(document, labels)
        own = [slots_of(document, starts, nth, groups) for nth in range(len(starts))]
        # What the suffix before a later answer takes belongs to the prompt, not to what was generated.
        suffix = {column for slots in own for group, _, column in slots if group.kind == "l"}
        counted += [[(g, n, NONE if g.kind == "g" and c in suffix else c) for g, n, c in slots] for slots in own]
        prompts += document[: starts[0]]
        generated += [column for column in document[starts[0] :] if column not in suffix]
    regions = [
        (group, [column if column in chosen else NONE for column in range(len(real))])
        for group in groups
        if group.count is None
        for chosen in [prompts if group.kind == "p" else generated]
    ]
    return counted, regions


def oracle(batch, groups):
    """What `resolve` must return, as nested lists; and for each group the set of (row, slot, column) that it edits."""
    real, labels, position_ids = batch
    rows = [
        oracle_row(*row, groups) for row in zip(real, labels or [None] * len(real), position_ids or [None] * len(real))
    ]
    most = max(1, *(len(counted) for counted, _ in rows))
    width = sum(group.count or 0 for group in groups)
    flat, edits = [], {group: set() for group in groups}
    for i, (counted, regions) in enumerate(rows):
        slots = [column for answer in counted for _, _, column in answer]
        slots += [NONE] * ((most - len(counted)) * width)
        for _, region in regions:
            slots += region
        flat.append(slots)
        edits_here = [entry for answer in counted for entry in answer]
        edits_here += [(group, 0, column) for group, region in regions for column in region]
        for group, slot, column in edits_here:
            if column != NONE:
                edits[group].add((i, slot, column))
    return flat, edits


# Random batches and specs.


def in_runs(rng, seq):
    """Booleans in runs of a few, as the turns of a chat are."""
    value, row = rng.random() < 0.5, []
    while len(row) < seq:
        row += [value] * rng.randint(1, 6)
        value = not value
    return row[:seq]


def random_row(rng, seq, packed):
    pads, begin = rng.randint(0, seq // 2), rng.randint(0, seq)
    real = {
        "none": [True] * seq,
        "left": [column >= pads for column in range(seq)],
        "right": [column < seq - pads for column in range(seq)],
        "holes": [rng.random() < 0.8 for _ in range(seq)],
        "only": [rng.random() < 0.1 for _ in range(seq)],
    }[rng.choice(["none", "none", "left", "left", "right", "holes", "holes", "only"])]
    supervised = {
        "one answer": [column >= begin for column in range(seq)],
        "several": in_runs(rng, seq),
        "scattered": [rng.random() < 0.5 for _ in range(seq)],
        "none": [False] * seq,
        "all": [True] * seq,
    }[rng.choice(["one answer", "one answer", "several", "several", "several", "scattered", "none", "all"])]
    labels = [7 if chosen else UNSUPERVISED for chosen in supervised]  # on padding too, where it must not count
    position_ids, position = [], 0
    for column in range(seq):
        if not real[column]:
            position_ids.append(rng.randint(0, 1))  # what padding has must not matter
            continue
        position = 0 if packed and rng.random() < 0.2 else position
        position_ids.append(position)
        position += 1
    return real, labels, position_ids


@st.composite
def batches(draw):
    """(real, labels or None, position_ids or None) as nested lists."""
    rng = draw(st.randoms(use_true_random=True))  # seeded by hypothesis, but not shrunk: rows stay varied
    seq, packed = rng.randint(1, 20), rng.random() < 0.4
    rows = [random_row(rng, seq, packed) for _ in range(rng.randint(1, 3))]
    real, labels, position_ids = ([row[part] for row in rows] for part in range(3))
    return real, labels if rng.random() < 0.8 else None, position_ids if packed or rng.random() < 0.5 else None


@st.composite
def specs(draw, kinds=("f", "l", "p", "gN", "g", "all")):
    rng = draw(st.randoms(use_true_random=True))
    covers = {"f": "f", "l": "l", "p": "fl", "gN": "g", "g": "g", "all": "flg"}
    terms, taken = [], set()
    for kind in rng.sample(kinds, rng.randint(1, len(kinds))):
        if not taken & set(covers[kind]):
            taken |= set(covers[kind])
            skip = f"~{rng.randint(1, 3)}" if kind == "l" and rng.random() < 0.3 else ""
            terms.append(kind.rstrip("N") + (str(rng.randint(1, 7)) if kind in ("f", "l", "gN") else "") + skip)
    return "+".join(terms)


def tensors(batch):
    real, labels, position_ids = batch
    return (
        torch.tensor(real),
        None if labels is None else torch.tensor(labels),
        None if position_ids is None else torch.tensor(position_ids),
    )


def edited(index):
    """The (row, column) pairs that an index edits, one list for each intervention, duplicates kept."""
    batch, seq = index.shape
    found = []
    if index.mask is not None:
        masks = index.mask if index.mask.ndim == 3 else index.mask.unsqueeze(0)
        for mask in masks:
            assert mask.shape == (batch * seq, 1)
            found.append([divmod(i, seq) for i, hit in enumerate(mask.flatten().tolist()) if hit])
        return found
    rows = index.rows if index.rows.ndim == 2 else index.rows.unsqueeze(0)
    valid = index.keep if index.keep.ndim == 3 else index.keep.unsqueeze(0)
    assert valid.shape == (*rows.shape, 1)
    assert ((rows >= 0) & (rows < batch * seq)).all()  # empty slots are gathered too
    for one_rows, one_valid in zip(rows.tolist(), valid.squeeze(-1).tolist()):
        found.append([divmod(i, seq) for i, hit in zip(one_rows, one_valid) if hit])
    return found


# The grammar.


@pytest.mark.parametrize(
    "spec, groups",
    [
        ("f7+l7", [("f", 7), ("l", 7)]),
        ("l2+f3", [("l", 2), ("f", 3)]),
        ("f12", [("f", 12)]),
        ("l1", [("l", 1)]),
        ("p", [("p", None)]),
        ("g", [("g", None)]),
        ("g64", [("g", 64)]),
        ("p+g4", [("p", None), ("g", 4)]),
        ("g+f1+l2", [("g", None), ("f", 1), ("l", 2)]),
        ("all", [("p", None), ("g", None)]),
        (" f3 +  l2 ", [("f", 3), ("l", 2)]),
        ("f007", [("f", 7)]),
        ("f1+l3~2", [("f", 1), ("l", 3)]),
    ],
)
def test_good_specs(spec, groups):
    assert [(group.kind, group.count) for group in Positions.parse(spec).groups] == groups


@pytest.mark.parametrize(
    "spec, term, at",
    [
        ("", "", 0),
        ("x3", "x3", 0),
        ("f", "f", 0),
        ("l", "l", 0),
        ("7", "7", 0),
        ("F3", "F3", 0),
        ("f-1", "f-1", 0),
        ("f3.5", "f3.5", 0),
        ("f１", "f１", 0),
        ("p3", "p3", 0),
        ("all2", "all2", 0),
        ("f3,l3", "f3,l3", 0),
        ("f3 l3", "f3 l3", 0),
        ("f7+k7", "k7", 3),
        ("f7+l7+", "", 6),
        ("f7++l7", "", 3),
        ("f3 +  last", "last", 6),
        ("f0", "f0", 0),
        ("f2+l0", "l0", 3),
        ("g00", "g00", 0),
        ("l3~0", "l3~0", 0),
        ("l3~", "l3~", 0),
        ("f1+f3~1", "f3~1", 3),
        ("g3~1", "g3~1", 0),
    ],
)
def test_bad_terms_are_pointed_at(spec, term, at):
    with pytest.raises(ValueError) as error:
        Positions.parse(spec)
    message, shown, caret = str(error.value).rsplit("\n", 2)
    indent = len(shown) - len(spec)
    assert shown == " " * indent + spec
    assert caret == " " * (indent + at) + "^" * max(1, len(term))
    assert repr(spec) in message and repr(term) in message and message.startswith("positions=")


@pytest.mark.parametrize(
    "spec, term, other",
    [
        ("f3+f5", "f5", "f3"),
        ("l1+f2+l1", "l1", "l1"),
        ("p+f2", "f2", "p"),
        ("l2+p", "p", "l2"),
        ("p+p", "p", "p"),
        ("g+g3", "g3", "g"),
        ("g3+g", "g", "g3"),
        ("all+g1", "g1", "g"),
        ("all+p", "p", "p"),
        ("f4+all", "all", "f4"),
        ("g2+all", "all", "g2"),
        ("all+all", "all", "p"),
    ],
)
def test_overlapping_groups_are_refused(spec, term, other):
    with pytest.raises(ValueError, match=f"'{term}' overlaps '{other}'") as error:
        Positions.parse(spec)
    shown, caret = str(error.value).splitlines()[-2:]
    assert shown[caret.index("^") :] == term
    assert caret.count("^") == len(term)


@pytest.mark.parametrize("spec", [None, 7, ["f7"], b"f7"])
def test_a_spec_is_a_string(spec):
    with pytest.raises(ValueError, match="positions must be a string") as error:
        Positions.parse(spec)
    assert repr(spec) in str(error.value) and "fN" in str(error.value)


@settings(deadline=None, max_examples=50)
@given(specs())
def test_a_spec_survives_str(spec):
    parsed = Positions.parse(spec)
    assert Positions.parse(str(parsed)) == parsed
    assert str(parsed) == spec.replace("all", "p+g")
    assert str(parsed) == "+".join(str(group) for group in parsed.groups)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("f7+l7", "the first 7 and the last 7 tokens of the prompt"),
        ("l2+f3", "the first 3 and the last 2 tokens of the prompt"),
        ("f5", "the first 5 tokens of the prompt"),
        ("l5", "the last 5 tokens of the prompt"),
        ("f2+l1", "the first 2 and the last token of the prompt"),
        ("f1+l2", "the first and the last 2 tokens of the prompt"),
        ("p", "all tokens of the prompt"),
        ("g", "all generated tokens"),
        ("g4", "the first 4 generated tokens"),
        ("all", "all tokens of the prompt and all generated tokens"),
        ("l1~1", "the last token of the prompt without its last token"),
        ("f2+l2~3", "the first 2 and the last 2 tokens of the prompt without its last 3 tokens"),
        ("f2+l3+g", "the first 2 and the last 3 tokens of the prompt and all generated tokens"),
    ],
)
def test_describe(spec, words):
    assert Positions.parse(spec).describe() == words


@pytest.mark.parametrize(
    "spec, counted",
    [("f3", True), ("l3", True), ("f3+l3", True), ("p", False), ("g3", True), ("f3+g", False), ("all", False)],
)
def test_counted(spec, counted):
    assert Positions.parse(spec).counted is counted


def test_union_has_each_group_once_in_order_of_appearance():
    layout = union(Positions.parse(spec) for spec in ["f5", "l5+g", "f2+l5", "f5"])
    assert [str(group) for group in layout] == ["f5", "l5", "g", "f2", "l5"]
    assert layout[1] != layout[4], "an l5 alone is cut otherwise than one beside an f2"


# Worked examples, readable by eye.

U, S = UNSUPERVISED, 7


@pytest.mark.parametrize(
    "spec, mask, labels, expected",
    [
        ("f2+l2", [1] * 7, None, [0, 1, 5, 6]),
        ("f2+l2", [1] * 7, [U] * 5 + [S, S], [0, 1, 3, 4]),
        ("l2+f2", [1] * 7, [U] * 5 + [S, S], [3, 4, 0, 1]),
        ("f2+l2", [0, 0, 1, 1, 1, 1, 1], None, [2, 3, 5, 6]),
        ("f2+l2", [1, 1, 1, 1, 1, 0, 0], None, [0, 1, 3, 4]),
        ("f2+l2", [1, 0, 1, 1, 0, 1, 1], [U] * 5 + [U, S], [0, 2, 3, 5]),
        # short prompts: L = 3, 2, 1, 0 of p = 2, s = 2
        ("f2+l2", [1] * 4, [U, U, U, S], [0, -1, 1, 2]),
        ("f2+l2", [1] * 4, [U, U, S, S], [0, -1, -1, 1]),
        ("f2+l2", [1] * 4, [U, S, S, S], [-1, -1, -1, 0]),
        ("f2+l2", [1] * 4, [S, S, S, S], [-1, -1, -1, -1]),
        ("f3+l1", [1] * 4, None, [0, 1, 2, 3]),
        ("f3+l1", [1] * 3, None, [0, -1, -1, 2]),
        ("f1+l3", [1] * 3, None, [0, -1, 1, 2]),
        ("f4", [1] * 4, None, [0, 1, 2, 3]),
        ("f4", [1] * 3, None, [0, -1, -1, -1]),
        ("l4", [1] * 3, None, [-1, -1, 1, 2]),
        # without the last tokens of the prompt
        ("l1~1", [1] * 4, None, [2]),
        ("l2~1", [1] * 4, [U, U, U, S], [0, 1]),
        ("f2+l2~1", [1] * 5, None, [0, 1, 2, 3]),
        ("f2+l2~1", [1] * 4, None, [0, -1, 1, 2]),
        ("l1~3", [1] * 3, None, [-1]),
        ("l2~1", [1] * 7, [U, U, U, U, S, U, S], [1, 2, -1, 4]),
        ("l1~1+g", [1] * 5, [U, U, U, S, S], [1, -1, -1, -1, 3, 4]),
        # several turns: no prefix again; a suffix of the second answer stops where the first answer begins
        ("f1+l2", [1] * 8, [U, U, U, S, U, U, U, S], [0, 1, 2, -1, 5, 6]),
        ("f1+l3", [1] * 7, [U, U, U, U, S, U, S], [0, 1, 2, 3, -1, -1, 4, 5]),
        ("l1+g2", [1] * 6, [U, U, S, U, U, S], [1, 2, 3, 4, -1, -1]),
        ("g3", [1] * 5, [U, U, U, S, S], [3, 4, -1]),
        ("g2", [1] * 4, None, [-1, -1]),
        ("p", [0, 1, 1, 1, 1], [U, U, U, S, S], [-1, 1, 2, -1, -1]),
        ("g", [0, 1, 1, 1, 0], [U, U, S, U, S], [-1, -1, 2, 3, -1]),
        ("f1+g", [1] * 4, [U, U, S, S], [0, -1, -1, 2, 3]),
        ("all", [1, 1, 1, 0], [U, U, S, U], [0, 1, -1, -1, -1, -1, 2, -1]),
    ],
)
def test_examples(spec, mask, labels, expected):
    answers = find_answers(torch.tensor([mask]).bool(), None if labels is None else torch.tensor([labels]))
    assert resolve(Positions.parse(spec).groups, answers).tolist() == [expected]


def test_each_document_of_a_packed_row_has_its_own_prompt():
    real = torch.ones(1, 9, dtype=torch.bool)
    labels = torch.tensor([[U, U, U, S, U, U, S, U, U]])
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    slots = resolve(Positions.parse("f1+l1").groups, find_answers(real, labels, position_ids))
    assert slots.tolist() == [[0, 2, 4, 5, 7, 8]]


# Against the oracle.


@settings(deadline=None, max_examples=600)
@given(batches(), specs())
def test_resolve_agrees_with_the_oracle(batch, spec):
    groups = Positions.parse(spec).groups
    expected, _ = oracle(batch, groups)
    slots = resolve(groups, find_answers(*tensors(batch)))
    assert slots.dtype == torch.int64
    assert slots.tolist() == expected


@settings(deadline=None, max_examples=50)
@given(batches(), specs())
def test_a_known_number_of_answers_gives_the_same(batch, spec):
    """One answer wanted: the first of each row, with as many slots. One more than there are: empty slots."""
    groups = Positions.parse(spec).groups
    real, labels, position_ids = tensors(batch)
    read = resolve(groups, find_answers(real, labels, position_ids))
    width, open_columns = sum(g.count or 0 for g in groups), sum(g.count is None for g in groups) * real.shape[1]
    counted = read.shape[1] - open_columns
    most = counted // width if width else 1
    one = resolve(groups, find_answers(real, labels, position_ids, count=1))
    if not {"l", "g"} <= {group.kind for group in groups}:  # generated tokens must know of the suffixes between them
        assert torch.equal(one, torch.cat([read[:, :width], read[:, counted:]], 1))
    more = resolve(groups, find_answers(real, labels, position_ids, count=most + 1))
    assert torch.equal(
        more, torch.cat([read[:, :counted], torch.full((len(real), width), NONE), read[:, counted:]], 1)
    )


@settings(deadline=None, max_examples=100)
@given(batches(), specs(kinds=("f", "l", "gN")), st.sampled_from(["all", "group", "position"]))
def test_arrange_of_counted_groups(batch, spec, by):
    groups = Positions.parse(spec).groups
    _, edits = oracle(batch, groups)
    real, labels, position_ids = tensors(batch)
    slots = resolve(groups, find_answers(real, labels, position_ids))
    index = arrange(slots, real.shape[1], groups, groups, by)
    expected = {
        "all": [{(row, column) for group in groups for row, _, column in edits[group]}],
        "group": [{(row, column) for row, _, column in edits[group]} for group in groups],
        "position": [
            {(row, column) for row, at, column in edits[group] if at == slot}
            for group in groups
            for slot in range(group.count)
        ],
    }[by]
    assert index.mask is None and index.shape == tuple(real.shape)
    assert [set(found) for found in edited(index)] == expected


@settings(deadline=None, max_examples=100)
@given(batches(), specs().filter(lambda spec: not Positions.parse(spec).counted), st.sampled_from(["all", "group"]))
def test_arrange_of_open_ended_groups(batch, spec, by):
    groups = Positions.parse(spec).groups
    _, edits = oracle(batch, groups)
    real, labels, position_ids = tensors(batch)
    slots = resolve(groups, find_answers(real, labels, position_ids))
    index = arrange(slots, real.shape[1], groups, groups, by)
    expected = [{(row, column) for row, _, column in edits[group]} for group in groups]
    assert index.rows is None and torch.equal(index.keep, index.mask.float())
    assert [set(found) for found in edited(index)] == ([set().union(*expected)] if by == "all" else expected)


@settings(deadline=None, max_examples=100)
@given(batches(), st.lists(specs(), min_size=1, max_size=3), st.sampled_from(["all", "group"]))
def test_arrange_picks_the_groups_of_a_layer(batch, texts, by):
    """Specs that differ by layer share one slot tensor; each layer takes its own groups out of it."""
    real, labels, position_ids = tensors(batch)
    layer_specs = [Positions.parse(text) for text in texts]
    layout = union(layer_specs)
    slots = resolve(layout, find_answers(real, labels, position_ids))
    for spec in layer_specs:
        _, edits = oracle(batch, spec.groups)
        index = arrange(slots, real.shape[1], layout, spec.groups, by)
        expected = [{(row, column) for row, _, column in edits[group]} for group in spec.groups]
        assert [set(found) for found in edited(index)] == ([set().union(*expected)] if by == "all" else expected)


@pytest.mark.parametrize(
    "texts", [("f5", "l5", "f2+l3"), ("f5", "l5"), ("l5", "f2+l5"), ("f6+l6", "f2+l2")], ids=" | ".join
)
def test_a_short_prompt_is_cut_by_the_spec_of_the_layer_alone(texts):
    """What other layers edit must not change what this one does: L < p + s has the p and s of its own spec."""
    layer_specs = [Positions.parse(text) for text in texts]
    layout = union(layer_specs)
    for length in range(1, 13):
        real = torch.ones(1, length, dtype=torch.bool)
        slots = resolve(layout, find_answers(real))
        for spec in layer_specs:
            _, edits = oracle((real.tolist(), None, None), spec.groups)
            index = arrange(slots, length, layout, spec.groups, "group")
            expected = [{(row, column) for row, _, column in edits[group]} for group in spec.groups]
            assert [set(found) for found in edited(index)] == expected, f"{spec}, L = {length}"


@settings(deadline=None, max_examples=100)
@given(batches(), specs(), st.sampled_from(["all", "group"]))
def test_a_token_is_edited_once(batch, spec, by):
    groups = Positions.parse(spec).groups
    real, labels, position_ids = tensors(batch)
    slots = resolve(groups, find_answers(real, labels, position_ids))
    found = [pair for one in edited(arrange(slots, real.shape[1], groups, groups, by)) for pair in one]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("spec, by", [("l2+g5", "all"), ("l2+g5", "group"), ("l2+g5", "position"), ("l2+g", "group")])
def test_a_token_before_a_later_answer_is_edited_once(spec, by):
    """In a chat the suffix before the second answer lies behind the first one: it is prompt, not generated."""
    groups = Positions.parse(spec).groups
    labels = torch.tensor([[U, U, U, S, U, U, S]])
    slots = resolve(groups, find_answers(torch.ones(1, 7, dtype=torch.bool), labels))
    found = [pair for one in edited(arrange(slots, 7, groups, groups, by)) for pair in one]
    assert {column for _, column in found} == {1, 2, 3, 4, 5, 6}
    assert len(found) == len(set(found))


@settings(deadline=None, max_examples=50)
@given(specs(kinds=("f", "l", "p")), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3), st.integers(0, 3))
def test_training_edits_what_generation_edits(spec, prompt, completion, left, right):
    """A prompt with its supervised completion and the prompt alone, each with padding of its own."""
    groups = Positions.parse(spec).groups
    trained = torch.tensor([[False] * left + [True] * (prompt + completion) + [False] * right])
    labels = torch.full(trained.shape, UNSUPERVISED)
    labels[0, left + prompt : left + prompt + completion] = S
    alone = torch.tensor([[False] * right + [True] * prompt])

    def columns(real, labels):
        slots = resolve(groups, find_answers(real, labels))
        return {column for _, column in edited(arrange(slots, real.shape[1], groups, groups, "all"))[0]}

    assert {column - left for column in columns(trained, labels)} == {
        column - right for column in columns(alone, None)
    }


# Slots given by the caller.


@pytest.mark.parametrize("spec", ["f2+l2", "f1", "g3", "p", "f1+g", "all"])
@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(-1, 5), min_size=5, max_size=5), min_size=1, max_size=3), st.integers(1, 5))
def test_a_flat_list_of_any_length_is_taken_as_it_stands(spec, rows, width):
    groups = Positions.parse(spec).groups
    slots = torch.tensor(rows)[:, :width]
    index = arrange(slots, 6, groups, groups, "all")
    expected = {(i, column) for i, row in enumerate(slots.tolist()) for column in row if column >= 0}
    assert [set(found) for found in edited(index)] == [expected]


@pytest.mark.parametrize("spec", ["f2+l2", "p"])
def test_a_flat_list_may_be_empty(spec):
    groups = Positions.parse(spec).groups
    assert edited(arrange(torch.empty(2, 0, dtype=torch.long), 6, groups, groups, "all")) == [[]]


@pytest.mark.parametrize(
    "layout, groups, by, slots",
    [
        ("f2+l2", "f2+l2", "group", 3),
        ("f2+l2", "f2+l2", "position", 5),
        ("f2+l2", "f2", "all", 6),
        ("f2+g", "f2+g", "group", 5),  # 6 columns for g alone
        ("f2+g", "f2+g", "group", 7),
        ("f2+g", "f2", "all", 9),
        ("p+g", "p+g", "group", 13),
        ("p+g", "p", "all", 18),
    ],
)
def test_slots_that_do_not_fit_the_layout(layout, groups, by, slots):
    layout, groups = Positions.parse(layout).groups, Positions.parse(groups).groups
    with pytest.raises(ValueError, match=f"intervention_positions has {slots} slots a row") as error:
        arrange(torch.zeros(2, slots, dtype=torch.long), 6, layout, groups, by)
    assert "+".join(map(str, layout)) in str(error.value)
    assert f"expected a multiple of {sum(group.count or 0 for group in layout)}" in str(error.value)


def test_a_stand_in_belongs_to_the_same_row():
    """An empty slot is gathered too; from another row it would mix examples, from padding it might be NaN."""
    slots = torch.tensor([[2, -1, 3], [-1, 4, -1]])
    groups = Positions.parse("f1+l2").groups
    for by in ("all", "group", "position"):
        index = arrange(slots, 5, groups, groups, by)
        real = {2, 3, 5 + 4}
        assert set(index.rows.flatten().tolist()) <= real
        per_row = index.rows.reshape(-1, 2, index.rows.shape[-1] // 2) // 5
        assert (per_row == torch.tensor([0, 1]).view(1, 2, 1)).all()


def test_slots_of_a_group_stay_in_answer_order():
    """`count` interventions side by side see (row, answer, slot) in one order, so that shapes are static."""
    groups = Positions.parse("f1+l2").groups
    slots = torch.tensor([[0, 2, 3, -1, 5, 6]])
    assert edited(arrange(slots, 8, groups, groups, "group")) == [[(0, 0)], [(0, 2), (0, 3), (0, 5), (0, 6)]]
    assert edited(arrange(slots, 8, groups, groups, "position")) == [[(0, 0)], [(0, 2), (0, 5)], [(0, 3), (0, 6)]]


@pytest.mark.parametrize("spec", ["f2+l2", "p+g2", "l1+g", "all"])
def test_nothing_is_read_by_the_host(spec):
    """With the number of answers known, shapes are static: a tensor without data goes through."""
    groups = Positions.parse(spec).groups
    with FakeTensorMode():
        real = torch.ones(2, 8, dtype=torch.bool)
        answers = find_answers(real, torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long), count=1)
        slots = resolve(groups, answers)
        index = arrange(slots, 8, groups, groups, "group")
    width = sum(g.count or 0 for g in groups) + 8 * sum(g.count is None for g in groups)
    assert slots.shape == (2, width)
    assert (index.mask if index.rows is None else index.rows).shape[0] == len(groups)


@settings(deadline=None, max_examples=50)
@given(batches())
def test_answers_are_ordered(batch):
    """Answers of a row stand in order, each with its document around it."""
    answers = find_answers(*tensors(batch))
    for row in range(len(batch[0])):
        exists = [k for k in range(answers.ends.shape[1]) if answers.document_ends[row, k] > 0]
        assert exists == list(range(len(exists)))
        for k in exists:
            bounds = (answers.starts, answers.lower, answers.ends, answers.document_ends)
            values = [int(bound[row, k]) for bound in bounds]
            assert values == sorted(values)
        for before, after in pairwise(exists):
            assert answers.ends[row, before] <= answers.ends[row, after]
