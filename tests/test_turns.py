"""Prompts and answers of a document, told in three ways that are one; and what is refused or warned of."""

import warnings

import pytest
import torch
from chats import (
    CHATML,
    ENTANGLED,
    RESPONSE,
    STABLE,
    TOOL,
    UNSUPERVISED,
    USER,
    Rows,
    batches,
    documents_of,
    header_at,
    oracle,
    random_chat,
    specs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_reft
from peft_reft import Positions
from peft_reft.positions import turns as plain
from peft_reft.positions.batch import Batch
from peft_reft.positions.generation import GenerateStep, Generation
from peft_reft.positions.index import make_index
from peft_reft.positions.marks import Marks
from peft_reft.positions.resolve import resolve
from peft_reft.positions.sources import FromBatch
from peft_reft.positions.wanted import Wanted

U = UNSUPERVISED


def wanted(spec, marks=None, tie="layer"):
    groups = Positions.parse(spec).groups
    everything = tie == "layer" and {"p", "g"} <= {group.letter for group in groups if group.count is None}
    return Wanted(groups, marks, everything)


def columns(slots, seq, groups):
    """The columns of each row that are edited."""
    index = make_index(slots, seq, groups, groups, "all")
    edited = index.edited.view(index.shape).tolist()
    return [{column for column, hit in enumerate(row) if hit} for row in edited]


# One rule, told in three ways


@settings(deadline=None, max_examples=300)
@given(batches(), specs())
def test_every_row_is_read_by_itself(rows, spec):
    """Batch mates and the padding that they bring change nothing."""
    groups = Positions.parse(spec).groups
    _, edits = oracle(rows, groups)
    together = columns(resolve(groups, rows.turns().answers()), len(rows.real[0]), groups)
    for number in range(len(rows.real)):
        alone = Rows(*(None if part is None else [part] for part in vars(rows.row(number)).values()))
        alone.marks = rows.marks
        found = columns(resolve(groups, alone.turns().answers()), len(rows.real[0]), groups)[0]
        assert found == together[number] == {c for group in groups for row, _, c in edits[group] if row == number}


@settings(deadline=None, max_examples=300)
@given(batches(marks=(CHATML, CHATML, ENTANGLED)))
def test_tensors_find_the_answers_that_the_plain_rule_finds(rows):
    """`turns.answers_of`, by which a server schedules, on the ids of each document."""
    rows.labels = rows.answer_at = None
    answers = rows.turns().answers()
    for number in range(len(rows.real)):
        row, expected, ranks = rows.row(number), [], 0
        for document in documents_of(row):
            ids = [row.ids[column] for column in document]
            if document != list(range(document[0], document[0] + len(document))):
                return  # a hole of padding breaks a header, which the plain rule is never shown
            found = plain.answers_of(ids, rows.marks.response, rows.marks.instruction)
            has_header = any(header_at(row, document, i, rows.marks.response) for i in range(len(ids)))
            assert bool(found) == has_header
            expected += [(ranks + start, ranks + end) for start, end in found or [(len(ids), len(ids))]]
            ranks += len(document)
        ends, stops = answers.ends[number].tolist(), answers.stops[number].tolist()
        assert list(zip(ends, stops))[: len(expected)] == expected
        assert not any(ends[len(expected) :]) and not any(stops[len(expected) :])


@settings(deadline=None, max_examples=300)
@given(st.randoms(use_true_random=True), st.integers(0, 4))
def test_what_follows_what_was_given_is_answer(rng, pads):
    """`given` of the plain rule, and `answer_at` of the tensors."""
    ids = random_chat(rng)
    given_tokens = rng.randint(0, len(ids))
    written = [rng.randrange(9) for _ in range(rng.randint(1, 4))]
    document = ids[:given_tokens] + written
    expected = plain.answers_of(document, CHATML.response, CHATML.instruction, given_tokens)
    assert expected[-1][1] == len(document)
    turns = Rows(
        real=[[False] * pads + [True] * len(document)],
        ids=[[0] * pads + document],
        answer_at=[[column == pads + given_tokens for column in range(pads + len(document))]],
        marks=CHATML,
    ).turns()
    answers = turns.answers()
    assert list(zip(answers.ends[0].tolist(), answers.stops[0].tolist())) == expected
    assert turns.answer[0].sum() == sum(end - start for start, end in expected)


@pytest.mark.parametrize("response", [(), [[]]], ids=["none", "an empty one"])
def test_without_a_response_template_there_are_no_answers(response):
    assert plain.answers_of([*USER, 1, *RESPONSE], response, CHATML.instruction) == []


def test_a_mark_counts_in_its_own_document_alone():
    turns = Rows(
        real=[[True] * 9],
        ids=[[1, *STABLE, 2, 1, 2, 90, 91, 3]],
        position_ids=[[0, 1, 2, 3, 0, 1, 2, 0, 1]],
        marks=CHATML,
    ).turns()
    assert turns.marked.tolist() == [[True] * 4 + [False] * 5]  # the second header is cut by a document's beginning


def test_spans_of_labels_are_counted_by_document():
    labels = [[U, 7, U, 7, U, U, 7, 7, U]]
    turns = Rows(real=[[True] * 9], ids=[[1] * 9], position_ids=[[0, 1, 2, 3, 4, 0, 1, 2, 3]], labels=labels).turns()
    assert turns.spans.tolist() == [[2] * 5 + [1] * 4]
    masked = Rows(real=[[True, True, False, True]], ids=[[1] * 4], labels=[[U, 7, U, 7]]).turns()
    assert masked.spans.tolist() == [[1] * 4], "padding inside an answer is no gap"


# What is edited in a conversation's beginning never changes as it goes on


def beginnings(rng, ids):
    """(length, given): of moments at which the model is asked, or has written a part of its answer."""
    spans = plain.answers_of(ids, CHATML.response, CHATML.instruction)
    templates = [list(template) for template in (*CHATML.response, *CHATML.instruction)]
    splits = {i + k for t in templates for i in range(len(ids)) if ids[i : i + len(t)] == t for k in range(1, len(t))}
    for start, end in spans:
        for length in range(start, end + 1):
            if length not in splits:
                yield length, rng.randint(start, length)


@settings(deadline=None, max_examples=60)
@given(st.randoms(use_true_random=True), specs(), st.integers(0, 3))
def test_one_teacher_forced_row_edits_what_generate_edits_at_each_turn(rng, spec, pads):
    groups, ids = Positions.parse(spec).groups, random_chat(rng)
    whole = Rows(real=[[True] * len(ids)], ids=[ids], marks=CHATML)
    edited = columns(resolve(groups, whole.turns().answers()), len(ids), groups)[0]
    for length, given_tokens in rng.sample(moments := list(beginnings(rng, ids)), min(6, len(moments))):
        real = torch.tensor([[False] * pads + [True] * given_tokens])
        prompt = torch.tensor([[0] * pads + ids[:given_tokens]])
        generation = Generation(real=real, ids=prompt)
        found, start = set(), 0
        while start < pads + length:  # the prompt at once or in chunks, then what is written, one by one or several
            seq = rng.choice([1, 2, pads + given_tokens]) if start < pads + given_tokens else rng.choice([1, 1, 3])
            seq = min(seq, pads + length - start)
            slots = GenerateStep(generation, start, (1, seq)).slots(wanted(spec, CHATML))
            if slots is not None:
                found |= {column + start - pads for column in columns(slots, seq, groups)[0]}
            start += seq
        assert found == {column for column in edited if column < length}


@settings(deadline=None, max_examples=100)
@given(st.randoms(use_true_random=True), specs())
def test_a_conversation_that_goes_on_keeps_what_is_edited(rng, spec):
    """Without a word about what was given: any beginning but one that cuts a header, or the last tokens before one."""
    groups, ids = Positions.parse(spec).groups, random_chat(rng)
    whole = Rows(real=[[True] * len(ids)], ids=[ids], marks=CHATML)
    edited = columns(resolve(groups, whole.turns().answers()), len(ids), groups)[0]
    for length, _ in beginnings(rng, ids):
        row = Rows(real=[[True] * length], ids=[ids[:length]], marks=CHATML)
        found = columns(resolve(groups, row.turns().answers()), length, groups)[0]
        assert found == {column for column in edited if column < length}


# Which source counts, for each document by itself


def source(training=False, is_prompt=False, lengths=None, **given):
    tensors = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in given.items()}
    if lengths is None:
        batch = Batch.read(tensors, tensors["input_ids"], has_answers=True)
    else:
        with peft_reft.prompt_lengths(lengths):
            batch = Batch.read(tensors, tensors["input_ids"], has_answers=True)
    return FromBatch(batch, has_answers=True, training=training, is_prompt=is_prompt)


