"""The marks of a chat template, as token ids, and where they stand in a batch. Pure torch.

A *response template* is the header behind which an answer begins (``<|im_start|>assistant\\n``). An *instruction
template* is a header at which an answer has ended (``<|im_start|>user\\n``, that of a tool, of a system message in
mid-chat). The names are those of TRL and unsloth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Template = tuple[int, ...]


@dataclass(frozen=True)
class Marks:
    """The headers of a chat template, as token ids. Without a response template, no document has a mark."""

    response: tuple[Template, ...] = ()
    instruction: tuple[Template, ...] = ()

    @staticmethod
    def of(
        response_template: Sequence[Sequence[int]] | None, instruction_template: Sequence[Sequence[int]] | None
    ) -> Marks | None:
        """From a config's fields. None if they are not known, which is not the same as "there are none" (`[]`)."""
        if response_template is None:
            return None
        return Marks(
            tuple(tuple(template) for template in response_template),
            tuple(tuple(template) for template in instruction_template or ()),
        )


def check_template(value: Any, field: str) -> list[list[int]] | None:
    """A config's `response_template` or `instruction_template` as a list of lists of ints.

    Args:
        value: None, or a list of templates, each a list of token ids.
        field: its name, for the error.

    Raises:
        ValueError: it is something else; a single template must stand in a list, too.
    """
    if value is None:
        return None
    templates: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    for template in templates:
        is_ids = isinstance(template, list | tuple) and template
        if not is_ids or not all(type(token) is int and token >= 0 for token in template):
            raise ValueError(
                f"{field}={value!r}: expected a list of templates, each a non-empty list of token ids, such as "
                "[[1, 520, 198]]. `peft_reft.chat_marks(tokenizer)` finds those of a tokenizer's chat template."
            )
    return [list(template) for template in templates]


def find_headers(ids: Tensor, real: Tensor, document: Tensor, marks: Marks) -> tuple[Tensor, Tensor]:
    """Where the headers of a chat template stand.

    A header lies within one document and on real tokens alone. Of response templates that begin at one column the
    longest counts: so a header can be given with its tail and without, and the tail belongs to the prompt wherever its
    tokens are there.

    Args:
        ids: (batch, seq) int64.
        real: (batch, seq) bool, False on padding.
        document: (batch, seq) int64, the number of each token's document.
        marks: of the chat template.

    Returns:
        ended: (batch, seq) bool, True at the last token of a response template: an answer may begin behind it.
        begun: (batch, seq) bool, True at the first token of an instruction template.
    """
    # An answer may begin behind the last token of a header:
    #   ids    u  u  hi  A  A  yo  ...      response template A A, instruction template u u
    #   begun  1
    #   ended                 1
    length_at = torch.zeros_like(ids)  # (batch, seq): how long the longest response template is that begins here
    for template in sorted(marks.response, key=len):
        length_at = torch.where(_matches(ids, real, document, template), len(template), length_at)
    column = torch.arange(ids.shape[1], device=ids.device)  # (seq,)
    last = torch.where(length_at > 0, column + length_at - 1, ids.shape[1])  # (batch, seq), `seq` for none
    ended = torch.zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.bool, device=ids.device)
    ended = ended.scatter(1, last, True)[:, :-1]
    begun = torch.zeros_like(real)
    for template in marks.instruction:
        begun = begun | _matches(ids, real, document, template)
    return ended, begun


def _matches(ids: Tensor, real: Tensor, document: Tensor, template: Template) -> Tensor:
    """(batch, seq) bool: whether `template` begins at each column."""
    seq, length = ids.shape[1], len(template)
    found = torch.zeros_like(real)
    if length > seq:
        return found
    matches = document[:, : seq - length + 1] == document[:, length - 1 :]  # (batch, seq - length + 1)
    for offset, token in enumerate(template):
        part = slice(offset, seq - length + 1 + offset)
        matches = matches & (ids[:, part] == token) & real[:, part]
    found[:, : seq - length + 1] = matches
    return found
