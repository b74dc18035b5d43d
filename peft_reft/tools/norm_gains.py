"""How much larger the norms of a model make an edit, beside the hidden state that is edited."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..tuner.layer import LoReftLayer
from .looking import evaluating, hidden_of, without_edits

_TOKENS = 32
_SHARE = 0.1
"""Of the hidden state's length: that of the direction which is added to it. A norm is linear there, and bf16 is exact
enough."""


@torch.no_grad()
def norm_gains(model: PeftModel, tokens: Tensor | None = None) -> dict[LoReftLayer, float]:
    """Measure what share of a norm's output an edit changes, over the share of the hidden state that it changes.

    A norm that reads an edited hidden state h gives out w ∘ h / |h|. If h is nearly all in a few dimensions, and w is
    small there and large elsewhere, an edit along a random direction counts for much more behind the norm than
    before it: 10 times and more in Gemma 3, 0.8 to 1.3 times in SmolLM2.

    One forward of the base model shows it, on 32 tokens out of the whole vocabulary. A text gives nearly the same
    (docs/one_rate.md); its first token, whose gain can be several times as high, does not count. A norm is a module
    whose class has "Norm" in its name and which is given the very tensor that an edited module gives out.

    Args:
        model: with LoReFT adapters. It runs in eval mode, without gradients, and is left as it was.
        tokens: (batch, seq) ids, all real; None: 32 out of the vocabulary.

    Returns:
        For each edited module whose output a norm reads, the median over tokens. If several read it, that of the
        first.

    Raises:
        ValueError: the model does not run on tokens alone, or its weights are not in this process.
    """
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    given_out: dict[int, tuple[Tensor, LoReftLayer]] = {}  # by id; the tensor is kept, so that no other has its id
    gains: dict[LoReftLayer, Tensor] = {}

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(layer, LoReftLayer):
            hidden = hidden_of(output)
            given_out[id(hidden)] = hidden, layer

    def compare(norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden, layer = given_out.get(id(args[0]), (None, None)) if args else (None, None)
        if hidden is None or layer is None or layer in gains:
            return
        random = torch.Generator().manual_seed(0)
        direction = torch.randn(hidden.shape, generator=random).to(hidden)  # (..., tokens, d)
        direction *= _SHARE * hidden.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
        moved = (norm.forward(hidden + direction, *args[1:]) - output).float().norm(dim=-1)  # (..., tokens)
        gains[layer] = (moved / output.float().norm(dim=-1) / _SHARE).nanmedian()  # NaN: a padding token is 0

    handles = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, LoReftLayer)]
    handles += [norm.register_forward_hook(compare) for norm in norms]
    try:
        with evaluating(model), without_edits(model):
            model(**_inputs(model, tokens))
        return {layer: gain.item() for layer, gain in gains.items()}
    except Exception as error:
        raise ValueError(
            f"norm_gains=True runs the model once, on tokens alone. {type(model.get_base_model()).__name__} fails: "
            f"{type(error).__name__}: {error}. Give norm_gains=False, and try a third and a tenth of the learning "
            "rate too."
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _inputs(model: PeftModel, tokens: Tensor | None) -> dict[str, Tensor]:
    """Inputs of a forward: the same tokens for the encoder and the decoder."""
    base = model.get_base_model()
    if tokens is None:
        table = base.get_input_embeddings().weight  # (vocabulary, d)
        if table.is_meta or not table.numel():
            raise RuntimeError("its embeddings are empty")
        tokens = torch.linspace(0, len(table) - 1, _TOKENS, device=table.device).long()[None]  # (1, tokens)
    if base.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}
