"""The wrapped `generate`: notes the prompts of a call, and hands each of its forwards its step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..patching import original_of
from ..positions.batch import POSITIONS, SUBSPACES
from ..positions.generation import GenerateStep, Generation
from ..positions.memory import CacheMemory, set_memory
from ..positions.sources import CONTINUOUS_BATCHING, check_positions, check_subspaces
from .caches import cache_of_inputs, counted, filled, memory_of_length
from .forward import (
    ATTRIBUTE,
    current_generation,
    generating,
)

STEP = "_peft_reft_step"
"""Key by which the wrapped `generate` hands each forward its step."""


def refuse_batch(model: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate_batch`: its forwards run in a thread of transformers', where an error would only be logged."""
    raise ValueError(CONTINUOUS_BATCHING)


def generate(model: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model with LoReFT: notes the prompts, and hands each forward its step."""
    explicit = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    original = original_of(model, "generate", inner)
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        return original(*args, **kwargs)
    if attachment.decoder is not None:
        generation = Generation(None, subspaces=subspaces)
        handle = None
        if explicit is not None or subspaces is not None:  # positions count in the encoder's input
            hand_on = partial(_add_given, given={POSITIONS: explicit, SUBSPACES: subspaces})
            handle = model.get_encoder().register_forward_pre_hook(hand_on, with_kwargs=True, prepend=True)
        try:
            with generating(attachment, generation):
                return original(*args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
    generation = _note_prompts(model, args, kwargs, explicit, subspaces)
    with generating(attachment, generation):
        output = original(*args, **kwargs)
    _note_generated(generation, kwargs, output)
    return output


def _note_generated(generation: Generation, kwargs: dict[str, Any], output: Any) -> None:
    """Have the cache that `generate` leaves know what it holds."""
    given = cache_of_inputs(kwargs)
    cache = given if given is not None else getattr(output, "past_key_values", None)
    if cache is None:
        return
    length, sequences = counted(cache), getattr(output, "sequences", output)
    if generation.offset and generation.ids is not None:  # only what is new was given
        sequences = torch.cat([generation.ids[:, : generation.offset].to(sequences.device), sequences], 1)
    if length is None:  # the last token has not been fed to it
        length = sequences.shape[1] - 1
    moved = getattr(output, "beam_indices", None) is not None
    memory = CacheMemory.unknown(length) if moved else generation.remember(sequences, length)
    set_memory(cache, memory)


def prepare_inputs(model: Any, inner: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`prepare_inputs_for_generation`: adds the step of the call of `generate` that runs in this thread."""
    inputs: dict[str, Any] = original_of(model, "prepare_inputs_for_generation", inner)(*args, **kwargs)
    attachment = model.__dict__.get(ATTRIBUTE)
    generation = None if attachment is None else current_generation(attachment)
    if generation is None:
        return inputs
    names = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids")
    tokens = next(t for name in names if (t := inputs.get(name)) is not None)
    seq = tokens.shape[1]
    if attachment.decoder is not None:
        if generation.real is None:  # a decoder's prompt is what it starts with
            generation.real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        whole = args[0] if args else kwargs.get("decoder_input_ids", tokens)
        start = whole.shape[1] - seq
    else:
        start = _start(generation, args[0] if args else kwargs.get("input_ids", tokens), seq, kwargs)
    inputs[STEP] = GenerateStep(generation, start, (tokens.shape[0], seq))
    if generation.subspaces is not None:
        inputs[SUBSPACES] = generation.subspaces
    return inputs


def _start(generation: Generation, ids: Tensor, seq: int, kwargs: dict[str, Any]) -> int:
    """Column of the document at which a step of `seq` tokens begins.

    Args:
        generation: the call of `generate`.
        ids: (rows, n) int64: what has been given and written so far; if the prompt is fed in chunks, a chunk.
        seq: number of the step's tokens, the last of them.
        kwargs: of `prepare_inputs_for_generation`.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        # XLM puts a token behind the row, of which the mask does not know.
        return max(0, mask.shape[1] - seq + (0 if generation.has_mask else generation.offset))
    # transformers drops a mask of ones.
    if ids.shape[1] > seq:
        return generation.offset + ids.shape[1] - seq
    cache = cache_of_inputs(kwargs)
    return 0 if cache is None else filled(cache) or 0


def _note_prompts(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], explicit: Any, subspaces: Tensor | None
) -> Generation:
    names = ("inputs_embeds", "input_ids", "inputs")
    tokens = next((t for name in names if (t := kwargs.get(name)) is not None), args[0] if args else None)
    ids = next((t for name in names[1:] if (t := kwargs.get(name)) is not None), args[0] if args else None)
    cache = cache_of_inputs(kwargs)
    past = 0 if cache is None else filled(cache) or 0
    memory = None if not past else memory_of_length(cache, past)
    mask = kwargs.get("attention_mask")
    if tokens is None:  # generation from the begin-of-sequence token alone, one row
        real = torch.ones(1, 1, dtype=torch.bool)
    elif mask is not None:
        real = mask.bool().to(tokens.device)
    else:
        real = _infer_mask(model, tokens, kwargs).to(tokens.device)
        if past >= real.shape[1]:  # only what is new was passed, behind a cache
            real = F.pad(real, (past, 0), value=True)
    length = real.shape[1]
    if explicit is not None:
        explicit = check_positions(explicit, (real.shape[0], length))
    offset = 0 if tokens is None else length - tokens.shape[1]
    known = None
    if ids is not None and ids.ndim == 2:
        known = F.pad(ids, (length - ids.shape[1], 0), value=-1)
        before = None if memory is None else memory.all_ids()
        if before is not None and before.shape[0] == known.shape[0]:
            if ids.shape[1] < length:  # only what is new was passed
                known[:, : before.shape[1]] = before
            elif not torch.equal(known[:, : before.shape[1]], before):
                raise ValueError(
                    "The cache that `generate` was given holds other tokens than its input begins with. Pass the "
                    "cache of the same document, or none."
                )
    # Not `model.device`, which is "meta" where weights are offloaded.
    return Generation(
        real=real,
        ids=known,
        explicit=explicit,
        past=past,
        offset=offset,
        has_mask=mask is not None,
        memory=memory,
        subspaces=subspaces,
    )


def _infer_mask(model: Any, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Without a mask, what `generate` assumes: padding tokens are padding, unless they may end an answer too."""
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    settings = kwargs.get("generation_config") or model.generation_config
    pad = kwargs.get("pad_token_id", settings.pad_token_id)
    eos = kwargs.get("eos_token_id", settings.eos_token_id)
    eos = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or tokens.ndim != 2 or pad in eos:
        return everything
    real: Tensor = tokens != pad
    return real


def _add_given(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
    return args, {**kwargs, **given}
