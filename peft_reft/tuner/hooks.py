"""Begin and end a `Forward`: the hooks on a model and its parts, and the wrapped `forward`.

A hook before the base model's forward sees the inputs on every path that PEFT, transformers and TRL take. It begins a
`Forward` with a position source: the caller (`intervention_positions`), `generate`, the cache, or the batch itself. A
hook after the forward ends the `Forward`. Parts of the model that are given tokens (its backbone, a tower) have the
same hooks, for code that calls a part by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..patching import original_of, unwrap_method, wrap_method
from ..positions.batch import POSITIONS, SUBSPACES, can_be_read
from ..positions.memory import CacheMemory
from ..positions.sources import FromBatch, PositionSource, check_subspaces
from ..positions.split import Untouched
from ..positions.wanted import Wanted
from .architectures import modules_of_encoder
from .caches import note_cache, past_of
from .checkpointing import unwrap_checkpoint_functions, wrap_checkpoint_functions
from .conflicts import refuse_fused_head
from .forward import ATTRIBUTE, Attachment, Forward, begin, current, end
from .generate import STEP, generate, prepare_inputs
from .paged import generate_batch, init_batching, pieces_of_step
from .reading import read, read_decoder, source_tokens
from .tracing import refuse_tracing
from .two_parts import SOURCE
from .untouched import cut_forward

_HANDLES = f"{ATTRIBUTE}_handles"
"""Attribute of a module that holds the handles of its hooks."""

_NAMES = f"{ATTRIBUTE}_arguments"
"""Attribute of a part that holds the names of the arguments of its forward, in order."""

_WRAPPED: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "generate_batch": generate_batch,
    "init_continuous_batching": init_batching,
    "prepare_inputs_for_generation": prepare_inputs,
}
"""The methods of a model that are wrapped beside `forward`, if it has them."""


def attach(model: nn.Module, has_answers: bool) -> Attachment:
    """Give `model` its attachment and hooks, and wrap `forward` and `generate`. A second call changes nothing.

    Args:
        model: the base model.
        has_answers: whether its rows hold prompt and answer, with one label for each token (causal language models).

    Returns:
        The attachment of the model.
    """
    known: Attachment | None = model.__dict__.get(ATTRIBUTE)
    if known is not None:
        return known
    has_decoder = modules_of_encoder(model) is not None
    decoder = Attachment(model, has_answers=True) if has_decoder else None
    attachment = Attachment(model, has_answers, decoder)
    _hook(model, attachment, _before_forward)
    if has_decoder:
        _hook(_encoder(model), attachment, _before_encoder)
    wrap_method(model, "forward", _forward, more=(POSITIONS, SUBSPACES))
    for name, wrapper in _WRAPPED.items():
        if hasattr(type(model), name):
            wrap_method(model, name, wrapper)
    return attachment


def attach_parts(model: nn.Module, edited: Iterable[nn.Module]) -> None:
    """Hook the parts of `model` that hold `edited` modules and are given tokens or images: backbone, towers."""
    attachment: Attachment = model.__dict__[ATTRIBUTE]
    if attachment.decoder is not None:
        return
    edited_ids = {id(module) for module in edited}
    for part in model.modules():
        if part is model or ATTRIBUTE in part.__dict__ or id(part) in edited_ids:
            continue
        takes = inspect.signature(type(part).forward).parameters
        reads = any(name in takes for name in ("input_ids", "inputs_embeds", "pixel_values"))
        if reads and any(id(module) in edited_ids for module in part.modules()):
            _hook(part, attachment, _before_part)
            part.__dict__[_NAMES] = list(takes)[1:]


def detach(model: nn.Module) -> None:
    """Undo `attach` and `attach_parts`."""
    for module in list(model.modules()):
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
        module.__dict__.pop(ATTRIBUTE, None)
        module.__dict__.pop(_NAMES, None)
    for name in ("forward", *_WRAPPED):
        unwrap_method(model, name)
    unwrap_checkpoint_functions(model)


def _hook(module: nn.Module, attachment: Attachment, before: Callable[..., Any]) -> None:
    module.__dict__[ATTRIBUTE] = attachment
    module.__dict__[_HANDLES] = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    )


def _encoder(model: Any) -> nn.Module:
    """The encoder of an encoder-decoder model, which `generate` calls by itself."""
    encoder: nn.Module = model.get_encoder()
    return encoder


def _forward(model: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """The wrapped `forward`. Some libraries call it instead of the model; it runs the hooks all the same."""
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is None:  # LoReFT was taken out of the model after the caller got hold of this function
        return original_of(model, "forward", inner)(*args, **kwargs)
    forward = current(attachment)
    if forward is None or forward.entered or type(forward.module) is not type(model):
        return model(*args, **kwargs)
    forward.entered = True
    original = original_of(forward.module, "forward", inner)  # of a replica, if `nn.DataParallel` runs one
    try:
        return original(*args, **kwargs)
    except BaseException:  # also on Ctrl-C, on which torch calls no hooks
        end(forward.module)
        raise


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Begin a forward of the model, and of its decoder's attachment if it has one."""
    refuse_tracing()
    refuse_fused_head(model, kwargs)
    attachment: Attachment = model.__dict__[ATTRIBUTE]
    end(model)  # a forward that was interrupted
    given_source = kwargs.pop(SOURCE, None)
    if given_source is not None:
        begin(attachment, given_source, model)
        return args, kwargs
    positions, step = kwargs.pop(POSITIONS, None), kwargs.pop(STEP, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    given = {**dict(zip(attachment.argument_names, args)), **kwargs}
    training = model.training and torch.is_grad_enabled()
    recomputes = wrap_checkpoint_functions(model) if training else False
    if attachment.decoder is not None:
        of_decoder = step or read_decoder(given, training)
        outer = begin(attachment.decoder, of_decoder, model, subspaces)
        outer.recomputes, outer.in_training = recomputes, training
        step = None  # a step of `generate` is the decoder's
    if step is not None:
        forward = begin(attachment, step, model, subspaces)
    else:
        past, memory = past_of(attachment, given)
        source = _source(attachment, given, positions, training, past, memory)
        if attachment.rollouts is not None and torch.is_grad_enabled() and isinstance(source, FromBatch):
            attachment.rollouts.check(source.batch)
        known: dict[Wanted, Tensor | None] = {}
        cut, may_cut_backbone = None, False
        if training and not torch.compiler.is_compiling():
            cut, may_cut_backbone = cut_forward(attachment, model, given, source, known, is_model=True)
        if cut is not None:
            args, kwargs = (), cut.inputs
        forward = begin(attachment, source if cut is None else cut.source, model, subspaces)
        forward.past, forward.memory = past, memory
        forward.cut, forward.may_cut_backbone = cut, may_cut_backbone
        if cut is None:
            forward.known_slots.update(known)
    forward.recomputes, forward.in_training = recomputes, training
    if training and attachment.first_batch is not None and can_be_read(source_tokens(given)):
        attachment.first_batch({**given, POSITIONS: positions})
    return args, kwargs


def _source(
    attachment: Attachment,
    given: dict[str, Any],
    positions: Any,
    training: bool,
    past: int | None,
    memory: CacheMemory | None,
) -> PositionSource:
    """The position source of a forward that is no step of `generate`; see `read`."""
    if "write_index" in given:  # transformers gives it to paged attention alone
        return pieces_of_step(attachment, given)
    return read(attachment, given, positions, training, past, memory)


def _before_part(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Begin a forward of a backbone or a tower, unless a forward runs that was given the same tokens."""
    attachment: Attachment = part.__dict__[ATTRIBUTE]
    end(part)  # a forward that was interrupted
    given = {**dict(zip(part.__dict__[_NAMES], args)), **kwargs}
    tokens = source_tokens(given)
    given_source = kwargs.pop(SOURCE, None)
    if given_source is not None:
        begin(attachment, given_source, part)
        return args, kwargs
    training = part.training and torch.is_grad_enabled()
    outer = current(attachment)
    if outer is not None and tokens.ndim >= 2 and tuple(tokens.shape[:2]) == outer.source.shape:
        return _cut_part(part, attachment, outer, given) if outer.may_cut_backbone else None
    positions = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    recomputes = wrap_checkpoint_functions(part) if training else False
    past, memory = past_of(attachment, given)
    forward = begin(attachment, _source(attachment, given, positions, training, past, memory), part, subspaces)
    forward.recomputes, forward.in_training = recomputes, training
    forward.past, forward.memory = past, memory
    return args, kwargs


def _cut_part(
    part: nn.Module, attachment: Attachment, outer: Forward, given: dict[str, Any]
) -> tuple[Any, Any] | None:
    """Run a backbone in two parts inside a forward of its model."""
    cut, _ = cut_forward(attachment, part, given, outer.source, outer.known_slots, is_model=False)
    if cut is None:
        return None
    forward = begin(attachment, cut.source, part, outer.subspaces)
    forward.recomputes, forward.in_training, forward.cut = outer.recomputes, True, cut
    return (), cut.inputs


def _before_encoder(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Begin a forward of an encoder, unless a forward of its model runs."""
    attachment: Attachment = encoder.__dict__[ATTRIBUTE]
    forward = current(attachment)
    if forward is not None and forward.module is not encoder:
        return args, kwargs
    end(encoder)
    positions = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    names = list(inspect.signature(type(encoder).forward).parameters)[1:]
    given = {**dict(zip(names, args)), **kwargs}
    begin(attachment, read(attachment, given, positions, training=False), encoder, subspaces)
    return args, kwargs


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """End the forward that `module` began; join its two parts, or note in its cache what was edited."""
    attachment: Attachment = module.__dict__[ATTRIBUTE]
    forward = current(attachment)
    end(module)
    if forward is None or forward.module is not module:
        return None
    if forward.cut is not None:
        return None if output is None else forward.cut.join(output)
    if output is None or isinstance(forward.source, Untouched):
        return None
    if attachment.has_answers and not torch.compiler.is_compiling():
        note_cache(forward, attachment, {**dict(zip(attachment.argument_names, args)), **kwargs}, output)
    return None
