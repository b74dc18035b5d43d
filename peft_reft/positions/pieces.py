"""The position source of a packed step of continuous batching: one row that holds pieces of several requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import Int
from .marks import Marks
from .resolve import Answers, resolve
from .sources import WithoutCache
from .turns import answers_of
from .wanted import Wanted


@dataclass(frozen=True)
class Piece:
    """Some tokens of a request. An index counts the request's tokens from 0."""

    ids: Sequence[int]
    """Token ids that the request was given."""
    computed: int
    """Index of the piece's first token: how many tokens of the request came in earlier steps."""
    count: int
    """How many tokens the piece has."""

    @property
    def stop(self) -> int:
        """Index behind the piece's last token."""
        return self.computed + self.count

    def turns(self, marks: Marks | None) -> list[tuple[int, int, int]]:
        """The turns that have tokens in the piece: indices of the prompt's first token, the answer's first, its end.

        The last answer goes on with what is generated, up to the end of the piece.
        """
        given = len(self.ids)
        spans = [(given, given)]
        if marks is not None and marks.response:
            spans = answers_of(self.ids, marks.response, marks.instruction, given=given)
        found, begin = [], 0
        for number, (answer, end) in enumerate(spans):
            end = max(answer, self.stop) if number == len(spans) - 1 else end
            if begin < self.stop and end > self.computed:
                found.append((begin, answer, end))
            begin = end
        return found


@dataclass
class Pieces(WithoutCache):
    """The source of a step that is one row of pieces.

    A rank (see `Turns`) counts the tokens of all requests one after the other, also those that are not in the step:

        request        A: 4 tokens came before     B: new
        token          A4  A5                      B0  B1  B2
        column         0   1                       2   3   4
        rank           5   6                       7   8   9
    """

    pieces: list[Piece]
    shape: tuple[int, int]
    """(1, seq) of the step; columns behind the pieces are padding."""
    device: torch.device

    def slots(self, wanted: Wanted) -> Int[Tensor, "batch n"] | None:
        """See `PositionSource`."""
        if not wanted.edits_answers and all(piece.computed >= len(piece.ids) for piece in self.pieces):
            return None  # every step that only decodes, of a spec without generated tokens
        ranks: list[int] = []  # of each column
        answer: list[bool] = []  # for each column
        turns: list[tuple[int, int, int, int]] = []  # rank before: request, prompt, answer, end of the answer
        before = 0  # rank before the request
        for piece in self.pieces:
            ranks.extend(range(before + piece.computed + 1, before + piece.stop + 1))
            in_piece = [False] * piece.count
            for begin, answers_at, end in piece.turns(wanted.marks):
                turns.append((before, before + begin, before + answers_at, before + end))
                for index in range(max(answers_at, piece.computed), min(end, piece.stop)):
                    in_piece[index - piece.computed] = True
            answer += in_piece
            before += max(piece.stop, len(piece.ids))
        seq = self.shape[1]
        padding = seq - len(ranks)
        real = [True] * len(ranks) + [False] * padding
        table = torch.tensor(turns, device=self.device).T.unsqueeze(1)  # (4, 1, turns)
        starts, lower, ends, stops = table
        row = torch.tensor([ranks + [before] * padding, answer + [0] * padding, real], device=self.device)  # (3, seq)
        answers = Answers(
            rank=row[:1],
            real=row[2:].bool(),
            answer=row[1:2].bool(),
            ends=ends,
            starts=starts,
            lower=lower,
            first=lower == starts,
            stops=stops,
        )
        return resolve(wanted.layout, answers)
