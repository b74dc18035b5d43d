"""Show which tokens a spec of positions edits: coloured on a terminal, as HTML in a notebook, in brackets in a log."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import TaskType
from torch import Tensor

from ..config import LoReftConfig
from ..positions.batch import POSITIONS, Batch
from ..positions.chat.template import find_marks
from ..positions.groups import Group
from ..positions.index import make_index
from ..positions.layout import Layout
from ..positions.marks import Marks
from ..positions.resolve import resolve
from ..positions.spec import Positions

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer decodes a part of a character."""
_PART = "·"
"""How a token is shown that has a part of a character."""


@dataclass(frozen=True)
class _Piece:
    """Neighbouring tokens of a row that one group edits, or that no group edits."""

    tokens: tuple[str, ...]
    group: Group | None

    def plain(self) -> str:
        if self.group is None:
            return "".join(self.tokens)
        return f"[{self.group}: {'|'.join(self.tokens)}]"

    def ansi(self) -> str:
        if self.group is None:
            return "".join(self.tokens)
        return f"\033[30;{self.group.colour[0]}m{'|'.join(self.tokens)}\033[0m"

    def html(self) -> str:
        tokens = [html.escape(token) for token in self.tokens]
        if self.group is None:
            return "".join(tokens)
        style = f"background:{self.group.colour[1]};color:#000;border-radius:3px"
        return f'<span style="{style}" title="{self.group}">{"|".join(tokens)}</span>'


@dataclass(frozen=True)
class _Shown:
    """All rows as one spec edits them."""

    layers: str
    """The layers that have the spec, in words."""
    spec: Positions
    rows: list[list[_Piece]]

    @property
    def title(self) -> str:
        return f"{self.layers}: {self.spec}, {self.spec.describe()}"


def show_positions(tokenizer: Any, batch_or_text: Any, config: LoReftConfig) -> None:
    """Print texts with the tokens that `config` edits marked: in colour on a terminal, as HTML in a notebook.

    `⏎` stands for a line break, `·` for a token that has only a part of a character.

    Args:
        tokenizer: the model's tokenizer.
        batch_or_text: a prompt; a list of prompts; a chat as a list of `{"role": ..., "content": ...}`; or a batch as
            a collator makes it, with `input_ids` (batch, seq). `attention_mask`, `labels`, `position_ids` and
            `intervention_positions` of the batch, if there are any, are read as the model reads them.
        config: the adapter's config.

    Raises:
        ValueError: `batch_or_text` is none of these.

    Examples:
        >>> from peft_reft import LoReftConfig, show_positions
        >>> class Characters:  # stands for a tokenizer
        ...     def __call__(self, text):
        ...         return {"input_ids": [ord(character) for character in text]}
        ...     def decode(self, ids):
        ...         return "".join(map(chr, ids))
        >>> show_positions(Characters(), "What is it?", LoReftConfig(positions={"0-3": "f2", "4-": "f1+l3"}))
        layers 0-3: f2, the first 2 tokens of the prompt
          [f2: W|h]at is it?
        layers 4-: f1+l3, the first and the last 3 tokens of the prompt
          [f1: W]hat is [l3: i|t|?]
    """
    shown = _shown(tokenizer, batch_or_text, config)
    if _in_notebook():
        from IPython.display import HTML, display  # type: ignore[import-not-found,unused-ignore]  # no dependency of ours

        display(HTML("".join(_as_html(each) for each in shown)))
        return
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for each in shown:
        print(each.title)
        for row in each.rows:
            print("  " + "".join(piece.ansi() if in_colour else piece.plain() for piece in row))


def _as_html(shown: _Shown) -> str:
    parts = [f"<div>{html.escape(shown.title)}</div>"]
    for row in shown.rows:
        text = "".join(piece.html() for piece in row)
        parts.append(f'<pre style="white-space:pre-wrap">{text}</pre>')
    return "".join(parts)


def marked_row(tokenizer: Any, batch: Mapping[str, Any], config: LoReftConfig) -> str:
    """Return the first row of a batch as text, its edited tokens in brackets, once for each spec of the config.

    Args:
        tokenizer: the model's tokenizer.
        batch: as for `show_positions`; tensors of other shapes than (batch, seq) are left out.
        config: the adapter's config.
    """
    ids = batch["input_ids"]
    first = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim == 2 and (value.shape == ids.shape or name == POSITIONS):
            first[name] = value[:1]
    lines = []
    for each in _shown(tokenizer, first, config):
        lines.append(f"{each.layers}: {each.spec}")
        for row in each.rows:
            lines.append("  " + "".join(piece.plain() for piece in row))
    return "\n".join(lines)


