"""From a model's inputs to the `Forward` that its layers share: the hooks, and the wrapped `forward` and `generate`.

A hook before the base model's forward sees its inputs on every path that PEFT, transformers and TRL take to it, and
begins a `Forward` with a source of positions: the caller (`intervention_positions`), `generate`, the cache, or the
batch itself. A hook behind it ends the `Forward`. Parts of the model that are given tokens (its backbone, a tower)
have the same hooks, for those who call a part by itself.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architectures import modules_of_encoder
from ..conflicts import refuse_fused_head
from ..positions.batch import POSITIONS, SUBSPACES, Batch, can_be_read, is_matrix, remember
from ..positions.cached import Continued, of_rows, refuse_others
from ..positions.generation import GenerateStep, Generation
from ..positions.memory import CacheMemory, memory_of, set_memory
from ..positions.resolve import IGNORED
from ..positions.sources import CONTINUOUS_BATCHING, FromBatch, Given, Source, Unread, check_positions, check_subspaces
from ..tracing import refuse_tracing
from .forward import (
    Attachment,
    Forward,
    begin,
    current,
    current_generation,
    end,
    generating,
    innermost,
    resumed,
)

ATTRIBUTE = "peft_reft_attachment"

_HANDLES = f"{ATTRIBUTE}_handles"
_NAMES = f"{ATTRIBUTE}_arguments"
"""Names of the arguments of a part's forward, in order."""
_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes that hold a module's checkpoint function: transformers' models; torch's CheckpointWrapper."""

_CACHES = ("past_key_values", "cache_params", "state")
"""What models call the states that they keep between forwards: most; Mamba; RWKV."""

_STEP = "_peft_reft_step"
"""Key by which the wrapped `generate` hands each forward its step."""

LOST_CACHE = (
    "A forward beside `generate`, such as that of `guidance_scale`, was given a mask of more tokens than ids, and no "
    "cache that holds the others: transformers hands on a cache named `past_key_values` alone, so this model has lost "
    "what came before (with LoReFT or without). Pass use_cache=False to `generate`."
)

logger = logging.getLogger(__name__)


