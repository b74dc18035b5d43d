"""From a model's inputs to token positions, once per forward: the hooks, and the wrapped `generate`.

A hook before the base model's forward sees its inputs on every path that PEFT, transformers and TRL take to it, and
notes where positions can be had from: the caller (`intervention_positions`), `generate`, or the inputs themselves.
The first layer that asks has them computed; all others share the result. A hook after the forward forgets them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import modules_of_encoder
from .conflicts import refuse_fused_head
from .positions.sources import (
    CONTINUOUS_BATCHING,
    IGNORED,
    POSITIONS,
    SUBSPACES,
    Derived,
    Explicit,
    Generation,
    Source,
    Step,
    Unread,
    check_positions,
    check_subspaces,
    is_matrix,
)
from .state import PositionState
from .tracing import refuse_tracing

ATTRIBUTE = "peft_reft_state"

_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes that hold a module's checkpoint function: transformers' models; torch's CheckpointWrapper."""


class _WithPositions:
    """A checkpoint function that runs again, in the backward, with the positions of the forward it belongs to.

    Whether hooks are run again depends on who checkpoints what (transformers up to 5.20 does, later ones do not), and
    several forwards may come before one backward (DPO): without this, hooks would find the positions of none or,
    worse, of another.
    """

    def __init__(self, checkpoint: Callable[..., Any], state: PositionState) -> None:
        self.checkpoint = checkpoint
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moment = self.state.moment

        def run(*inputs: Any, **named: Any) -> Any:
            with self.state.recomputing(moment):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)


def _wrap_checkpoint_functions(model: nn.Module, state: PositionState) -> None:
    state.recomputes = False
    for module in model.modules():
        if vars(module).get("gradient_checkpointing") or "checkpoint_fn" in vars(module):
            state.recomputes = True
        for name in _CHECKPOINT_FUNCTIONS:
            function = vars(module).get(name)
            if function is not None and not isinstance(function, _WithPositions):
                vars(module)[name] = _WithPositions(function, state)


def _unwrap_checkpoint_functions(model: nn.Module) -> None:
    for module in model.modules():
        for name in _CHECKPOINT_FUNCTIONS:
            if isinstance(function := vars(module).get(name), _WithPositions):
                vars(module)[name] = function.checkpoint


def attach(model: nn.Module, labels_mark_prompts: bool) -> PositionState:
    """Give `model` its state and hooks, and wrap its `generate`; if it has them already, return the state."""
    if (state := model.__dict__.get(ATTRIBUTE)) is not None:
        return state
    has_decoder = modules_of_encoder(model) is not None
    decoder = PositionState(model, labels_mark_prompts=True) if has_decoder else None
    state = PositionState(model, labels_mark_prompts, decoder)
    for module in _entrances(model):
        hook = _before_forward if module is model else _before_encoder
        before = module.register_forward_pre_hook(hook, with_kwargs=True)
        after = module.register_forward_hook(_after_forward, always_call=True)
        module.__dict__[ATTRIBUTE] = state
        module.__dict__[f"{ATTRIBUTE}_handles"] = (before, after)
    if hasattr(type(model), "generate"):
        # `partial`, not a bound method: a model with the latter cannot be pickled.
        model.__dict__["generate"] = partial(_generate, model)
    return state


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in _entrances(model):
        for handle in module.__dict__.pop(f"{ATTRIBUTE}_handles", ()):
            handle.remove()
        module.__dict__.pop(ATTRIBUTE, None)
    model.__dict__.pop("generate", None)
    _unwrap_checkpoint_functions(model)


def _entrances(model: Any) -> list[nn.Module]:
    """Modules whose forward begins a run over a prompt: `generate` calls the encoder, if there is one, by itself."""
    return [model] if modules_of_encoder(model) is None else [model, model.get_encoder()]


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    refuse_tracing()
    refuse_fused_head(model, kwargs)
    state: PositionState = model.__dict__[ATTRIBUTE]
    positions = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    given = {**dict(zip(state.argument_names, args)), **kwargs}
    if "write_index" in kwargs:  # which only transformers' paged attention is given
        state.begin(CONTINUOUS_BATCHING, model)
        return args, kwargs
    training = model.training and torch.is_grad_enabled()
    if training:
        _wrap_checkpoint_functions(model, state)
    if state.decoder is not None:
        step = positions if isinstance(positions, Step) else None
        positions = None if step else positions
        state.decoder.begin(step or _read_decoder(given, training), model, subspaces)
    tokens = next((t for name in ("inputs_embeds", "input_ids") if (t := given.get(name)) is not None), None)
    if isinstance(positions, Step):
        state.begin(positions, model, subspaces)
    elif tokens is None:
        state.begin(Unread(positions, given.get("attention_mask")), model, subspaces)
    elif positions is not None:
        shape = (tokens.shape[0], tokens.shape[1])
        state.begin(Explicit(check_positions(positions, shape).to(tokens.device), shape), model, subspaces)
    else:
        shape = (tokens.shape[0], tokens.shape[1])
        labels = given.get("labels")
        state.begin(
            Derived(
                tokens=tokens,
                shape=shape,
                attention_mask=given.get("attention_mask"),
                position_ids=given.get("position_ids"),
                labels=labels if state.labels_mark_prompts and is_matrix(labels, shape) else None,
                cache=given.get("past_key_values"),
                needs_labels=state.labels_mark_prompts and training,
            ),
            model,
            subspaces,
        )
    return args, kwargs


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
    mask = given.get("decoder_attention_mask")
    needs_labels = training and labels is None
    if labels is not None and is_matrix(labels, shape):
        # The label of a decoder's token is the token after it.
        labels = F.pad(labels, (1, -1), value=IGNORED)
        if mask is None:  # behind the last of them there is padding
            mask = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
            mask[:, 0] = True
    else:
        labels = None
    return Derived(tokens, shape, mask, None, labels, given.get("past_key_values"), needs_labels)


