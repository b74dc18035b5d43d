"""See what a spec of positions edits, and how much each edit changes."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import TaskType
from torch import Tensor, nn

from ..config import LoReftConfig
from ..positions.batch import POSITIONS, Batch
from ..positions.chat.template import find_marks
from ..positions.groups import Group
from ..positions.index import make_index
from ..positions.layout import Layout
from ..positions.marks import Marks
from ..positions.resolve import resolve
from ..positions.spec import Positions
from ..tuner.forward import current
from ..tuner.layer import LoReftLayer


@dataclass(frozen=True)
class _Piece:
    """Neighbouring tokens that are edited by one group, or by none."""

    tokens: tuple[str, ...]
    group: Group | None

    def plain(self) -> str:
        return f"[{self.group}: {'|'.join(self.tokens)}]" if self.group else "".join(self.tokens)

    def ansi(self) -> str:
        if not self.group:
            return "".join(self.tokens)
        return f"\033[30;{self.group.colour[0]}m{'|'.join(self.tokens)}\033[0m"

    def html(self) -> str:
        tokens = [html.escape(token) for token in self.tokens]
        if not self.group:
            return "".join(tokens)
        style = f"background:{self.group.colour[1]};color:#000;border-radius:3px"
        return f'<span style="{style}" title="{self.group}">{"|".join(tokens)}</span>'


def show_positions(tokenizer: Any, batch_or_text: Any, config: LoReftConfig) -> None:
    """Print texts with the tokens that `config` edits marked: in colour on a terminal, as HTML in a notebook.

    Args:
        tokenizer: of the model.
        batch_or_text: a prompt; a list of prompts; a chat as a list of `{"role": ..., "content": ...}`; or a batch as
            a collator makes it, with `input_ids` (batch, seq) and, where present, `attention_mask`, `labels`,
            `position_ids` and `intervention_positions`, read as the model reads them.
        config: the adapter's config.

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
    shown = [
        (f"{layers}: {spec}, {spec.describe()}", rows)
        for layers, spec, rows in _marked(tokenizer, batch_or_text, config)
    ]
    if _in_notebook():
        from IPython.display import HTML, display  # type: ignore[import-not-found,unused-ignore]

        lines = [
            f"<div>{html.escape(title)}</div>"
            + "".join(f'<pre style="white-space:pre-wrap">{"".join(p.html() for p in row)}</pre>' for row in rows)
            for title, rows in shown
        ]
        display(HTML("".join(lines)))
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for title, rows in shown:
        print(title)
        for row in rows:
            print("  " + "".join(piece.ansi() if colour else piece.plain() for piece in row))


def marked_row(tokenizer: Any, batch: Mapping[str, Any], config: LoReftConfig) -> str:
    """The first row of a batch as text, its edited tokens in brackets, once for each spec of the config.

    Args:
        tokenizer: of the model.
        batch: as for `show_positions`; tensors of other shapes than (batch, seq) are left out.
        config: the adapter's config.
    """
    ids = batch["input_ids"]
    row = {
        name: value[:1]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.ndim == 2 and (value.shape == ids.shape or name == POSITIONS)
    }
    lines = []
    for where, spec, rows in _marked(tokenizer, row, config):
        lines += [f"{where}: {spec}", *("  " + "".join(piece.plain() for piece in pieces) for pieces in rows)]
    return "\n".join(lines)


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _marked(
    tokenizer: Any, batch_or_text: Any, config: LoReftConfig
) -> Iterator[tuple[str, Positions, list[list[_Piece]]]]:
    batches = list(_batches(tokenizer, batch_or_text))
    if isinstance(config.positions, dict):
        specs = [(f"layers {layers}", Positions.parse(spec)) for layers, spec in config.positions.items()]
    else:
        layers = "all layers" if config.layers == "all" else f"layers {config.layers}"
        specs = [(layers, Positions.parse(config.positions))]
    for where, spec in specs:
        yield where, spec, [row for batch in batches for row in _rows(tokenizer, batch, config, spec)]


