"""Make the position source of a forward from its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..positions.batch import Batch, can_be_read, is_matrix, remember
from ..positions.cached import Continued
from ..positions.memory import CacheMemory
from ..positions.resolve import IGNORED
from ..positions.sources import FromBatch, Given, PositionSource, Unread, check_positions
from .caches import filled
from .forward import Attachment, current_generation

LOST_CACHE = (
    "A forward beside `generate`, such as that of `guidance_scale`, was given a mask of more tokens than ids, and no "
    "cache that holds the others: transformers hands on a cache named `past_key_values` alone, so this model has lost "
    "what came before (with LoReFT or without). Pass use_cache=False to `generate`."
)


_NO_TOKENS = torch.empty(0)


def source_tokens(given: dict[str, Any]) -> Tensor:
    """The token ids or embeddings among a model's inputs; an empty tensor if it was given none."""
    for name in ("inputs_embeds", "input_ids"):
        tokens: Tensor | None = given.get(name)
        if tokens is not None:
            return tokens
    return _NO_TOKENS


def read(
    attachment: Attachment,
    given: dict[str, Any],
    positions: Any,
    training: bool,
    past: int | None = 0,
    memory: CacheMemory | None = None,
) -> PositionSource:
    """Make the position source of a forward that is no step of `generate`.

    Args:
        attachment: of the model.
        given: the inputs of the forward, by name.
        positions: `intervention_positions`, or None.
        training: whether the forward is one of training, with gradients.
        past: number of columns in the cache that the forward was given; None if the cache does not say.
        memory: what is known of that cache.

    Raises:
        ValueError: the inputs do not say where the positions are; the message says what would.
    """
    tokens = source_tokens(given)
    if tokens.ndim < 2:
        return Unread(positions, given.get("attention_mask"))
    shape = (tokens.shape[0], tokens.shape[1])
    if positions is not None:
        return Given(check_positions(positions, shape).to(tokens.device), shape)
    has_answers = attachment.has_answers
    if past != 0:
        ids = given.get("input_ids")
        return Continued(
            tokens=tokens,
            ids=ids if is_matrix(ids, shape) else None,
            attention_mask=given.get("attention_mask"),
            past=past,
            memory=memory,
            prompt_lengths=Batch.read({}, tokens, has_answers).prompt_lengths,
        )
    generation = current_generation(attachment)
    mask = given.get("attention_mask")
    if generation is not None and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > shape[1]:
        raise ValueError(LOST_CACHE)
    batch = Batch.read(given, tokens, has_answers)
    if not torch.is_grad_enabled() and can_be_read(tokens):  # evaluation may run the batch again for its logits
        remember(batch)
    if generation is None or not has_answers or batch.says_where_prompts_end:
        return FromBatch(batch, has_answers, training)
    # A forward beside the steps of `generate`, such as that of classifier-free guidance. Its first is a prompt.
    if generation.beside is None:
        generation.beside = shape[1]
    if shape[1] > generation.beside:
        batch = Batch(real=batch.real, ids=batch.ids, answer_tokens=shape[1] - generation.beside)
    return FromBatch(batch, has_answers, training, is_prompt=True)


def read_decoder(given: dict[str, Any], training: bool) -> PositionSource:
    """Make the position source of a decoder beside an encoder.

    The decoder's prompt is what stands before the first token of the answer: a start token at least.
    """
    labels: Tensor | None = given.get("labels")
    tokens = labels
    for name in ("decoder_input_ids", "decoder_inputs_embeds"):
        if given.get(name) is not None:
            tokens = given[name]
    if tokens is None or tokens.ndim < 2:  # the decoder of BART's classifiers reads the encoder's tokens again
        tokens = given.get("input_ids")
    if tokens is None:
        return Unread(None, None)
    shape = (tokens.shape[0], tokens.shape[1])
    cache = given.get("past_key_values")
    if cache is not None and labels is None and filled(cache) != 0:
        return Continued(tokens, None, None, None, None)
    mask = given.get("decoder_attention_mask")
    if labels is not None and is_matrix(labels, shape):
        # A decoder's label stands at the token before it; `Batch` wants it at the token itself.
        labels = F.pad(labels, (1, -1), value=IGNORED)  # (batch, seq)
        if mask is None:
            # Real up to the last label:  labels  -100  5  -100  6  -100     mask  1 1 1 1 0
            labels_from_here = (labels != IGNORED).flip(1).cumsum(1).flip(1)  # (batch, seq)
            mask = labels_from_here > 0
            mask[:, 0] = True
    else:
        labels = None
    batch = Batch.read({"attention_mask": mask, "labels": labels}, tokens, has_answers=True)
    return FromBatch(batch, has_answers=True, training=training, is_prompt=not training)
