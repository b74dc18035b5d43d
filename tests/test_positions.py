"""Positions against a naive oracle: plain loops over the tokens of one row, written from the contract (design, 4)."""

from itertools import pairwise

import pytest
import torch
from chats import CHATML, NONE, RESPONSE, STABLE, TOOL, UNSUPERVISED, USER, Rows, batches, oracle, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_reft import Positions
from peft_reft.positions.index import make_index
from peft_reft.positions.resolve import find_answers, find_turns, resolve
from peft_reft.positions.spec import union


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
    valid = index.valid if index.valid.ndim == 3 else index.valid.unsqueeze(0)
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
    assert [(group.letter, group.count) for group in Positions.parse(spec).groups] == groups


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
        ("l2~1", [1] * 7, [U, U, U, U, S, U, S], [1, 2]),
        ("l1~1+g", [1] * 5, [U, U, U, S, S], [1, -1, -1, -1, 3, 4]),
        # a token of the answer that is not trained on makes no new answer
        ("f1+l2", [1] * 8, [U, U, U, S, U, U, U, S], [0, 1, 2]),
        ("f1+l3", [1] * 7, [U, U, U, U, S, U, S], [0, 1, 2, 3]),
        ("l1+g2", [1] * 6, [U, U, S, U, U, S], [1, 2, 3]),
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


@pytest.mark.parametrize(
    "spec, ids, expected",
    [
        # 0-1 user, 2 text, 3-4 assistant, 5 the answer; 6-7 user, 8-9 text, 10-11 assistant, 12-14 the answer
        ("f1+l2", [*USER, 1, *STABLE, 2, *USER, 3, 4, *STABLE, 5, 6, 7], [0, 3, 4, -1, 10, 11]),
        ("l2~1", [*USER, 1, *STABLE, 2, *USER, 3, 4, *STABLE, 5, 6, 7], [2, 3, 9, 10]),
        ("l1+g2", [*USER, 1, *STABLE, 2, *USER, 3, 4, *STABLE, 5, 6, 7], [4, 5, -1, 11, 12, 13]),
        ("g", [*USER, *STABLE, 2, *USER, *STABLE, 5], [-1] * 4 + [4] + [-1] * 4 + [9]),
        ("p", [*USER, *STABLE, 2, *USER, *STABLE, 5], [0, 1, 2, 3, -1, 5, 6, 7, 8, -1]),
        # the suffix of a later answer stops where its own prompt begins; only the first prompt is halved
        ("f1+l3", [*USER, *STABLE, 2, *USER, *STABLE], [0, 1, 2, 3, -1, 6, 7, 8]),
        ("f4+l4", [*USER, *STABLE, 2, 2, *USER, *STABLE], [0, 1, -1, -1, -1, -1, 2, 3] + [-1] * 4 + [6, 7, 8, 9]),
        ("l6", [*USER, 1, 1, *STABLE, 2, *USER, *STABLE], [0, 1, 2, 3, 4, 5, -1, -1, 7, 8, 9, 10]),
        ("l2~2", [*USER, *STABLE, 2, 7, *USER, *STABLE], [0, 1, 6, 7]),
        ("l2~3", [*USER, *STABLE, 2, 7, *USER, *STABLE], [-1, 0, -1, 6]),
        # the longest header counts; a tail that merged with the answer is answer
        ("l1+g1", [*USER, *RESPONSE, 2], [4, 5]),
        ("l1+g1", [*USER, *STABLE, 2], [3, 4]),
        # messages of the assistant that follow each other are one answer; results of several tools end it
        ("l1+g3", [*USER, *STABLE, 2, *STABLE, 3], [3, 4, 5, 6]),
        ("l1+g1", [*USER, *STABLE, 2, *TOOL, *TOOL, *STABLE], [3, 4, 10, -1]),
        # an answer that starts where another's header begins is empty
        ("l2+g2", [*USER, *STABLE, *USER, *STABLE, 2], [2, 3, -1, -1, 6, 7, 8, -1]),
        # behind the last answer `p` edits at once, `l` waits
        ("p", [*STABLE, 2, *USER, 3], [0, 1, -1, 3, 4, 5]),
        ("l3", [*STABLE, 2, *USER, 3], [-1, -1, 1]),
        # no header: one prompt. A header of the user alone is none
        ("l2+g2", [1, 2, 3], [1, 2, -1, -1]),
        ("l2+g", [*USER, 3], [1, 2, -1, -1, -1]),
    ],
)
def test_examples_of_chats(spec, ids, expected):
    rows = Rows(real=[[True] * len(ids)], ids=[ids], marks=CHATML)
    assert resolve(Positions.parse(spec).groups, rows.turns().answers()).tolist() == [expected]
    left = Rows(real=[[False] * 2 + [True] * len(ids)], ids=[[0, 0, *ids]], marks=CHATML)
    if Positions.parse(spec).counted:
        shifted = [column if column < 0 else column + 2 for column in expected]
        assert resolve(Positions.parse(spec).groups, left.turns().answers()).tolist() == [shifted]


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
    slots = resolve(groups, batch.turns().answers())
    assert slots.dtype == torch.int64
    assert slots.tolist() == expected