def slots_of(spec, marks=None, tie="layer", **given):
    return source(**given).slots(wanted(spec, marks, tie)).tolist()


CHAT = [*USER, 1, *STABLE, 2, 3]  # five tokens of prompt, two of answer
PLAIN = [1, 2, 3, 4, 5, 6, 7]


def test_lengths_come_before_marks_and_labels():
    given_ = dict(input_ids=[CHAT, PLAIN], labels=[[U] * 5 + [2, 3], [U] * 6 + [7]])
    assert slots_of("l1+g1", CHATML, lengths=[3, 4], **given_) == [[2, 3], [3, 4]]
    padded = dict(input_ids=[[0, 0, *CHAT]], attention_mask=[[0, 0] + [1] * 7])
    assert slots_of("l1", CHATML, lengths=[3], **padded) == [[4]], "they count tokens, not padding"


def test_marks_come_before_labels():
    labels = [[U, U, 1, U, U, U, 3], [U] * 6 + [7]]  # several spans of a document with marks: nobody minds
    assert slots_of("l1+g1", CHATML, input_ids=[CHAT, PLAIN], labels=labels) == [[4, 5], [5, 6]]


def test_each_document_of_a_packed_row_has_its_own_source():
    packed = dict(
        input_ids=[CHAT + PLAIN[:4] + CHAT],
        labels=[[U, U, U, 9, 9, 9, 9] + [U, U, 7, 7] + [U] * 7],
        position_ids=[[*range(7), *range(4), *range(7)]],
    )
    assert slots_of("l1+g1", CHATML, **packed) == [[4, 5, 8, 9, 15, 16]]
    assert slots_of("f1+g", CHATML, **packed)[0][:3] == [0, 7, 11]


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_documents_do_not_depend_on_labels(masked):
    packed = dict(input_ids=[CHAT + CHAT], position_ids=[[*range(7)] * 2])
    packed |= dict(attention_mask=[[1] * 14]) if masked else {}
    assert slots_of("f1+l1", CHATML, **packed) == [[0, 4, 7, 11]]
    assert slots_of("f1+l1", CHATML, labels=[([U] * 5 + [2, 3]) * 2], **packed) == [[0, 4, 7, 11]]