def _in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this; a plain IPython shell has none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _shown(tokenizer: Any, batch_or_text: Any, config: LoReftConfig) -> list[_Shown]:
    """Mark all rows, once for each spec of the config."""
    batches = list(_batches(tokenizer, batch_or_text))
    if isinstance(config.positions, dict):
        specs = [(f"layers {layers}", Positions.parse(spec)) for layers, spec in config.positions.items()]
    else:
        layers = "all layers" if config.layers == "all" else f"layers {config.layers}"
        specs = [(layers, Positions.parse(config.positions))]
    shown = []
    for layers, spec in specs:
        rows = [row for batch in batches for row in _rows(tokenizer, batch, config, spec)]
        shown.append(_Shown(layers, spec, rows))
    return shown


def _batches(tokenizer: Any, given: Any) -> Iterator[Mapping[str, Any]]:
    """Yield what `show_positions` was given as batches: one for each prompt, chat or batch."""
    if isinstance(given, Mapping):
        yield given
    elif isinstance(given, str):
        yield {"input_ids": torch.tensor([tokenizer(given)["input_ids"]])}
    elif isinstance(given, list) and given and isinstance(given[0], Mapping):
        ids = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True)["input_ids"]
        yield {"input_ids": torch.tensor([ids])}
    elif isinstance(given, list) and given:
        for text in given:
            yield from _batches(tokenizer, text)
    else:
        raise ValueError(f"batch_or_text={given!r}: expected a prompt, a list of prompts, a chat, or a batch.")


def _rows(tokenizer: Any, batch: Mapping[str, Any], config: LoReftConfig, spec: Positions) -> Iterator[list[_Piece]]:
    """Yield each row of a batch, without its padding, cut into pieces::

    tokens      What  is   it   ?
    of_token      0   -1    1   1      the number of the group that edits each token, -1: none
    pieces      [f1: What] is[l2: it| ?]
    """
    ids: Tensor = batch["input_ids"]  # (batch, seq)
    mask: Tensor | None = batch.get("attention_mask")  # (batch, seq)
    slots = batch.get(POSITIONS)  # (batch, n)
    if slots is None:
        has_answers = config.task_type in (None, TaskType.CAUSAL_LM)
        marks = _marks(tokenizer, config) if has_answers else None
        slots = resolve(config.layout, Batch.read(batch, ids, has_answers).turns(marks).answers())
    of_token = np.full(ids.numel(), -1)  # (batch * seq,)
    for number, group in enumerate(spec.groups):
        index = make_index(slots, ids.shape[1], config.layout, Layout((group,)), "all")
        of_token[index.edited.cpu().numpy()] = number
    of_token = of_token.reshape(ids.shape)  # (batch, seq)
    for row in range(len(ids)):
        real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()  # (seq,)
        texts = token_texts(tokenizer, ids[row][real].tolist())
        numbers = of_token[row][real.cpu().numpy()].tolist()
        pieces: list[_Piece] = []
        begin = 0
        for end in range(1, len(texts) + 1):
            if end == len(texts) or numbers[end] != numbers[begin]:
                edited_by = spec.groups[numbers[begin]] if numbers[begin] >= 0 else None
                pieces.append(_Piece(tuple(texts[begin:end]), edited_by))
                begin = end
        yield pieces


def _marks(tokenizer: Any, config: LoReftConfig) -> Marks | None:
    """Return the marks of the config; if it has none, those that a Trainer finds from the tokenizer."""
    known = Marks.of(config.response_template, config.instruction_template)
    if known is not None:
        return known
    found = find_marks(tokenizer)
    if found is None or found.problem is not None:
        return None
    return Marks.of(found.response_template, found.instruction_template)


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return what each token adds to the text. A token decoded by itself may lose the space before it.

    A character of several tokens, such as an emoji, counts as the last one's; the others are `_PART`.
    """
    texts: list[str] = []
    before = ""
    begin = 0  # the first token that `before` lacks
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end])
        if now.endswith(_INCOMPLETE) and end < len(ids):
            texts.append(_PART)
            continue
        new = now.removeprefix(before) if now.startswith(before) else tokenizer.decode(ids[begin:end])
        texts.append(new.replace("\n", "⏎"))
        before, begin = now, end
    return texts