def _batches(tokenizer: Any, given: Any) -> Iterator[Mapping[str, Any]]:
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
    ids: Tensor = batch["input_ids"]
    mask: Tensor | None = batch.get("attention_mask")
    slots = batch.get(POSITIONS)
    if slots is None:
        has_answers = config.task_type in (None, TaskType.CAUSAL_LM)
        marks = _marks(tokenizer, config) if has_answers else None
        slots = resolve(config.layout, Batch.read(batch, ids, has_answers).turns(marks).answers())
    of_token = np.full(ids.numel(), -1)
    for number, group in enumerate(spec.groups):
        index = make_index(slots, ids.shape[1], config.layout, Layout((group,)), "all")
        of_token[index.edited.cpu().numpy()] = number
    of_token = of_token.reshape(ids.shape)
    for row in range(len(ids)):
        real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()
        texts = _texts(tokenizer, ids[row][real].tolist())
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
    """Of the config; else those that a Trainer finds by the tokenizer."""
    known = Marks.of(config.response_template, config.instruction_template)
    if known is not None:
        return known
    found = find_marks(tokenizer)
    return None if found is None or found.problem else Marks.of(found.response_template, found.instruction_template)


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; decoded by itself it may lose the space before it."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end])
        new = now.removeprefix(before) if now.startswith(before) else tokenizer.decode(ids[end - 1 : end])
        texts.append(new.replace("\n", "⏎"))
        before = now
    return texts


def edit_norms(model: nn.Module, batch: Mapping[str, Any]) -> np.ndarray:
    """How much the active adapters change each hidden state, ‖Φ(h) − h‖ / ‖h‖.

    Args:
        model: with LoReFT.
        batch: inputs of the model.

    Returns:
        (layers, batch, seq) float32: one entry for each edited module, in the order of the model; NaN where no token
        is edited.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_reft import LoReftConfig, edit_norms
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
        >>> model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", positions="f1+l1"))
        >>> edit_norms(model, {"input_ids": torch.arange(4).unsqueeze(0)})  # new: nothing is changed yet
        array([[[ 0., nan, nan,  0.]],
        <BLANKLINE>
               [[ 0., nan, nan,  0.]]], dtype=float32)
    """
    layers = [module for module in model.modules() if isinstance(module, LoReftLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoReFT adapter.")
    found: dict[int, np.ndarray] = {}
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), _recorded(layers, found):
        try:
            model.eval()
            model(**batch)
        finally:
            for module, training in modes.items():
                module.training = training
    shape = next(iter(found.values())).shape
    return np.stack([found.get(number, np.full(shape, np.nan, np.float32)) for number in range(len(layers))])


@contextmanager
def _recorded(layers: list[LoReftLayer], found: dict[int, np.ndarray]) -> Iterator[None]:
    """Fill `found` with the norms of each layer, by its place in `layers`."""
    before: dict[nn.Module, Tensor] = {}
    number = {layer: n for n, layer in enumerate(layers)}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        hidden = args[0][0] if isinstance(args[0], tuple) else args[0]
        before[layer] = hidden.clone()  # it may be edited in place

    def compare(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        h = before.pop(layer).float()
        edited = (output[0] if isinstance(output, tuple) else output).float()
        forward = current(layer.attachment)
        assert forward is not None
        indices = [
            index
            for name in layer.active_adapters
            if name in layer.plans and (index := forward.index(name, layer.plans[name], h)) is not None
        ]
        if not indices:
            return
        norms = ((edited - h).norm(dim=-1) / h.norm(dim=-1)).reshape(-1)
        seen = torch.zeros_like(norms, dtype=torch.bool)
        for index in indices:
            seen |= index.edited
        norms = torch.where(seen, norms, torch.nan).reshape(indices[0].shape)
        found[number[layer]] = norms.cpu().numpy()

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    handles += [layer.register_forward_hook(compare) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plot_edit_norms(norms: np.ndarray, row: int = 0, tokens: list[str] | None = None, axes: Any = None) -> Any:
    """Heat map of `edit_norms`, layers by positions; needs matplotlib (extra `viz`).

    Args:
        norms: (layers, batch, seq), from `edit_norms`.
        row: which row of the batch.
        tokens: labels of the positions.
        axes: matplotlib axes to draw on; default: new ones.

    Returns:
        The matplotlib axes.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(figsize=(max(4, 0.3 * norms.shape[2]), max(2, 0.25 * norms.shape[0])))
    image = axes.imshow(norms[:, row], aspect="auto", origin="lower", cmap="viridis", vmin=0)
    axes.set(xlabel="position", ylabel="layer", title="‖Φ(h) − h‖ / ‖h‖")
    if tokens is not None:
        axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    axes.figure.colorbar(image, ax=axes)
    return axes