def test_logits_to_keep_mark_the_answer_of_rows_without_labels():
    """TRL's trainers ask for the logits of the answer, and the one before: three for an answer of two."""
    assert slots_of("l1+g", input_ids=[PLAIN], logits_to_keep=3) == [[4, -1, -1, -1, -1, -1, 5, 6]]
    assert slots_of("l1", input_ids=[PLAIN], logits_to_keep=3, training=True) == [[4]]
    # Labels say more; so do marks of what stands before.
    assert slots_of("l1", input_ids=[PLAIN], logits_to_keep=3, labels=[[U] * 3 + [4, 5, 6, 7]]) == [[2]]
    two = [*CHAT, *USER, 4, *STABLE, 5, 6, 7]
    assert slots_of("l1+g2", CHATML, input_ids=[two], logits_to_keep=4) == [[4, 5, 6, 11, 12, 13]]


@pytest.mark.parametrize("kept", [0, 1, 8, torch.tensor([5, 6])], ids=str)
def test_other_logits_to_keep_say_nothing(kept):
    """One is what `generate` asks of a prompt; none is all; a tensor names columns."""
    with pytest.warns(UserWarning, match="takes every row of this forward for a prompt"):
        assert slots_of("l1", input_ids=[PLAIN], logits_to_keep=kept) == [[6]]


