"""How much each edit changes its hidden state, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..positions.index import PositionIndex
from ..tuner.forward import current
from ..tuner.layer import LoReftLayer
from .looking import evaluating, hidden_of
from .show import token_texts


def edit_norms(model: nn.Module, batch: Mapping[str, Any]) -> np.ndarray:
    """Measure how much the active adapters change each hidden state, ‖Φ(h) − h‖ / ‖h‖.

    Args:
        model: with LoReFT adapters. It runs in eval mode, without gradients, and is left as it was.
        batch: inputs of the model.

    Returns:
        (layers, batch, seq) float32: one entry for each edited module, in the order of the model; NaN at a token that
        is not edited.

    Raises:
        ValueError: the model has no LoReFT adapter, or no layer edits a token of the batch.

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
    norms: dict[LoReftLayer, np.ndarray] = {}

    def take(layer: LoReftLayer, relative: Tensor) -> None:
        norms[layer] = relative.cpu().numpy()

    handles = watch_norms(layers, take)
    try:
        with torch.no_grad(), evaluating(model):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not norms:
        raise ValueError("No layer edits a token of this batch: no LoReFT adapter is active, or no position is in it.")
    shape = next(iter(norms.values())).shape  # (batch, seq)
    unedited = np.full(shape, np.nan, np.float32)
    return np.stack([norms.get(layer, unedited) for layer in layers])


def watch_norms(layers: list[LoReftLayer], take: Callable[[LoReftLayer, Tensor], None]) -> list[RemovableHandle]:
    """Call `take` whenever one of `layers` has edited. The forward itself stays as it is.

    Args:
        layers: of a model with LoReFT adapters.
        take: is given the layer, and ‖Φ(h) − h‖ / ‖h‖ as (batch, seq) float32 without a gradient: NaN at a token that
            is not edited.

    Returns:
        The handles of the hooks. Whoever calls removes them.
    """
    before: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        before[layer] = hidden_of(args[0]).detach().clone()  # the layer may edit it in place

    @torch.no_grad()
    def compare(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        h = before.pop(layer).float()  # (batch, seq, d) or (tokens, d)
        edited = hidden_of(output).float()
        indices = _indices(layer, h)
        if not indices:
            return
        relative = ((edited - h).norm(dim=-1) / h.norm(dim=-1)).reshape(-1)  # (tokens,)
        is_edited = torch.zeros_like(relative, dtype=torch.bool)  # (tokens,)
        for index in indices:
            is_edited |= index.edited
        take(layer, torch.where(is_edited, relative, torch.nan).reshape(indices[0].shape))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    return handles + [layer.register_forward_hook(compare) for layer in layers]


def _indices(layer: LoReftLayer, hidden: Tensor) -> list[PositionIndex]:
    """Return where each active adapter of `layer` edits in the forward that runs."""
    forward = current(layer.attachment)
    if forward is None or layer.disable_adapters or layer.merged:
        return []
    active: Any = layer.active_adapters  # a list of names; mypy does not read PEFT's types
    indices = []
    for name in active:
        if name in layer.plans:
            index = forward.index(name, layer.plans[name], hidden)
            if index is not None:
                indices.append(index)
    return indices


def plot_edit_norms(
    norms: np.ndarray, row: int = 0, tokens: Sequence[Any] | None = None, axes: Any = None, tokenizer: Any = None
) -> Any:
    """Draw `edit_norms` as a heat map, layers by positions. Needs matplotlib, the extra `viz`.

    Args:
        norms: (layers, batch, seq), from `edit_norms`.
        row: which row of the batch.
        tokens: labels of the positions: texts, or token ids if `tokenizer` is given.
        axes: matplotlib axes to draw on; None: new ones.
        tokenizer: makes texts of token ids, and of tokens in the symbols of its vocabulary (`Ġcapital`).

    Returns:
        The matplotlib axes.
    """
    import matplotlib.pyplot as plt

    layers, _, seq = norms.shape
    labels: Sequence[Any] = [] if tokens is None else tokens
    if tokenizer is not None:
        labels = _labels(tokenizer, labels)
    if axes is None:
        height = max(2, 0.25 * layers) + 0.1 * max(map(len, labels), default=0)  # 0.1: a letter
        _, axes = plt.subplots(figsize=(max(4, 0.3 * seq), height), layout="constrained")
    image = axes.imshow(norms[:, row], aspect="auto", origin="lower", cmap="viridis", vmin=0)
    axes.set(xlabel="position", ylabel="layer", title="‖Φ(h) − h‖ / ‖h‖")
    if tokens is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)  # "$" is a text here
    axes.figure.colorbar(image, ax=axes)
    return axes


def _labels(tokenizer: Any, tokens: Sequence[Any]) -> list[str]:
    ids = [tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else int(token) for token in tokens]
    return token_texts(tokenizer, ids)
