"""Every method of another library that this package wraps or adds, on one page.

No file of another library is changed, and no method is replaced without calling the original. `wrap`, `add_method` and
`wrap_method` refuse whatever `PATCHES` does not list, so the table is complete.

To *wrap* `Owner.name` means that `Owner.name(*args)` calls `wrapper(original, *args)` from then on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial, wraps
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Patch:
    """Why a name of another library is wrapped or added, since when, and how that ends."""

    library: str
    since: str
    """The oldest version that this was run with."""
    why: str
    undone: str = "when the process ends; it calls the original for everything that is not LoReFT"


_WITH_THE_ADAPTER = "when the model's last LoReFT adapter is unloaded or deleted"
_WITH_THE_ENGINE = "with the engine; without `additional_config['loreft']` it calls the original"

PATCHES: dict[str, Patch] = {
    # When `import peft_reft` runs.
    "PeftType.LOREFT": Patch("peft", "0.21", "PEFT registers a method only under a member of this enum."),
    "PeftModel.save_pretrained": Patch("peft", "0.21", "It can write a pickle, which LoReFT refuses (`files`)."),
    "PeftModel.push_to_hub": Patch("peft", "0.21", "The model card names the repository it is pushed to (`card`)."),
    "PeftAdapterMixin.load_adapter": Patch(
        "transformers", "5.5.4", "It asks no tuner about the tensors it reads, so a bad file would load (`files`)."
    ),
    "RepoCard.save": Patch(
        "huggingface_hub",
        "1.0",
        "Trainers write a card over ours that does not import this package (`card`).",
    ),
    # When an adapter is added to a model. These are attributes of that model, not of its class.
    "Module.forward": Patch(
        "torch", "2.6", "Some libraries call `model.forward`, which runs no hooks (`tuner.hooks`).", _WITH_THE_ADAPTER
    ),
    "Module.generate": Patch(
        "transformers", "5.5.4", "Only the call knows where the prompts end (`tuner.generate`).", _WITH_THE_ADAPTER
    ),
    "Module.generate_batch": Patch(
        "transformers", "5.5.4", "Its forwards do not say where prompts end: refused.", _WITH_THE_ADAPTER
    ),
    "Module.prepare_inputs_for_generation": Patch(
        "transformers", "5.5.4", "Each forward of `generate` is told which step it is.", _WITH_THE_ADAPTER
    ),
    "Module._gradient_checkpointing_func": Patch(
        "transformers", "5.5.4", "Recomputation needs the positions of its forward.", _WITH_THE_ADAPTER
    ),
    "Module.checkpoint_fn": Patch(
        "torch", "2.6", "The same, for torch's CheckpointWrapper (FSDP).", _WITH_THE_ADAPTER
    ),
    # When vLLM loads its plugins.
    "Worker.load_model": Patch("vllm", "0.32", "Hooks go into the model that it loads.", _WITH_THE_ENGINE),
    "Worker.loreft_add": Patch("vllm", "0.32", "Added: the engine's core loads an adapter by it.", _WITH_THE_ENGINE),
    "Worker.loreft_remove": Patch("vllm", "0.32", "Added: the core drops an adapter by it.", _WITH_THE_ENGINE),
    "GPUModelRunner._model_forward": Patch(
        "vllm", "0.32", "Each step is told which of its tokens are edited.", _WITH_THE_ENGINE
    ),
    "InputProcessor.__init__": Patch("vllm", "0.32", "The front end reads the adapters' names.", _WITH_THE_ENGINE),
    "InputProcessor.process_inputs": Patch(
        "vllm", "0.32", "An unknown adapter is refused; cached blocks belong to one adapter.", _WITH_THE_ENGINE
    ),
    "EngineCore.add_request": Patch("vllm", "0.32", "A request may name an adapter just dropped.", _WITH_THE_ENGINE),
    "EngineCore.loreft_add": Patch("vllm", "0.32", "Added: `add_adapter` calls it.", _WITH_THE_ENGINE),
    "EngineCore.loreft_remove": Patch("vllm", "0.32", "Added: `remove_adapter` calls it.", _WITH_THE_ENGINE),
    "ChatCompletionRequest.to_beam_search_params": Patch(
        "vllm", "0.32", "Beam search drops `extra_args`, and with them the adapter: refused.", _WITH_THE_ENGINE
    ),
    "CompletionRequest.to_beam_search_params": Patch("vllm", "0.32", "The same.", _WITH_THE_ENGINE),
}


def check_listed(owner: type, name: str) -> None:
    """Raise LookupError if `PATCHES` does not list `name` for `owner` or for one of its base classes."""
    if not any(f"{each.__name__}.{name}" in PATCHES for each in owner.__mro__):
        raise LookupError(f"{owner.__name__}.{name} is not in peft_reft.patching.PATCHES: list it there.")


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `owner.name(*args)` call `wrapper(original, *args)`. A second call replaces the wrapper.

    Args:
        owner: a class, whose method is wrapped for all its instances; or one object.
        name: of the method.
        wrapper: takes the original and its arguments (of a class's method, the instance first).
    """
    check_listed(owner if isinstance(owner, type) else type(owner), name)
    inner = getattr(owner, name)
    inner = getattr(inner, "_before_peft_reft", inner)

    @wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    wrapped._before_peft_reft = inner  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def add_method(owner: type, name: str, function: Callable[..., Any]) -> None:
    """Give a class a method that it does not have. A second call replaces it."""
    check_listed(owner, name)
    setattr(owner, name, function)


