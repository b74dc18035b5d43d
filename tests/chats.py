"""Random rows of chats, and which of their tokens a spec edits: an oracle of plain loops over one row's tokens.

It is written from the contract (docs, "Positions"), not from the code: no ranks, no cumulative sums.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from peft_reft.positions.marks import Marks
from peft_reft.positions.resolve import find_turns

NONE = -1
UNSUPERVISED = -100

RESPONSE, STABLE, USER, TOOL, END = [90, 91, 95], [90, 91], [90, 92], [90, 93], 94
"""A header of the assistant with its tail and without, those of user and tool, and what ends a message."""
CHATML = Marks(response=((90, 91, 95), (90, 91)), instruction=((90, 92), (90, 93)))
ENTANGLED = Marks(response=((90, 91), (91,), (4, 5)), instruction=((91, 90), (5, 4), (92,)))
"""Headers that overlap each other, as no template has them."""


@dataclass
class Rows:
    """A batch as nested lists (batch, seq). None: not known."""

    real: list
    ids: list
    labels: list | None = None
    position_ids: list | None = None
    answer_at: list | None = None
    marks: Marks | None = None

    def turns(self):
        """Return what the code makes of the batch."""

        def tensor(rows):
            return None if rows is None else torch.tensor(rows)

        return find_turns(
            tensor(self.real),
            labels=tensor(self.labels),
            position_ids=tensor(self.position_ids),
            ids=tensor(self.ids),
            marks=self.marks,
            answer_at=tensor(self.answer_at),
        )

    def row(self, number):
        """Return one row of the batch, by itself."""
        parts = (self.real, self.ids, self.labels, self.position_ids, self.answer_at)
        return Rows(*(None if part is None else part[number] for part in parts), self.marks)


# The oracle.


def documents_of(row):
    """Return the columns of each document's real tokens. A document begins wherever positions restart."""
    documents = []
    for column, is_real in enumerate(row.real):
        if is_real:
            if not documents or (row.position_ids is not None and row.position_ids[column] == 0):
                documents.append([])
            documents[-1].append(column)
    return documents


def header_at(row, document, i, templates):
    """Return the length of the longest template that begins at token `i` of a document, without a gap, or 0."""
    longest = 0
    for template in templates:
        columns = document[i : i + len(template)]
        unbroken = columns == list(range(document[i], document[i] + len(columns)))
        if unbroken and [row.ids[column] for column in columns] == list(template):
            longest = max(longest, len(template))
    return longest


def answers_of(row, document):
    """Return (start, end) of each answer, as indices into `document`."""
    marks = row.marks or Marks()
    headers = {i: header_at(row, document, i, marks.response) for i in range(len(document))}
    behind = {i + length for i, length in headers.items() if length}
    # A document without a header of the assistant is no chat: other headers mean nothing in it.
    ends = {i for i in range(len(document)) if behind and header_at(row, document, i, marks.instruction)}
    known = {i for i, column in enumerate(document) if row.answer_at is not None and row.answer_at[column]}
    if not behind and not known and row.labels is not None:
        known = {i for i, column in enumerate(document) if row.labels[column] != UNSUPERVISED}
        known = {min(known)} if known else set()
    spans, start = [], None
    for i in range(len(document) + 1):
        if start is None and i in behind:
            start = i
        if start is not None and i in ends:
            spans.append((start, i))
            start = None
        if start is None and i in known:
            start = i
    if start is not None:
        spans.append((start, len(document)))
    return spans