def test_a_completion_mask_is_labels():
    assert slots_of("l1+g1", input_ids=[PLAIN], completion_mask=[[0, 0, 0, 1, 1, 1, 1]]) == [[2, 3]]


def test_the_labels_of_a_batch_are_remembered_with_it():
    """As evaluation with `compute_metrics` needs it: the same ids again, without labels."""
    from peft_reft.positions.batch import remember

    ids = torch.tensor([PLAIN])
    remember(Batch.read({"input_ids": ids, "labels": torch.tensor([[U] * 4 + [5, 6, 7]])}, ids, has_answers=True))
    again = FromBatch(Batch.read({"input_ids": ids}, ids, has_answers=True), has_answers=True)
    assert again.slots(wanted("l1")).tolist() == [[3]]
    ids[0, 0] = 9  # other tokens now
    with pytest.warns(UserWarning, match="takes every row"):
        changed = FromBatch(Batch.read({"input_ids": ids}, ids, has_answers=True), has_answers=True)
        assert changed.slots(wanted("l1")).tolist() == [[6]]


@pytest.mark.parametrize("lengths", [[3], [3, 4, 5]])
def test_lengths_are_one_a_row(lengths):
    with pytest.raises(ValueError, match=rf"prompt_lengths has {len(lengths)} entries.*2 rows"):
        source(input_ids=[PLAIN, PLAIN], lengths=lengths)


# What is refused and what is warned of


