"""The marks of a chat template, as token ids, and where they stand in a batch.

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

from ..shapes import Bool, Int

Template = tuple[int, ...]


@dataclass(frozen=True)
class Marks:
    """The headers of a chat template, as token ids. If there is no response template, no document has a mark."""

    response: tuple[Template, ...] = ()
    instruction: tuple[Template, ...] = ()

    @staticmethod
    def of(
        response_template: Sequence[Sequence[int]] | None, instruction_template: Sequence[Sequence[int]] | None
    ) -> Marks | None:
        """Make marks from a config's fields. None means "not known", `[]` means "there are none"."""
        if response_template is None:
            return None
        return Marks(
            tuple(tuple(template) for template in response_template),
            tuple(tuple(template) for template in instruction_template or ()),
        )


def check_template(value: Any, field: str) -> list[list[int]] | None:
    """Check a config's `response_template` or `instruction_template`, and make it a list of lists of ints.

    Args:
        value: None, or a list of templates, each a list of token ids.
        field: name of the field, for the error.

    Raises:
        ValueError: `value` is anything else, such as one template that stands in no list.
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


def find_headers(
    ids: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"], document: Int[Tensor, "batch seq"], marks: Marks
) -> tuple[Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Find the headers of a chat template.

    A header lies within one document, on real tokens alone. If several response templates begin at one column, the
    longest counts. So a header can be given with its tail and without: the tail belongs to the prompt if its tokens
    follow the header.

    Args:
        ids: token ids.
        real: False on padding.
        document: number of each token's document.
        marks: of the chat template.

    Returns:
        ended: True at the last token of a response template: an answer may begin behind it.
        begun: True at the first token of an instruction template.
    """
    # An answer may begin behind the last token of a header:
    #   ids    u  u  hi  A  A  yo  ...      response template A A, instruction template u u
    #   begun  1
    #   ended                 1
    length_at = torch.zeros_like(ids)  # (batch, seq): length of the longest response template that begins here
    for template in sorted(marks.response, key=len):
        length_at = torch.where(_matches(ids, real, document, template), len(template), length_at)
    column = torch.arange(ids.shape[1], device=ids.device)  # (seq,)
    last = torch.where(length_at > 0, column + length_at - 1, ids.shape[1])  # (batch, seq): `seq` if there is none
    ended = torch.zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.bool, device=ids.device)
    ended = ended.scatter(1, last, True)[:, :-1]
    begun = torch.zeros_like(real)
    for template in marks.instruction:
        begun = begun | _matches(ids, real, document, template)
    return ended, begun


def _matches(
    ids: Int[Tensor, "batch seq"],
    real: Bool[Tensor, "batch seq"],
    document: Int[Tensor, "batch seq"],
    template: Template,
) -> Bool[Tensor, "batch seq"]:
    """Whether `template` begins at each column."""
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