class _WithForward:
    """A checkpoint function that runs again, in the backward, within the `Forward` that it belongs to.

    Whether hooks are run again depends on who checkpoints what (transformers up to 5.20 does, later ones do not),
    several forwards may come before one backward (DPO), and a backward on a GPU has a thread of its own.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        forward = innermost()

        def run(*inputs: Any, **named: Any) -> Any:
            with resumed(forward):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)


def _wrap_checkpoint_functions(model: nn.Module) -> bool:
    """Wrap those of all modules; returns whether any part of the model is recomputed."""
    recomputes = False
    for module in model.modules():
        if vars(module).get("gradient_checkpointing") or "checkpoint_fn" in vars(module):
            recomputes = True
        for name in _CHECKPOINT_FUNCTIONS:
            function = vars(module).get(name)
            if function is not None and not isinstance(function, _WithForward):
                vars(module)[name] = _WithForward(function)
    return recomputes


def _unwrap_checkpoint_functions(model: nn.Module) -> None:
    for module in model.modules():
        for name in _CHECKPOINT_FUNCTIONS:
            if isinstance(function := vars(module).get(name), _WithForward):
                vars(module)[name] = function.checkpoint


def attach(model: nn.Module, has_answers: bool) -> Attachment:
    """Give `model` its attachment and hooks, and wrap `forward` and `generate`; if it has them, return the attachment.

    Args:
        model: the base model.
        has_answers: whether its rows hold prompt and answer, and labels are one a token (causal language models).
    """
    if (attachment := model.__dict__.get(ATTRIBUTE)) is not None:
        return attachment
    has_decoder = modules_of_encoder(model) is not None
    decoder = Attachment(model, has_answers=True) if has_decoder else None
    attachment = Attachment(model, has_answers, decoder)
    _hook(model, attachment, _before_forward)
    if has_decoder:
        _hook(_encoder(model), attachment, _before_encoder)
    _wrap(model, "forward", _forward, more=(POSITIONS, SUBSPACES))
    for name, wrapper in (("generate", _generate), ("generate_batch", _refuse_batch)):
        if hasattr(type(model), name):
            _wrap(model, name, wrapper)
    if hasattr(type(model), "prepare_inputs_for_generation"):
        _wrap(model, "prepare_inputs_for_generation", _prepare_inputs)
    return attachment


def attach_parts(model: nn.Module, edited: Iterable[nn.Module]) -> None:
    """Hook the parts of `model` that hold `edited` modules and are given tokens or images: backbone, towers."""
    attachment: Attachment = model.__dict__[ATTRIBUTE]
    if attachment.decoder is not None:
        return
    wanted = {id(module) for module in edited}
    for part in model.modules():
        if part is model or ATTRIBUTE in part.__dict__ or id(part) in wanted:
            continue
        takes = inspect.signature(type(part).forward).parameters
        reads = any(name in takes for name in ("input_ids", "inputs_embeds", "pixel_values"))
        if reads and any(id(module) in wanted for module in part.modules()):
            _hook(part, attachment, _before_part)
            part.__dict__[_NAMES] = list(takes)[1:]


def detach(model: nn.Module) -> None:
    """Undo `attach` and `attach_parts`."""
    for module in list(model.modules()):
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
        module.__dict__.pop(ATTRIBUTE, None)
        module.__dict__.pop(_NAMES, None)
    for name in ("forward", "generate", "generate_batch", "prepare_inputs_for_generation"):
        wrapped = model.__dict__.get(name)
        if isinstance(wrapped, _Wrapped):
            model.__dict__.pop(name)
            if (inner := wrapped.args[1]) is not None:
                model.__dict__[name] = inner
    _unwrap_checkpoint_functions(model)


def _hook(module: nn.Module, attachment: Attachment, before: Callable[..., Any]) -> None:
    module.__dict__[ATTRIBUTE] = attachment
    module.__dict__[_HANDLES] = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    )


class _Wrapped(partial):
    """A wrapped method of one model: not a bound method, which could not be pickled. Its arguments are the model, and
    what stood in the model's own dictionary before: None if nothing did, and the class's method counts."""

    __signature__: inspect.Signature


def _wrap(model: nn.Module, name: str, wrapper: Callable[..., Any], more: tuple[str, ...] = ()) -> None:
    """Have `model.name(*args)` call `wrapper(model, inner, *args)`.

    The signature stays, which Trainer and `generate` read, with the arguments `more` beside it. It has no annotations,
    some of which cannot be pickled.
    """
    signature = inspect.signature(getattr(model, name))
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    added = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=None) for each in more]
    last = [each for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [each for each in parameters if each not in last] + added + last
    wrapped = _Wrapped(wrapper, model, model.__dict__.get(name))
    wrapped.__signature__ = inspect.Signature(parameters)
    model.__dict__[name] = wrapped


def _original(module: nn.Module, name: str, inner: Any) -> Callable[..., Any]:
    """The method that is wrapped: what stood there before, or that of the class of `module`, a replica perhaps."""
    return partial(getattr(type(module), name), module) if inner is None else inner


def _encoder(model: Any) -> nn.Module:
    """`generate` calls the encoder, if there is one, by itself."""
    encoder: nn.Module = model.get_encoder()
    return encoder


def _forward(model: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.forward(...)`, which some libraries call instead of `model(...)`: goes through the hooks all the same."""
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is None:  # LoReFT was taken out of the model since somebody took hold of this function
        return _original(model, "forward", inner)(*args, **kwargs)
    forward = current(attachment)
    if forward is None or forward.entered or type(forward.module) is not type(model):
        return model(*args, **kwargs)
    forward.entered = True
    original = _original(forward.module, "forward", inner)  # of a replica, if `nn.DataParallel` runs one
    try:
        return original(*args, **kwargs)
    except BaseException:  # Ctrl-C too, for which torch calls no hooks
        end(forward.module)
        raise


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    refuse_tracing()
    refuse_fused_head(model, kwargs)
    attachment: Attachment = model.__dict__[ATTRIBUTE]
    end(model)  # a forward that was interrupted
    positions, step = kwargs.pop(POSITIONS, None), kwargs.pop(_STEP, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    given = {**dict(zip(attachment.argument_names, args)), **kwargs}
    training = model.training and torch.is_grad_enabled()
    recomputes = _wrap_checkpoint_functions(model) if training else False
    if attachment.decoder is not None:
        of_decoder = step or _read_decoder(given, training)
        begin(attachment.decoder, of_decoder, model, subspaces).recomputes = recomputes
        step = None
    past, memory = (0, None) if step else _past(attachment, given)
    source = step or _read(attachment, given, positions, training, past, memory)
    forward = begin(attachment, source, model, subspaces)
    forward.recomputes, forward.past, forward.memory = recomputes, past, memory
    if training and attachment.first_batch is not None and can_be_read(source_tokens(given)):
        attachment.first_batch({**given, POSITIONS: positions})
    return args, kwargs


_NO_TOKENS = torch.empty(0)


def source_tokens(given: dict[str, Any]) -> Tensor:
    """The tokens of a model's inputs; an empty tensor if it was given none."""
    for name in ("inputs_embeds", "input_ids"):
        if given.get(name) is not None:
            return given[name]
    return _NO_TOKENS


def _before_part(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """A backbone or a tower. Within a forward that was given the same tokens there is nothing to do."""
    attachment: Attachment = part.__dict__[ATTRIBUTE]
    end(part)  # a forward that was interrupted
    given = {**dict(zip(part.__dict__[_NAMES], args)), **kwargs}
    tokens = source_tokens(given)
    outer = current(attachment)
    if outer is not None and tokens.ndim >= 2 and tuple(tokens.shape[:2]) == outer.source.shape:
        return None
    positions = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    training = part.training and torch.is_grad_enabled()
    recomputes = _wrap_checkpoint_functions(part) if training else False
    past, memory = _past(attachment, given)
    forward = begin(attachment, _read(attachment, given, positions, training, past, memory), part, subspaces)
    forward.recomputes, forward.past, forward.memory = recomputes, past, memory
    return args, kwargs


def _past(attachment: Attachment, given: dict[str, Any]) -> tuple[int | None, CacheMemory | None]:
    """How many columns the cache holds that a forward was given, and what is known of them."""
    cache = _cache(given) if attachment.has_answers else None
    past = 0 if cache is None else _filled(cache)
    return past, _memory(cache, past) if past != 0 else None


def _read(
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
            training=training,
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


def _cache(given: dict[str, Any]) -> Any:
    return next((cache for name in _CACHES if (cache := given.get(name)) is not None), None)


def _filled(cache: Any) -> int | None:
    """How many tokens a cache holds; None if it holds some and does not say how many."""
    length = _counted(cache)
    if length is None and (memory := memory_of(cache)) is not None:
        return memory.length
    return length


def _counted(cache: Any) -> int | None:
    """How many tokens a cache counts; None if it holds some and counts none."""
    if hasattr(cache, "get_seq_length"):
        try:
            length = int(cache.get_seq_length())
        except ValueError:  # without a layer of attention, as Mamba's
            pass
        else:
            # The first layer may keep its state elsewhere, as MiniMax's does.
            others = (layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length"))
            return length or max((int(layer.get_seq_length()) for layer in others), default=0)
    if hasattr(cache, "has_previous_state"):
        state = cache.has_previous_state
        return None if (state() if callable(state) else state) else 0
    return None


def _memory(cache: Any, past: int | None) -> CacheMemory | None:
    memory = memory_of(cache)
    if memory is None or past is None:
        return memory
    return memory.cut(past) if memory.length >= past else CacheMemory.unknown(past)


def _read_decoder(given: dict[str, Any], training: bool) -> Source:
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
    if cache is not None and labels is None and _filled(cache) != 0:
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


def _before_encoder(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    attachment: Attachment = encoder.__dict__[ATTRIBUTE]
    forward = current(attachment)
    if forward is not None and forward.module is not encoder:  # within its model
        return args, kwargs
    end(encoder)
    positions = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    names = list(inspect.signature(type(encoder).forward).parameters)[1:]
    given = {**dict(zip(names, args)), **kwargs}
    begin(attachment, _read(attachment, given, positions, training=False), encoder, subspaces)
    return args, kwargs


def _add_given(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
    return args, {**kwargs, **given}


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    attachment: Attachment = module.__dict__[ATTRIBUTE]
    forward = current(attachment)
    mine = forward is not None and forward.module is module
    end(module)
    if mine and output is not None and attachment.has_answers and not torch.compiler.is_compiling():
        assert forward is not None
        _note_cache(forward, attachment, {**dict(zip(attachment.argument_names, args)), **kwargs}, output)


def _note_cache(forward: Forward, attachment: Attachment, given: dict[str, Any], output: Any) -> None:
    """Have the cache that a forward outside `generate` leaves know what it holds."""
    if forward.generation is not None:
        forward.generation.check_others()
        return
    if torch.is_grad_enabled() and forward.module.training:
        return
    given_cache, left = _cache(given), _cache_of(output)
    cache = left if left is not None else given_cache
    source = forward.source
    if cache is None or isinstance(source, Unread) or source.shape == (0, 0):
        return
    seq = source.shape[1]
    past, memory = forward.past, forward.memory
    if past is None or (memory is None and past):
        return
    memory = memory or CacheMemory()
    if cache is not given_cache:  # another forward may go on from the given one, too
        memory = memory.copy()
    edited = {}
    for name, wanted in forward.asked.items():
        slots = forward.slots(wanted)
        if slots is not None:
            edited[name] = of_rows(slots, forward.rows_edited_by(name)), wanted.layout
    refuse_others(memory, forward.asked)
    memory = memory.of_rows(source.shape[0])
    ids = given.get("input_ids")
    answer_from = source.answer_from if isinstance(source, Continued) else None
    memory.add(ids if is_matrix(ids, source.shape) else None, seq, edited, answer_from)
    set_memory(cache, memory)


def _cache_of(output: Any) -> Any:
    return next((cache for name in _CACHES if (cache := getattr(output, name, None)) is not None), None)


def _refuse_batch(model: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate_batch`: its forwards run in a thread of transformers', where an error would only be logged."""
    raise ValueError(CONTINUOUS_BATCHING)


def _generate(model: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model with LoReFT: notes the prompts, and hands each forward its step."""
    explicit = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    original = _original(model, "generate", inner)
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        return original(*args, **kwargs)
    if attachment.decoder is not None:
        generation = Generation(None, subspaces=subspaces)
        handle = None
        if explicit is not None or subspaces is not None:  # positions count in the encoder's input
            hand_on = partial(_add_given, given={POSITIONS: explicit, SUBSPACES: subspaces})
            handle = _encoder(model).register_forward_pre_hook(hand_on, with_kwargs=True, prepend=True)
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
    given = _cache(kwargs)
    cache = given if given is not None else getattr(output, "past_key_values", None)
    if cache is None:
        return
    length, sequences = _counted(cache), getattr(output, "sequences", output)
    if generation.offset and generation.ids is not None:  # only what is new was given
        sequences = torch.cat([generation.ids[:, : generation.offset].to(sequences.device), sequences], 1)
    if length is None:  # the last token has not been fed to it
        length = sequences.shape[1] - 1
    moved = getattr(output, "beam_indices", None) is not None
    memory = CacheMemory.unknown(length) if moved else generation.remember(sequences, length)
    set_memory(cache, memory)


def _prepare_inputs(model: Any, inner: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`prepare_inputs_for_generation`: adds the step of the call of `generate` that runs in this thread."""
    inputs: dict[str, Any] = _original(model, "prepare_inputs_for_generation", inner)(*args, **kwargs)
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
    inputs[_STEP] = GenerateStep(generation, start, (tokens.shape[0], seq))
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
    cache = _cache(kwargs)
    return 0 if cache is None else _filled(cache) or 0


def _note_prompts(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], explicit: Any, subspaces: Tensor | None
) -> Generation:
    names = ("inputs_embeds", "input_ids", "inputs")
    tokens = next((t for name in names if (t := kwargs.get(name)) is not None), args[0] if args else None)
    ids = next((t for name in names[1:] if (t := kwargs.get(name)) is not None), args[0] if args else None)
    cache = _cache(kwargs)
    past = 0 if cache is None else _filled(cache) or 0
    memory = None if not past else _memory(cache, past)
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
    return tokens != pad