def messages(spec, marks=None, tie="layer", **given):
    """All that is said: the error or the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            slots_of(spec, marks, tie, **given)
        except ValueError as error:
            return [f"refused: {error}"]
    return [str(warning.message) for warning in caught]


BARE = dict(input_ids=[PLAIN, PLAIN])
SEVERAL = dict(input_ids=[PLAIN], labels=[[U, U, 3, U, U, 6, 7]])
FULL = dict(input_ids=[PLAIN], labels=[PLAIN])
CUT = dict(input_ids=[PLAIN], labels=[PLAIN], position_ids=[[3, 4, 5, 0, 1, 2, 3]])  # as `wrapped` packs
GAP = dict(input_ids=[PLAIN], labels=[[1, 2, 3, U, 5, 6, 7]])  # a label taken off inside: the padding token's, say
ONE_MARKED = dict(input_ids=[CHAT, PLAIN])
UNLABELLED = dict(input_ids=[PLAIN], labels=[[U] * 7])
TAKES = "LoReFT takes every row of this forward for a prompt, to whose end positions={spec!r} refers"
SAID = {
    "no source": "LoReFT cannot tell where the prompts end, which positions={spec!r} needs",
    "no labels": "LoReFT was given no labels in training, so it cannot tell how long the prompts are",
    "takes": TAKES,
    "several": "The labels of a row have several supervised spans, and positions={spec!r} needs",
    "nothing trains": "No row of this training batch has a token for LoReFT to edit",
    "nothing": "LoReFT edits no token of this batch",
    "cut": "A row or a packed document starts in the middle of a document",
}


@pytest.mark.parametrize(
    "given, training, spec, refused, said",
    [
        # nothing is known of the batch
        (BARE, True, "f2+l2", True, "no source"),
        (BARE, True, "l1", True, "no source"),
        (BARE, True, "p", True, "no source"),
        (BARE, True, "g2", True, "no source"),
        (BARE, True, "f2", False, "no labels"),
        (BARE, True, "all", False, None),
        (BARE, False, "f2+l2", False, "takes"),
        (BARE, False, "p", False, "takes"),
        (BARE, False, "g", False, "takes"),
        (BARE, False, "f7", False, None),
        (BARE, False, "f8", False, "takes"),  # a prompt of its own would be shorter
        (BARE, False, "all", False, None),
        # labels of several spans
        (SEVERAL, True, "l1", True, "several"),
        (SEVERAL, False, "l1", True, "several"),
        (SEVERAL, True, "f1+l1", True, "several"),
        (SEVERAL, True, "p", True, "several"),
        (SEVERAL, True, "g", True, "several"),
        (SEVERAL, True, "g1", True, "several"),
        (SEVERAL, True, "f2", False, None),
        (SEVERAL, True, "all", False, None),
        # all of it is trained on
        (FULL, True, "f2+l2", True, "nothing trains"),
        (FULL, True, "p", True, "nothing trains"),
        (FULL, False, "f2+l2", False, "nothing"),
        (FULL, False, "p", False, "nothing"),
        (FULL, True, "g", False, None),
        (FULL, True, "g2", False, None),
        (FULL, True, "f1+g", False, None),
        (FULL, True, "all", False, None),
        (GAP, True, "g", False, None),
        (GAP, False, "g", False, None),
        (GAP, True, "all", False, None),
        # rows that begin in mid-document
        (CUT, True, "f1+l1", True, "cut"),
        (CUT, True, "p", True, "cut"),
        (CUT, True, "g2", True, "cut"),
        (CUT, True, "g", False, None),
        (CUT, True, "all", False, None),
        (GAP, True, "f1+l1", True, "cut"),
        (GAP, True, "p", True, "cut"),
        # no token is trained on: the next batch may be fine
        (UNLABELLED, True, "f2+l2", False, None),
        (UNLABELLED, True, "g", False, None),
    ],
)
def test_what_is_said_of_rows_without_marks(given, training, spec, refused, said):
    expected = [] if said is None else [("refused: " if refused else "") + SAID[said].format(spec=spec)]
    for marks in (None, Marks(), CHATML):  # not known; known to be none; none of them in these rows
        found = messages(spec, marks, training=training, **given)
        assert len(found) == len(expected), found
        for message, begin in zip(found, expected):
            assert message.startswith(begin)
            assert said not in ("takes", "several", "no source", "no labels", "nothing") or all(
                way in message
                for way in (
                    "`response_template`",
                    "DataCollatorForLoReft",
                    "prompt_lengths",
                    "`intervention_positions`",
                )
            )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", ["f2+l2", "l1~1", "p", "g", "g2", "f9", "f1+g2", "all"])
def test_nothing_is_said_where_the_prompts_are_known(spec, training):
    every_row_is_marked = dict(input_ids=[CHAT, [*TOOL, 1, *STABLE, 3, 4]])
    assert messages(spec, CHATML, training=training, **every_row_is_marked) == []
    assert messages(spec, training=training, lengths=[3, 4], **BARE) == []
    assert messages(spec, CHATML, training=training, lengths=[3, 4], **BARE) == []
    assert messages(spec, training=training, logits_to_keep=3, **BARE) == []
    one_span = dict(labels=[[U] * 4 + [5, 6, 7]] * 2)
    assert messages(spec, training=training, **BARE, **one_span) == []
    assert messages(spec, CHATML, training=training, **BARE, **one_span) == []


@pytest.mark.parametrize(
    "spec, training, said",
    [
        ("l1", True, "refused: " + SAID["no source"]),
        ("l1", False, SAID["takes"]),
        ("p", False, SAID["takes"]),
        ("f7", False, None),
        ("f8", False, SAID["takes"]),
        ("all", True, None),
        ("all", False, None),
    ],
)
def test_a_row_without_a_mark_among_rows_with_one(spec, training, said):
    found = messages(spec, CHATML, training=training, **ONE_MARKED)
    assert len(found) == (said is not None)
    assert not found or found[0].startswith(said.format(spec=spec))


@pytest.mark.parametrize("spec", ["f9", "f2+l2", "p", "g"])
def test_whoever_knows_that_rows_are_prompts_is_told_nothing(spec):
    """Forwards beside `generate`, a decoder's."""
    assert messages(spec, is_prompt=True, **BARE) == []
    assert messages(spec, CHATML, is_prompt=True, **ONE_MARKED) == []