def _before_encoder(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    within_its_model = encoder.__dict__[ATTRIBUTE].running
    return (args, kwargs) if within_its_model else _before_forward(encoder, args, kwargs)


def _add_given(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
    return args, {**kwargs, **given}


def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    model.__dict__[ATTRIBUTE].end(model)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model with LoReFT: notes the prompts, and hands each forward its positions."""
    explicit = kwargs.pop(POSITIONS, None)
    subspaces = check_subspaces(kwargs.pop(SUBSPACES, None))
    original: Callable[..., Any] = type(model).generate
    handle = None
    if modules_of_encoder(model) is not None:
        generation = Generation(None, None, 0, subspaces, False)
        if explicit is not None or subspaces is not None:  # positions count in the encoder's input
            hand_on = partial(_add_given, given={POSITIONS: explicit, SUBSPACES: subspaces})
            handle = model.get_encoder().register_forward_pre_hook(hand_on, with_kwargs=True, prepend=True)
    else:
        generation = _note_prompts(model, args, kwargs, explicit, subspaces)
    outer = model.__dict__.get("prepare_inputs_for_generation")  # a draft model may be this model itself
    prepare = partial(_prepare_inputs, model, generation)
    # `generate` reads from the signature what the model can take (`inputs_embeds`).
    prepare.__signature__ = inspect.signature(model.prepare_inputs_for_generation)  # type: ignore[attr-defined]
    model.__dict__["prepare_inputs_for_generation"] = prepare
    try:
        return original(model, *args, **kwargs)
    finally:
        if handle is not None:
            handle.remove()
        if outer is None:
            model.__dict__.pop("prepare_inputs_for_generation", None)
        else:
            model.__dict__["prepare_inputs_for_generation"] = outer


def _prepare_inputs(model: Any, generation: Generation, *args: Any, **kwargs: Any) -> dict[str, Any]:
    inputs = type(model).prepare_inputs_for_generation(model, *args, **kwargs)
    names = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids")
    tokens = next(t for name in names if (t := inputs.get(name)) is not None)
    if generation.real is None:  # a decoder's prompt is what it starts with
        generation.real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    cache = next((c for name in ("past_key_values", "cache_params") if (c := inputs.get(name)) is not None), None)
    start = generation.advance(cache, tokens.shape[1])
    inputs[POSITIONS] = Step(generation, start, (tokens.shape[0], tokens.shape[1]))
    if generation.subspaces is not None:
        inputs[SUBSPACES] = generation.subspaces
    return inputs


def _note_prompts(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], explicit: Any, subspaces: Tensor | None
) -> Generation:
    names = ("inputs_embeds", "input_ids", "inputs")
    tokens = next((t for name in names if (t := kwargs.get(name)) is not None), args[0] if args else None)
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if tokens is None:  # generation from the begin-of-sequence token alone, one row
        real = torch.ones(1, 1, dtype=torch.bool)
    elif mask is not None:
        real = mask.bool()
    else:
        real = _infer_mask(model, tokens, kwargs)
        if past >= real.shape[1]:  # only what is new was passed, behind a cache
            real = F.pad(real, (past, 0), value=True)
    if explicit is not None:
        explicit = check_positions(explicit, (real.shape[0], real.shape[1]))
    settings = kwargs.get("generation_config") or model.generation_config
    drafts = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    rolls_back = kwargs.get("assistant_model") is not None or any(
        kwargs.get(name, getattr(settings, name, None)) for name in drafts
    )
    # Not `model.device`, which is "meta" where weights are offloaded.
    return Generation(real if tokens is None else real.to(tokens.device), explicit, past, subspaces, rolls_back)


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