def slots_of(document, spans, nth, groups):
    """Slots of the counted groups of one answer: a list of (group, slot within the group, column or -1)."""
    p = sum(group.count for group in groups if group.letter == "f")
    s = sum(group.count for group in groups if group.letter == "l")
    skip = max(group.ends.skip for group in groups)
    start, end = spans[nth]
    lower = spans[nth - 1][1] if nth else 0  # the answer's own prompt begins behind the answer before
    prompt = document[lower : max(lower, start - skip)]
    if nth == 0 and len(prompt) < p + s:
        p, s = min(p, len(prompt) // 2), min(s, (len(prompt) + 1) // 2)
    slots = []
    for group in groups:
        if group.count is None:
            continue
        if group.letter == "l":
            chosen = prompt[max(0, len(prompt) - s) :]
            chosen = [NONE] * (group.count - len(chosen)) + chosen
        else:
            chosen = document[start:end][: group.count]
            if group.letter == "f":
                chosen = prompt[:p] if nth == 0 else []
            chosen = chosen + [NONE] * (group.count - len(chosen))
        slots += [(group, slot, column) for slot, column in enumerate(chosen)]
    return slots


def oracle_row(row, groups):
    """Return (counted, regions): a list of slots for each answer; a list of columns for each open-ended group."""
    counted, prompts, answers = [], [], []
    for document in documents_of(row):
        spans = answers_of(row, document)
        written = {i for start, end in spans for i in range(start, end)}
        answers += [document[i] for i in written]
        prompts += [column for i, column in enumerate(document) if i not in written]
        spans = spans or [(len(document), len(document))]  # it is one prompt, to be answered behind its end
        counted += [slots_of(document, spans, nth, groups) for nth in range(len(spans))]
    regions = [
        (group, [column if column in chosen else NONE for column in range(len(row.real))])
        for group in groups
        if group.count is None
        for chosen in [prompts if group.letter == "p" else answers]
    ]
    return counted, regions


def oracle(rows, groups):
    """Return what `resolve` must return, as nested lists, and for each group its set of (row, slot, column)."""
    found = [oracle_row(rows.row(number), groups) for number in range(len(rows.real))]
    most = max(1, *(len(counted) for counted, _ in found))
    width = sum(group.count or 0 for group in groups)
    flat, edits = [], {group: set() for group in groups}
    for i, (counted, regions) in enumerate(found):
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


# Random rows and specs.


def in_runs(rng, seq):
    """Draw booleans in runs, like the turns of a chat."""
    value, row = rng.random() < 0.5, []
    while len(row) < seq:
        row += [value] * rng.randint(1, 6)
        value = not value
    return row[:seq]


def random_chat(rng, turns=4):
    """Draw a chat that ends with the assistant's message. Headers are whole; their tail may have merged."""
    ids = [rng.randrange(9) for _ in range(rng.randrange(4))]
    for _ in range(rng.randint(1, turns)):
        for _ in range(rng.choice([1, 1, 2])):  # a user, or results of tools
            ids += rng.choice([USER, TOOL]) + [rng.randrange(9) for _ in range(rng.randrange(6))] + [END]
        for _ in range(rng.choice([1, 1, 2])):  # one or two messages of the assistant
            ids += RESPONSE if rng.random() < 0.8 else STABLE
            ids += [rng.randrange(9) for _ in range(rng.randrange(5))] + [END]
    return ids


def _random_ids(rng, seq):
    """Draw words among headers, whole and broken."""
    ids = [rng.randrange(9) for _ in range(rng.randrange(3))]
    while len(ids) < seq:
        ids += rng.choice([RESPONSE, RESPONSE, STABLE, USER, USER, TOOL, [90], [91, 90], [END]])
        ids += [rng.randrange(9) for _ in range(rng.randrange(5))]
    return ids[:seq]


def _random_row(rng, seq, packed):
    pads, begin = rng.randint(0, seq // 2), rng.randint(0, seq)
    real = {
        "none": [True] * seq,
        "left": [column >= pads for column in range(seq)],
        "right": [column < seq - pads for column in range(seq)],
        "holes": [rng.random() < 0.8 for _ in range(seq)],
        "only": [rng.random() < 0.1 for _ in range(seq)],
    }[rng.choice(["none", "none", "left", "left", "right", "holes", "holes", "only"])]
    ids = _random_ids(rng, seq) if rng.random() < 0.8 else [rng.randrange(9) for _ in range(seq)]
    if len(real) - sum(real) == pads and rng.random() < 0.5:  # a chat, whole, beside the padding
        text = [token for _ in range(8) for token in random_chat(rng)][: seq - pads]
        ids = [0] * pads + text if real[-1] else text + [0] * pads
    supervised = {
        "one answer": [column >= begin for column in range(seq)],
        "several": in_runs(rng, seq),
        "scattered": [rng.random() < 0.5 for _ in range(seq)],
        "none": [False] * seq,
        "all": [True] * seq,
    }[rng.choice(["one answer", "one answer", "several", "several", "several", "scattered", "none", "all"])]
    labels = [7 if chosen else UNSUPERVISED for chosen in supervised]  # on padding too, where it must not count
    known = rng.choice([begin, seq, rng.randint(0, seq)])
    answer_at = [column == known or (packed and rng.random() < 0.1) for column in range(seq)]
    position_ids, position = [], 0
    for column in range(seq):
        if not real[column]:
            position_ids.append(rng.randint(0, 1))  # what padding has must not matter
            continue
        position = 0 if packed and rng.random() < 0.1 else position
        position_ids.append(position)
        position += 1
    return real, ids, labels, position_ids, answer_at


@st.composite
def batches(draw, marks=(None, CHATML, CHATML, CHATML, ENTANGLED)):
    """Draw `Rows` of any kind."""
    rng = draw(st.randoms(use_true_random=True))  # seeded by hypothesis, but not shrunk: rows stay varied
    seq, packed = rng.choice([rng.randint(1, 12), rng.randint(12, 48)]), rng.random() < 0.4
    rows = [_random_row(rng, seq, packed) for _ in range(rng.randint(1, 3))]
    real, ids, labels, position_ids, answer_at = ([row[part] for row in rows] for part in range(5))
    return Rows(
        real=real,
        ids=ids,
        labels=labels if rng.random() < 0.7 else None,
        position_ids=position_ids if packed or rng.random() < 0.5 else None,
        answer_at=answer_at if rng.random() < 0.3 else None,
        marks=rng.choice(marks),
    )


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
