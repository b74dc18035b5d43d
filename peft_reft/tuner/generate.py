"""The wrapped `generate`: it notes the prompts of a call, and tells each forward which step it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..patching import original_of
from ..positions.batch import POSITIONS, SUBSPACES
from ..positions.generation import GenerateStep, Generation
from ..positions.memory import CacheMemory, set_memory
from ..positions.rollouts import Rollouts
from ..positions.sources import check_positions, check_subspaces
from .caches import cache_of_inputs, counted, filled, memory_of_length
from .forward import ATTRIBUTE, Attachment, current_generation, generating

STEP = "_peft_reft_step"
"""Keyword argument by which each forward of `generate` is told which step it is."""


def generate(model: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """The wrapped `generate` of a model with LoReFT."""
    explicit = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    original = original_of(model, "generate", inner)
    attachment: Attachment | None = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        return original(*args, **kwargs)
    if attachment.decoder is not None:
        hand_on = {POSITIONS: explicit, SUBSPACES: subspaces}
        with generating(attachment, Generation(None, subspaces=subspaces)), _given_to_encoder(model, hand_on):
            return original(*args, **kwargs)
    generation = _note_prompts(model, args, kwargs, explicit=explicit, subspaces=subspaces)
    with generating(attachment, generation):
        output = original(*args, **kwargs)
    _note_generated(generation, kwargs, output)
    if attachment.rollouts is not None:
        _note_rollout(attachment.rollouts, generation, output)
    return output


@contextmanager
def _given_to_encoder(model: Any, given: dict[str, Any]) -> Iterator[None]:
    """Hand `given` to the encoder, in whose inputs positions count, unless it is all None."""
    if all(value is None for value in given.values()):
        yield
        return
    encoder: nn.Module = model.get_encoder()
    handle = encoder.register_forward_pre_hook(partial(_add_given, given=given), with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _note_generated(generation: Generation, kwargs: dict[str, Any], output: Any) -> None:
    """Note in the cache that `generate` leaves what it holds."""
    cache = cache_of_inputs(kwargs)
    if cache is None:
        cache = getattr(output, "past_key_values", None)
    if cache is None:
        return
    length = counted(cache)
    sequences: Tensor = getattr(output, "sequences", output)  # (rows, n)
    if generation.offset and generation.ids is not None:  # `generate` was given only the new part of the document
        before = generation.ids[:, : generation.offset].to(sequences.device)
        sequences = torch.cat([before, sequences], 1)  # (rows, offset + n)
    if length is None:  # the last token has not been fed to the cache
        length = sequences.shape[1] - 1
    moved = getattr(output, "beam_indices", None) is not None
    memory = CacheMemory.unknown(length) if moved else generation.remember(sequences, length)
    set_memory(cache, memory)


def _note_rollout(rollouts: Rollouts, generation: Generation, output: Any) -> None:
    """Note the prompts of a call of `generate` in a training, if they were given as token ids."""
    if generation.ids is None or generation.real is None or generation.explicit is not None:
        return
    sequences: Tensor = getattr(output, "sequences", output)  # (rows, n)
    length = generation.real.shape[1] - generation.offset
    if sequences.shape[1] <= length:
        return  # nothing was generated
    times = len(sequences) // len(generation.real)
    prompts = [ids[real].tolist() for ids, real in zip(generation.ids, generation.real)]
    rollouts.note(
        (wanted for wanted, _ in generation.used.values()),
        [prompt for prompt in prompts for _ in range(times)],
        sequences[:, length].tolist(),
    )


def prepare_inputs(model: Any, inner: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The wrapped `prepare_inputs_for_generation`: adds the step of the `generate` that runs in this thread."""
    inputs: dict[str, Any] = original_of(model, "prepare_inputs_for_generation", inner)(*args, **kwargs)
    attachment: Attachment | None = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        return inputs
    generation = current_generation(attachment)
    if generation is None:
        return inputs
    tokens = _first_given(inputs, "decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids")
    assert tokens is not None
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

    ::

        columns   0 1 2 3 4 5 6      offset = 2: `generate` was given the document from column 2 on
        in ids        a b c d e      n = 5
        the step            d e      seq = 2, so it begins at column 2 + 5 - 2 = 5

    Args:
        generation: the call of `generate`.
        ids: (rows, n) int64: what has been given and written so far; if the prompt is fed in chunks, a chunk.
        seq: number of the step's tokens, which are the last of `ids`.
        kwargs: of `prepare_inputs_for_generation`.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        before_mask = 0 if generation.has_mask else generation.offset
        # XLM puts a token behind the row that the mask does not count, so the difference may be -1.
        return max(0, before_mask + mask.shape[1] - seq)
    # transformers drops a mask of ones.
    if ids.shape[1] > seq:
        return generation.offset + ids.shape[1] - seq
    cache = cache_of_inputs(kwargs)
    return 0 if cache is None else filled(cache) or 0


def _note_prompts(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], explicit: Any, subspaces: Tensor | None
) -> Generation:
    """Read the prompts of a call of `generate` from its arguments.

    Args:
        model: the base model.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call, without the next two.
        explicit: `intervention_positions`, or None.
        subspaces: rows of R that edits stay within, or None.

    Raises:
        ValueError: `explicit` does not fit, or the cache holds other tokens than the input begins with.
    """
    first = args[0] if args else None
    ids = _first_given(kwargs, "input_ids", "inputs")
    ids = first if ids is None else ids
    tokens = _first_given(kwargs, "inputs_embeds")
    tokens = ids if tokens is None else tokens
    cache = cache_of_inputs(kwargs)
    past = 0 if cache is None else filled(cache) or 0
    memory = memory_of_length(cache, past) if past else None
    mask = kwargs.get("attention_mask")
    if tokens is None:  # one row that begins with the begin-of-sequence token
        real = torch.ones(1, 1, dtype=torch.bool)
    elif mask is not None:
        real = mask.bool().to(tokens.device)
    else:
        real = _infer_mask(model, tokens, kwargs).to(tokens.device)
        if past >= real.shape[1]:  # the call was given only the new part of the document, behind a cache
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
            if ids.shape[1] < length:  # the call was given only the new part
                known[:, : before.shape[1]] = before
            elif not torch.equal(known[:, : before.shape[1]], before):
                raise ValueError(
                    "The cache that `generate` was given holds other tokens than its input begins with. Pass the "
                    "cache of the same document, or none."
                )
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
    """(rows, n) bool, the real tokens as `generate` assumes them without a mask.

    Padding tokens are padding, unless they may end an answer too.
    """
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    settings = kwargs.get("generation_config") or model.generation_config
    pad = kwargs.get("pad_token_id", settings.pad_token_id)
    eos = kwargs.get("eos_token_id", settings.eos_token_id)
    eos = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or tokens.ndim != 2 or pad in eos:
        return everything
    real: Tensor = tokens != pad
    return real


def _first_given(given: dict[str, Any], *names: str) -> Tensor | None:
    """The first of the arguments `names` that is not None."""
    for name in names:
        if given.get(name) is not None:
            tensor: Tensor = given[name]
            return tensor
    return None


def _add_given(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
    return args, {**kwargs, **given}