def test_of_a_part_that_ties_by_group_prompt_and_answer_differ():
    """`all` with one weight for the prompt and one for the answer: where the prompt ends matters."""
    assert messages("all", tie="group", training=True, **BARE)[0].startswith("refused: LoReFT cannot tell")
    assert messages("all", tie="group", training=True, **SEVERAL)[0].startswith("refused: The labels of a row")
    assert messages("all", tie="group", **BARE)[0].startswith("LoReFT takes every row")


def test_several_spans_of_one_document_among_others():
    """In a packed row, and where marks tell another document of it."""
    packed = dict(
        input_ids=[CHAT + PLAIN], position_ids=[[*range(7)] * 2], labels=[[U] * 5 + [2, 3] + [U, U, 3, 4, U, 6, 7]]
    )
    assert messages("l1", CHATML, training=True, **packed)[0].startswith("refused: The labels of a row have several")
    marked = dict(packed, input_ids=[CHAT + CHAT])
    assert messages("l1", CHATML, training=True, **marked) == []


def test_chats_trained_on_whole():
    """TRL's default for `messages`: the marks say where their prompts end."""
    two = dict(input_ids=[[*CHAT, *USER, *STABLE, 4]])
    for labels in (two["input_ids"], [[token if token != 2 else U for token in two["input_ids"][0]]]):
        assert slots_of("f2+l1", CHATML, training=True, labels=labels, **two) == [[0, 1, 4, -1, -1, 10]]
        assert messages("p", CHATML, training=True, labels=labels, **two) == []


def test_a_chat_that_begins_inside_an_answer_is_refused():
    """As truncation from the left leaves it. Headers that are left do not bring back the first prompt."""
    ids = [[5, 6, *USER, 1, *STABLE, 2, 3]]
    labels = [[5, 6, U, U, U, U, U, 2, 3]]
    for spec in ("f1+l1", "p", "g2"):
        for marks in (None, CHATML):
            said = messages(spec, marks, training=True, input_ids=ids, labels=labels)
            assert said and said[0].startswith("refused: " + SAID["cut"])
    assert slots_of("l1", CHATML, training=True, input_ids=ids, labels=labels) == [[6]]


def compiled(asked):
    """`slots_of` in a graph."""

    def slots(ids):
        batch = Batch.read({"input_ids": ids}, ids, has_answers=True)
        return FromBatch(batch, has_answers=True).slots(asked)

    return torch.compile(slots, backend="eager", fullgraph=True)


TWO = [*CHAT, *USER, *STABLE, 4, 5]


@pytest.mark.parametrize(
    "spec", [pytest.param("l1", marks=pytest.mark.slow), pytest.param("g1", marks=pytest.mark.slow), "f1+l1+g"]
)
def test_a_graph_cannot_learn_how_many_answers_there_are(spec):
    """For one a row it is right; of more it says so when it runs."""
    graph = compiled(wanted(spec, CHATML))
    assert graph(torch.tensor([CHAT])).tolist() == slots_of(spec, CHATML, input_ids=[CHAT])
    with pytest.raises(RuntimeError, match="several answers need the positions of DataCollatorForLoReft"):
        graph(torch.tensor([TWO]))


@pytest.mark.parametrize(
    "spec", [pytest.param("p", marks=pytest.mark.slow), "g", pytest.param("all", marks=pytest.mark.slow)]
)
def test_a_graph_that_need_not_know_how_many_answers_there_are(spec):
    graph = compiled(wanted(spec, CHATML))
    assert graph(torch.tensor([TWO])).tolist() == slots_of(spec, CHATML, input_ids=[TWO])


def test_marks_that_leave_no_prompt_are_no_error():
    assert messages("l1", CHATML, training=True, input_ids=[[*STABLE, 1]], labels=[[U, U, 1]]) == []
