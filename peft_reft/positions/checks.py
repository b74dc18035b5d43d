"""Find out what is wrong with a batch of whole documents, then refuse it or warn of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import Bool
from .batch import POSITIONS, Batch
from .resolve import IGNORED, Turns
from .wanted import WAYS_OUT, Wanted, warn, warn_of_plain_forward


def refuse_or_warn(wanted: Wanted, training: bool, is_prompt: bool) -> None:
    """Refuse a forward in which nothing says where the prompts end, or warn of it; do neither if no end matters.

    Raises:
        ValueError: in training, if every prompt's end matters.
    """
    if is_prompt or wanted.needs_end_below in (0, 1):  # every prompt has a first token
        return
    spec = str(wanted.layout)
    if training and wanted.needs_every_end:
        raise ValueError(
            f"LoReFT cannot tell where the prompts end, which positions={spec!r} needs: the model is in training, "
            f"and got neither `labels` nor `{POSITIONS}`, and no header of a chat template is known. (Label "
            "smoothing, `compute_loss_func` and some trainers keep labels from the model. A forward that only scores, "
            "as in a reward function, belongs under `torch.no_grad()`.) " + WAYS_OUT
        )
    if training:
        warn(
            f"LoReFT was given no labels in training, so it cannot tell how long the prompts are: "
            f"positions={spec!r} edits tokens of the answer if a prompt is shorter than that. " + WAYS_OUT
        )
    elif wanted.needs_every_end:
        warn_of_plain_forward(spec)


class Checks:
    """Checks one batch for the spec of one adapter.

    The checks are computed on the device (`facts`), read by the host in one go, and then acted on (`act`). In a traced
    graph, where the host cannot read, `assert_later` stands for both.

    Args:
        batch: the batch.
        wanted: what the layers ask.
        turns: the batch's prompts and answers.
        training: whether a step of training runs.
        is_prompt: whether the forward is known to hold prompts alone.
    """

    def __init__(self, batch: Batch, wanted: Wanted, turns: Turns, *, training: bool, is_prompt: bool) -> None:
        self.batch, self.wanted, self.turns = batch, wanted, turns
        self.training, self.is_prompt = training, is_prompt
        self.labelled = batch.labels is not None and batch.prompt_lengths is None
        self.spec = str(wanted.layout)

    def facts(self, marks_are_known: bool) -> list[tuple[str, Tensor]]:
        """Compute what may be wrong: names, and bool tensors of no dimension.

        Args:
            marks_are_known: whether headers of a chat template were looked for.
        """
        if self.labelled:
            found = [("several", self._several()), ("nothing", self._nothing())]
            if self.training:
                found += [("unsupervised", ~self._supervised().any()), ("cut", self._cut())]
            return found
        found = []
        if self.batch.says_where_prompts_end:
            return found
        unmarked = self.turns.begins & ~self.turns.marked
        if marks_are_known:
            found.append(("unmarked", unmarked.any()))
        needs_end_below = self.wanted.needs_end_below
        if needs_end_below is not None and not (self.training or self.is_prompt):
            found.append(("short", (unmarked & (self.turns.length < needs_end_below)).any()))
        return found

    def act(self, found: dict[str, int]) -> None:
        """Raise ValueError, or warn, if a fact of `facts` holds."""
        if found.get("cut"):
            raise ValueError(
                "A row or a packed document starts in the middle of a document (it begins inside an answer, its first "
                "position id is not 0, or packing left it a prompt of one token), so its prompt is missing and LoReFT "
                "would edit the wrong tokens. Keep documents whole when packing or truncating (TRL: "
                "packing_strategy='bfd'); prompts of a single token cannot be packed."
            )
        if found.get("several"):
            raise ValueError(
                f"The labels of a row have several supervised spans, and positions={self.spec!r} needs to know where "
                "each prompt ends. Labels alone cannot tell a second answer from an answer of which some tokens are "
                "not trained on. " + WAYS_OUT
            )
        if found.get("nothing") and not found.get("unsupervised"):
            if self.training:
                raise ValueError(
                    "No row of this training batch has a token for LoReFT to edit, so nothing would train: every row "
                    "is supervised from its first token on. LoReFT learns at the prompt, so the data needs one: use "
                    "prompt-completion data (TRL: columns `prompt` and `completion`, or `completion_only_loss=True`, "
                    "or `assistant_only_loss=True` for chats), marks of the chat template, or positions that include "
                    "generated tokens ('all', 'gN')."
                )
            warn(
                f"LoReFT edits no token of this batch: its labels supervise every row from the first token on, so "
                f"there is no prompt for positions={self.spec!r}, and the loss is the base model's. " + WAYS_OUT
            )
        if found.get("unmarked"):
            refuse_or_warn(self.wanted, self.training, self.is_prompt)
        if found.get("short"):
            warn_of_plain_forward(self.spec)

    def assert_later(self) -> None:
        """Refuse a wrong batch when a traced graph runs."""
        if self.labelled:
            wrong = self._several()
            if self.training:
                wrong = wrong | self._cut() | (self._nothing() & self._supervised().any())
            torch._assert_async(
                ~wrong,
                "LoReFT: no position to edit, cut off prompts, or several answers (which need DataCollatorForLoReft)",
            )

    def _supervised(self) -> Bool[Tensor, "batch seq"]:
        """Whether each token is trained on."""
        assert self.batch.labels is not None
        return self.turns.real & (self.batch.labels != IGNORED)

    def _several(self) -> Bool[Tensor, ""]:
        """Whether labels alone would have to tell several answers of a document apart."""
        if not self.wanted.needs_every_end:  # the first answer alone matters
            return self.turns.real.new_zeros(())
        several = self.turns.begins & ~self.turns.marked & (self.turns.spans > 1)
        if all(group.decodes and group.is_open for group in self.wanted.layout):
            several = several & ~self._supervised()  # without a prompt, all of it is the answer
        return several.any()

    def _nothing(self) -> Bool[Tensor, ""]:
        """Whether no token is edited."""
        turns, none = self.turns, ~self.turns.real.new_zeros(())
        if self.wanted.edits_prompts:
            # A document without a supervised token teaches nothing. axolotl's padding of packed rows is such a one.
            none = none & ~(turns.event & (turns.end > turns.starts) & (turns.spans > 0)).any()
            if self.batch.packed and not self.wanted.edits_answers:
                lone, answered = self._lone()
                none = none | (lone.any() & self._all_lone(lone, answered))
        if self.wanted.edits_answers:
            none = none & ~turns.answer.any()
        return none

    def _lone(self) -> tuple[Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Find the documents to which their labels leave a prompt of one token, and all documents with an answer.

        TRL takes the label off the first token of every packed document. So a document without a prompt has a prompt
        of one token then, and so has the second part of a document that was split.

        Returns:
            Two masks, True at a document's first event: a prompt of one token; an answer.
        """
        turns = self.turns
        first = turns.event & (turns.starts < turns.end) & ~turns.marked
        answered = first & (turns.starts + turns.length > turns.end)
        return answered & (turns.end - turns.starts == 1), answered

    def _all_lone(self, lone: Bool[Tensor, "batch seq"], answered: Bool[Tensor, "batch seq"]) -> Bool[Tensor, ""]:
        """Whether no document of the batch has a prompt."""
        return (lone == answered).all() & ~self.turns.marked.any()

    def _cut(self) -> Bool[Tensor, ""]:
        """Whether a row or a document begins in mid-document, which matters to what counts from its beginning."""
        turns, labels = self.turns, self._supervised()
        counts_from_the_beginning = any(group.counts_from_beginning for group in self.wanted.layout)
        cut = turns.real.new_zeros(())
        first = turns.real.long().argmax(1, keepdim=True)
        if counts_from_the_beginning:
            # A row that is supervised from its first token on, and again after a gap, has lost its first prompt. In a
            # chat that is trained on as a whole, the gap is no prompt, because its headers are supervised.
            resumes = (labels[:, 1:] & ~labels[:, :-1]).any(1)  # (batch,)
            prompts = torch.where(turns.marked.any(1), (turns.instructs & ~labels).any(1), resumes)
            cut = cut | (labels.gather(1, first).squeeze(1) & prompts).any()
        if self.batch.packed and self.batch.position_ids is not None:
            lone, answered = self._lone()
            if counts_from_the_beginning:
                cut = cut | (self.batch.position_ids.gather(1, first) != 0).any()
            if self.wanted.layout.width:
                cut = cut | (lone.any() & ~self._all_lone(lone, answered))
        return cut