@settings(deadline=None, max_examples=50)
@given(batches(), specs())
def test_a_known_number_of_answers_gives_the_same(batch, spec):
    """One answer wanted: the first of each row, with as many slots. One more than there are: empty slots."""
    groups = Positions.parse(spec).groups
    turns, rows, seq = batch.turns(), len(batch.real), len(batch.real[0])
    read = resolve(groups, turns.answers())
    width, open_columns = sum(g.count or 0 for g in groups), sum(g.count is None for g in groups) * seq
    counted = read.shape[1] - open_columns
    most = counted // width if width else 1
    assert torch.equal(resolve(groups, turns.answers(most)), read) or not width
    one = resolve(groups, turns.answers(1))
    if most == 1 or not any(group.letter == "g" and group.count for group in groups):  # which the next answer limits
        assert torch.equal(one, torch.cat([read[:, :width], read[:, counted:]], 1))
    more = resolve(groups, turns.answers(most + 1))
    assert torch.equal(more, torch.cat([read[:, :counted], torch.full((rows, width), NONE), read[:, counted:]], 1))


@settings(deadline=None, max_examples=100)
@given(batches(), specs(kinds=("f", "l", "gN")), st.sampled_from(["all", "group", "position"]))
def test_arrange_of_counted_groups(batch, spec, by):
    groups = Positions.parse(spec).groups
    _, edits = oracle(batch, groups)
    slots = resolve(groups, batch.turns().answers())
    index = make_index(slots, len(batch.real[0]), groups, groups, by)
    expected = {
        "all": [{(row, column) for group in groups for row, _, column in edits[group]}],
        "group": [{(row, column) for row, _, column in edits[group]} for group in groups],
        "position": [
            {(row, column) for row, at, column in edits[group] if at == slot}
            for group in groups
            for slot in range(group.count)
        ],
    }[by]
    assert index.mask is None and index.shape == (len(batch.real), len(batch.real[0]))
    assert [set(found) for found in edited(index)] == expected


@settings(deadline=None, max_examples=100)
@given(batches(), specs().filter(lambda spec: not Positions.parse(spec).counted), st.sampled_from(["all", "group"]))
def test_arrange_of_open_ended_groups(batch, spec, by):
    groups = Positions.parse(spec).groups
    _, edits = oracle(batch, groups)
    slots = resolve(groups, batch.turns().answers())
    index = make_index(slots, len(batch.real[0]), groups, groups, by)
    expected = [{(row, column) for row, _, column in edits[group]} for group in groups]
    assert index.rows is None and torch.equal(index.valid, index.mask.float())
    assert [set(found) for found in edited(index)] == ([set().union(*expected)] if by == "all" else expected)


@settings(deadline=None, max_examples=100)
@given(batches(), st.lists(specs(), min_size=1, max_size=3), st.sampled_from(["all", "group"]))
def test_arrange_picks_the_groups_of_a_layer(batch, texts, by):
    """Specs that differ by layer share one slot tensor; each layer takes its own groups out of it."""
    layer_specs = [Positions.parse(text) for text in texts]
    layout = union(layer_specs)
    slots = resolve(layout, batch.turns().answers())
    for spec in layer_specs:
        _, edits = oracle(batch, spec.groups)
        index = make_index(slots, len(batch.real[0]), layout, spec.groups, by)
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
            _, edits = oracle(Rows(real=real.tolist(), ids=[[3] * length]), spec.groups)
            index = make_index(slots, length, layout, spec.groups, "group")
            expected = [{(row, column) for row, _, column in edits[group]} for group in spec.groups]
            assert [set(found) for found in edited(index)] == expected, f"{spec}, L = {length}"


@settings(deadline=None, max_examples=100)
@given(batches(), specs(), st.sampled_from(["all", "group"]))
def test_a_token_is_edited_once(batch, spec, by):
    groups = Positions.parse(spec).groups
    slots = resolve(groups, batch.turns().answers())
    found = [pair for one in edited(make_index(slots, len(batch.real[0]), groups, groups, by)) for pair in one]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("spec, by", [("l2+g5", "all"), ("l2+g5", "group"), ("l2+g5", "position"), ("l2+g", "group")])
