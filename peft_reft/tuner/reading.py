"""From a forward's inputs to the source of its positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..positions.batch import Batch, can_be_read, is_matrix, remember
from ..positions.cached import Continued
from ..positions.memory import CacheMemory
from ..positions.resolve import IGNORED
from ..positions.sources import CONTINUOUS_BATCHING, FromBatch, Given, Source, Unread, check_positions
from .caches import filled
from .forward import (
    Attachment,
    current_generation,
)

LOST_CACHE = (
    "A forward beside `generate`, such as that of `guidance_scale`, was given a mask of more tokens than ids, and no "
    "cache that holds the others: transformers hands on a cache named `past_key_values` alone, so this model has lost "
    "what came before (with LoReFT or without). Pass use_cache=False to `generate`."
)


_NO_TOKENS = torch.empty(0)


def source_tokens(given: dict[str, Any]) -> Tensor:
    """The tokens of a model's inputs; an empty tensor if it was given none."""
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
) -> Source:
    """Where the positions of a forward come from that is no step of `generate`."""
    if "write_index" in given:  # which only transformers' paged attention is given
        raise ValueError(CONTINUOUS_BATCHING)
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
    if not torch.is_grad_enabled() and can_be_read(tokens):  # evaluation, which may ask once more for the logits
        remember(batch)
    if generation is None or not has_answers or batch.says_where_prompts_end:
        return FromBatch(batch, has_answers, training)
    # A forward that somebody makes beside `generate`, such as that of classifier-free guidance.
    if generation.beside is None:
        generation.beside = shape[1]
    if shape[1] > generation.beside:
        batch = Batch(real=batch.real, ids=batch.ids, answer_tokens=shape[1] - generation.beside)
    return FromBatch(batch, has_answers, training, is_prompt=True)


def read_decoder(given: dict[str, Any], training: bool) -> Source:
    """Where the decoder's prompt is: what stands before the first token of the answer, a start token at the least."""
    labels: Tensor | None = given.get("labels")
    names = ("decoder_inputs_embeds", "decoder_input_ids")
    tokens: Tensor | None = next((t for name in names if (t := given.get(name)) is not None), labels)
    if tokens is None or tokens.ndim < 2:  # BART's classifiers read the prompt once more
        tokens = given.get("input_ids")
    if tokens is None:
        return Unread(None, None)
    shape = (tokens.shape[0], tokens.shape[1])
    cache = given.get("past_key_values")
    if cache is not None and labels is None and filled(cache) != 0:
        return Continued(tokens, None, None, None, None)
    mask = given.get("decoder_attention_mask")
    if labels is not None and is_matrix(labels, shape):
        # The label of a decoder's token is the token after it.
        labels = F.pad(labels, (1, -1), value=IGNORED)
        if mask is None:  # behind the last of them there is padding
            mask = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
            mask[:, 0] = True
    else:
        labels = None
    batch = Batch.read({"attention_mask": mask, "labels": labels}, tokens, has_answers=True)
    return FromBatch(batch, has_answers=True, training=training, is_prompt=not training)