def add_member(enum: type[Enum], name: str) -> None:
    """Give an enum of strings the member `name`, unless it has it.

    An enum with members cannot be subclassed. The member is made the way `enum` makes one, so lookup, iteration,
    pickling and JSON work on it.
    """
    check_listed(enum, name)
    if name in enum.__members__:
        return
    member: Any = str.__new__(enum, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    # Not setattr: EnumType.__setattr__ refuses to rebind a name that is in the member map. Python 3.12 and later need
    # the attribute itself, earlier ones find the member through the map.
    type.__setattr__(enum, name, member)


class WrappedMethod(partial[Any]):
    """A wrapped method of one model: not a bound method, which could not be pickled.

    Its arguments are the model, and what stood in the model's own dictionary before (None: nothing, so the method of
    the model's class is the original).
    """

    __signature__: inspect.Signature


def wrap_method(model: nn.Module, name: str, wrapper: Callable[..., Any], more: tuple[str, ...] = ()) -> None:
    """Have `model.name(*args)` call `wrapper(model, inner, *args)`, for this model alone.

    The signature stays, because Trainer and `generate` read it, with the arguments `more` added. It has no
    annotations, some of which cannot be pickled.

    Args:
        model: whose method is wrapped.
        name: of the method.
        wrapper: takes the model, `inner` (see `original_of`), and the arguments of the call.
        more: names of further keyword arguments.
    """
    check_listed(type(model), name)
    signature = inspect.signature(getattr(model, name))
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    added = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=None) for each in more]
    last = [each for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [each for each in parameters if each not in last] + added + last
    wrapped = WrappedMethod(wrapper, model, model.__dict__.get(name))
    wrapped.__signature__ = inspect.Signature(parameters)
    model.__dict__[name] = wrapped


def unwrap_method(model: nn.Module, name: str) -> None:
    """Undo `wrap_method`; nothing happens if the method is not wrapped."""
    wrapped = model.__dict__.get(name)
    if not isinstance(wrapped, WrappedMethod):
        return
    del model.__dict__[name]
    inner = wrapped.args[1]
    if inner is not None:
        model.__dict__[name] = inner


def original_of(module: nn.Module, name: str, inner: Any) -> Callable[..., Any]:
    """The method that is wrapped: `inner`; if that is None, the method of the class of `module`, maybe a replica."""
    return partial(getattr(type(module), name), module) if inner is None else inner