def test_a_token_before_a_later_answer_is_edited_once(spec, by):
    """In a chat the suffix before the second answer lies behind the first one: it is prompt, not generated."""
    groups = Positions.parse(spec).groups
    ids = [1, *STABLE, 2, 3, *USER, *STABLE, 4]
    slots = resolve(groups, Rows(real=[[True] * 10], ids=[ids], marks=CHATML).turns().answers())
    found = [pair for one in edited(make_index(slots, 10, groups, groups, by)) for pair in one]
    assert {column for _, column in found} == {1, 2, 3, 4, 7, 8, 9}
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
        return {column for _, column in edited(make_index(slots, real.shape[1], groups, groups, "all"))[0]}

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
    index = make_index(slots, 6, groups, groups, "all")
    expected = {(i, column) for i, row in enumerate(slots.tolist()) for column in row if column >= 0}
    assert [set(found) for found in edited(index)] == [expected]


@pytest.mark.parametrize("spec", ["f2+l2", "p"])
def test_a_flat_list_may_be_empty(spec):
    groups = Positions.parse(spec).groups
    assert edited(make_index(torch.empty(2, 0, dtype=torch.long), 6, groups, groups, "all")) == [[]]


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
        make_index(torch.zeros(2, slots, dtype=torch.long), 6, layout, groups, by)
    assert "+".join(map(str, layout)) in str(error.value)
    assert f"expected a multiple of {sum(group.count or 0 for group in layout)}" in str(error.value)


def test_a_stand_in_belongs_to_the_same_row():
    """An empty slot is gathered too; from another row it would mix examples, from padding it might be NaN."""
    slots = torch.tensor([[2, -1, 3], [-1, 4, -1]])
    groups = Positions.parse("f1+l2").groups
    for by in ("all", "group", "position"):
        index = make_index(slots, 5, groups, groups, by)
        real = {2, 3, 5 + 4}
        assert set(index.rows.flatten().tolist()) <= real
        per_row = index.rows.reshape(-1, 2, index.rows.shape[-1] // 2) // 5
        assert (per_row == torch.tensor([0, 1]).view(1, 2, 1)).all()


def test_slots_of_a_group_stay_in_answer_order():
    """`count` interventions side by side see (row, answer, slot) in one order, so that shapes are static."""
    groups = Positions.parse("f1+l2").groups
    slots = torch.tensor([[0, 2, 3, -1, 5, 6]])
    assert edited(make_index(slots, 8, groups, groups, "group")) == [[(0, 0)], [(0, 2), (0, 3), (0, 5), (0, 6)]]
    assert edited(make_index(slots, 8, groups, groups, "position")) == [[(0, 0)], [(0, 2), (0, 5)], [(0, 3), (0, 6)]]


@pytest.mark.parametrize("spec", ["f2+l2", "p+g2", "l1+g", "all"])
def test_nothing_is_read_by_the_host(spec):
    """With the number of answers known, shapes are static: a tensor without data goes through."""
    groups = Positions.parse(spec).groups
    with FakeTensorMode():
        real = torch.ones(2, 8, dtype=torch.bool)
        answers = find_answers(real, torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long), count=1)
        slots = resolve(groups, answers)
        index = make_index(slots, 8, groups, groups, "group")
        ids = torch.zeros(2, 8, dtype=torch.long)
        by_marks = find_turns(real, None, ids, ids, CHATML, torch.zeros_like(real)).answers(3)
        slots_of_three = resolve(groups, by_marks)
    width, open_columns = sum(g.count or 0 for g in groups), 8 * sum(g.count is None for g in groups)
    assert slots.shape == (2, width + open_columns)
    assert slots_of_three.shape == (2, 3 * width + open_columns)
    assert (index.mask if index.rows is None else index.rows).shape[0] == len(groups)


@settings(deadline=None, max_examples=100)
@given(batches())
def test_answers_are_ordered(batch):
    """Answers of a row stand in order, each behind its own prompt, and neither crosses the next."""
    answers = batch.turns().answers()
    for row in range(len(batch.real)):
        bounds = (answers.starts, answers.lower, answers.ends, answers.stops)
        exists = [k for k in range(answers.ends.shape[1]) if answers.first[row, k] or answers.ends[row, k] > 0]
        exists = [k for k in exists if any(batch.real[row])]
        assert exists == list(range(len(exists)))
        for k in exists:
            values = [int(bound[row, k]) for bound in bounds]
            assert values == sorted(values)
            assert values[-1] <= sum(batch.real[row])
        for before, after in pairwise(exists):
            assert answers.stops[row, before] <= answers.lower[row, after]
            same = answers.starts[row, before] == answers.starts[row, after]
            assert bool(answers.first[row, after]) != bool(same)
        if exists:
            assert answers.first[row, 0]
