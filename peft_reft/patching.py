"""Every method of another library that this package wraps or adds, on one page.

No file of another library is changed, and every wrapper calls the original, or raises. (The one of
`VLLMGeneration.sync_weights` does something else instead.) The functions below accept only names that `PATCHES` lists,
so the table is complete.

If `Owner.name` is *wrapped*, `Owner.name(*args)` calls `wrapper(original, *args)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial, wraps
from types import ModuleType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Patch:
    """Why a name of another library is wrapped or added, and when that ends."""

    library: str
    since: str
    """The oldest version of the library with which the tests ran."""
    why: str
    undone: str = "when the process ends; for everything that is not LoReFT it calls the original"
    """When the original stands alone again."""


_WITH_THE_ADAPTER = "when the model's last LoReFT adapter is unloaded or deleted"
_WITH_THE_MANAGER = "with the manager"
_WITH_THE_ENGINE = "with the engine; without `additional_config['loreft']` it calls the original"

PATCHES: dict[str, Patch] = {
    # When `import peft_reft` runs.
    "PeftType.LOREFT": Patch("peft", "0.20", "PEFT registers a method only under a member of this enum."),
    "PeftModel.save_pretrained": Patch(
        "peft", "0.20", "It can write a pickle, or one adapter as another of its name: LoReFT refuses both (`files`)."
    ),
    "PeftModel.push_to_hub": Patch("peft", "0.20", "The model card names the repository it is pushed to (`card`)."),
    "PreTrainedModel.push_to_hub": Patch("transformers", "5.5.4", "The same, for an adapter without a PeftModel."),
    "PeftAdapterMixin.load_adapter": Patch(
        "transformers", "5.5.4", "It asks no tuner about the tensors it reads, so a bad file would load (`files`)."
    ),
    "module.get_peft_model_state_dict": Patch(
        "peft", "0.20", "PEFT 0.20 alone: it asks no tuner what is saved (`tuner.older_peft`)."
    ),
    "module.set_peft_model_state_dict": Patch("peft", "0.20", "The same, for what is loaded."),
    "RepoCard.save": Patch(
        "huggingface_hub",
        "1.0",
        "A trainer replaces our card by one that does not say `import peft_reft` (`card`).",
    ),
    "module.hotswap_adapter_from_state_dict": Patch(
        "peft", "0.20", "It knows LoRA's weights alone; LoReFT's are exchanged by ours (`tools.for_peft`)."
    ),
    "module.prepare_model_for_compiled_hotswap": Patch(
        "peft", "0.20", "It pads LoRA's ranks. LoReFT's cannot be padded, which it would not say (`tools.for_peft`)."
    ),
    "module.rescale_adapter_scale": Patch("peft", "0.20", "It scales LoRA's layers alone (`tools.for_peft`)."),
    # When a Trainer is made, after an adapter was added to a model. Trainers of TRL are included.
    "Trainer.create_model_card": Patch(
        "transformers", "5.5.4", "Its card is completed, and names the repository it is pushed to (`card`)."
    ),
    "Trainer.save_model": Patch(
        "transformers", "5.5.4", "The tokenizer is saved after our card, whose example loads it (`card`)."
    ),
    # When an adapter is added to a model. These are attributes of that model; its class stays as it is.
    "Module.forward": Patch(
        "torch", "2.6", "Some libraries call `model.forward`, which skips hooks (`tuner.hooks`).", _WITH_THE_ADAPTER
    ),
    "Module.generate": Patch(
        "transformers", "5.5.4", "Only the call knows where the prompts end (`tuner.generate`).", _WITH_THE_ADAPTER
    ),
    "Module.generate_batch": Patch(
        "transformers", "5.5.4", "It drops arguments that it does not know; LoReFT's raise.", _WITH_THE_ADAPTER
    ),
    "Module.init_continuous_batching": Patch(
        "transformers", "5.5.4", "Its manager alone knows where prompts end (`tuner.paged`).", _WITH_THE_ADAPTER
    ),
    "Module.prepare_inputs_for_generation": Patch(
        "transformers", "5.5.4", "Each forward of `generate` is told which step it is.", _WITH_THE_ADAPTER
    ),
    "Module._gradient_checkpointing_func": Patch(
        "transformers", "5.5.4", "A recomputed block needs the positions of its forward.", _WITH_THE_ADAPTER
    ),
    "Module.checkpoint_fn": Patch(
        "torch", "2.6", "The same, for torch's CheckpointWrapper (FSDP).", _WITH_THE_ADAPTER
    ),
    # When such a manager is made. These are attributes of it and of its cache, but for the last.
    "ContinuousBatchingManager._create_batch_processor": Patch(
        "transformers", "5.5.4", "The next three are wrapped when its cache is made.", _WITH_THE_MANAGER
    ),
    "ContinuousBatchingManager.pause": Patch(
        "transformers",
        "5.5.4",
        "Weights may change meanwhile; cached blocks are of the old ones.",
        _WITH_THE_MANAGER,
    ),
    "PagedAttentionCache.search_prefix_match": Patch(
        "transformers", "5.5.4", "A request's tokens note what is edited of them.", _WITH_THE_MANAGER
    ),
    "module.compute_block_hash": Patch(
        "transformers", "5.5.4", "A cached block with edited tokens has a hash of its own (`tuner.paged`)."
    ),
    # When vLLM loads its plugins (`serving.engine`, whose tables list all that is touched of vLLM).
    "Worker.load_model": Patch("vllm", "0.28", "Hooks are added to the model that it loads.", _WITH_THE_ENGINE),
    "Worker.loreft_add": Patch("vllm", "0.28", "Added: the core calls it to load an adapter.", _WITH_THE_ENGINE),
    "Worker.loreft_keep": Patch("vllm", "0.28", "Added: the core calls it to drop adapters.", _WITH_THE_ENGINE),
    "Worker.loreft_at_start": Patch("vllm", "0.28", "Added: it tells the core what is loaded.", _WITH_THE_ENGINE),
    "Worker.loreft_begin_check": Patch("vllm", "0.28", "Added: for `serving.selfcheck`.", _WITH_THE_ENGINE),
    "Worker.loreft_end_check": Patch("vllm", "0.28", "Added: the same.", _WITH_THE_ENGINE),
    "GPUModelRunner._determine_batch_execution_and_padding": Patch(
        "vllm",
        "0.28",
        "The plugin notes which tokens a step edits; if any, the step may have to run without a captured graph.",
        _WITH_THE_ENGINE,
    ),
    "GPUModelRunner._model_forward": Patch("vllm", "0.28", "It ends the step.", _WITH_THE_ENGINE),
    # vLLM has two model runners of this name; these are the second one's.
    "GPUModelRunner.gather_batch_req_state": Patch(
        "vllm", "0.28", "The plugin notes which tokens a step edits.", _WITH_THE_ENGINE
    ),
    "GPUModelRunner.execute_model": Patch("vllm", "0.28", "It ends the step.", _WITH_THE_ENGINE),
    "ModelState.add_request": Patch("vllm", "0.28", "It says what each request was given.", _WITH_THE_ENGINE),
    "module.dispatch_cg_and_sync_dp": Patch(
        "vllm", "0.28", "A step that edits tokens may have to run without a captured graph.", _WITH_THE_ENGINE
    ),
    "InputProcessor.__init__": Patch("vllm", "0.28", "The front end learns the adapters' names.", _WITH_THE_ENGINE),
    "InputProcessor.process_inputs": Patch(
        "vllm", "0.28", "Requests for unknown adapters are refused.", _WITH_THE_ENGINE
    ),
    "module.generate_block_hash_extra_keys": Patch(
        "vllm", "0.28", "A cached block with edited tokens has a key of its own (`serving.blocks`).", _WITH_THE_ENGINE
    ),
    "EngineCore._initialize_kv_caches": Patch(
        "vllm", "0.28", "The core notes which adapters are loaded.", _WITH_THE_ENGINE
    ),
    "EngineCore.__init__": Patch("vllm", "0.28", "A core checks itself if vLLM was not tested.", _WITH_THE_ENGINE),
    "EngineCoreProc.run_busy_loop": Patch(
        "vllm", "0.28", "The same, for a core in a process of its own.", _WITH_THE_ENGINE
    ),
    "EngineCore.preprocess_add_request": Patch(
        "vllm", "0.28", "A request is told which adapter its name means (`serving.core`).", _WITH_THE_ENGINE
    ),
    "EngineCore.add_request": Patch("vllm", "0.28", "Requests of a removed adapter are refused.", _WITH_THE_ENGINE),
    "EngineCore.loreft_add": Patch("vllm", "0.28", "Added: `add_adapter` calls it.", _WITH_THE_ENGINE),
    "EngineCore.loreft_remove": Patch("vllm", "0.28", "Added: `remove_adapter` calls it.", _WITH_THE_ENGINE),
    "EngineCore.loreft_list": Patch("vllm", "0.28", "Added: it says which adapters there are.", _WITH_THE_ENGINE),
    "AsyncEngineArgs.from_cli_args": Patch(
        "vllm",
        "0.28",
        "LoReFT adapters in `--lora-modules` are served.",
        "when the process ends; without such an adapter it calls the original",
    ),
    "AsyncLLM.generate": Patch(
        "vllm", "0.28", "The adapter of a request is found, if this front end does not know it.", _WITH_THE_ENGINE
    ),
    "LLMEngine.add_request": Patch("vllm", "0.28", "The same for `LLM`.", _WITH_THE_ENGINE),
    "AsyncLLM.add_lora": Patch("vllm", "0.28", "It loads LoReFT adapters, too.", _WITH_THE_ENGINE),
    "LLMEngine.add_lora": Patch("vllm", "0.28", "The same for `LLM`.", _WITH_THE_ENGINE),
    "OpenAIServingModels.__init__": Patch("vllm", "0.28", "Each adapter is a model of the server.", _WITH_THE_ENGINE),
    "OpenAIServingModels.load_lora_adapter": Patch("vllm", "0.28", "It loads LoReFT adapters, too.", _WITH_THE_ENGINE),
    "OpenAIServingModels.unload_lora_adapter": Patch(
        "vllm", "0.28", "It drops LoReFT adapters, too.", _WITH_THE_ENGINE
    ),
    "OpenAIServingModels.show_available_models": Patch(
        "vllm", "0.28", "It lists adapters that other servers have loaded.", _WITH_THE_ENGINE
    ),
    "BaseServing._check_model": Patch(
        "vllm", "0.28", "The adapter that `model` names is found, if this server does not know it.", _WITH_THE_ENGINE
    ),
    "BaseServing._maybe_get_adapters": Patch(
        "vllm", "0.28", "No adapter is chosen because its name is a type of content.", _WITH_THE_ENGINE
    ),
    "ChatCompletionRequest.to_beam_search_params": Patch(
        "vllm", "0.28", "Beam search drops `extra_args`, and so the adapter: it is refused.", _WITH_THE_ENGINE
    ),
    "CompletionRequest.to_beam_search_params": Patch("vllm", "0.28", "The same.", _WITH_THE_ENGINE),
    "BeamSearchOnlineMixin.beam_search": Patch(
        "vllm", "0.28", "The steps of a beam search have longer and longer prompts: it is refused.", _WITH_THE_ENGINE
    ),
    "BeamSearchOfflineMixin.beam_search": Patch("vllm", "0.28", "The same for `LLM`.", _WITH_THE_ENGINE),
    # When `integrations.trl.rollouts_in_vllm` is called.
    "VLLMGeneration._init_vllm": Patch("trl", "1.16", "The engine that it makes serves adapters."),
    "VLLMGeneration.sync_weights": Patch(
        "trl", "1.16", "It would merge the adapter into the weights. A LoReFT adapter alone is sent instead."
    ),
    "VLLMGeneration.generate": Patch("trl", "1.16", "The forward that trains must find where its prompts end."),
    "module.LLM": Patch(
        "trl", "1.16", "`_init_vllm` gives it fixed arguments; the plugin needs more.", "when the engine is made"
    ),
    "module.VLLMClient": Patch(
        "trl",
        "1.16",
        "`_init_vllm` has it join the server by NCCL; an adapter goes by HTTP.",
        "when the client is made",
    ),
    # When ms-swift imports `integrations.swift`.
    "SwiftMixin.__init__": Patch(
        "ms-swift", "4.6", "Its trainers take the labels out of the model's inputs: the collator adds positions."
    ),
    "Swift.merge_and_unload": Patch("ms-swift", "4.6", "What it saves may lack a bias: LoReFT is refused."),
}


_ORIGINAL = "_before_peft_reft"
"""Attribute of a wrapped function: the original."""


def check_listed(owner: type, name: str) -> None:
    """Raise LookupError if `PATCHES` does not list `name` for `owner` or for one of its base classes."""
    if not any(f"{base.__name__}.{name}" in PATCHES for base in owner.__mro__):
        raise LookupError(f"{owner.__name__}.{name} is not in peft_reft.patching.PATCHES: list it there.")


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `owner.name(*args)` call `wrapper(original, *args)`. A second call replaces the wrapper.

    Args:
        owner: a class, whose method is wrapped for all its instances; or one object.
        name: of the method.
        wrapper: takes the original, then the arguments of the call. For a method of a class the first of them is the
            instance.
    """
    check_listed(owner if isinstance(owner, type) else type(owner), name)
    found = getattr(owner, name)
    original = getattr(found, _ORIGINAL, found)  # `found` may be a wrapper of ours

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    setattr(owner, name, wrapped)


def is_wrapped(owner: type, name: str) -> bool:
    """Whether `wrap` has wrapped a method of a class."""
    return hasattr(getattr(owner, name), _ORIGINAL)


@contextmanager
def replaced(owner: ModuleType, name: str, value: object) -> Iterator[None]:
    """Have `owner.name` be `value` within a `with` block."""
    check_listed(type(owner), name)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def add_method(owner: type, name: str, function: Callable[..., Any]) -> None:
    """Give a class a method that it does not have. A second call replaces it."""
    check_listed(owner, name)
    setattr(owner, name, function)


def add_member(enum: type[Enum], name: str) -> None:
    """Give an enum of strings the member `name`, unless it has one of that name.

    An enum with members cannot be subclassed. This makes the member as `enum` itself does, so lookup, iteration,
    pickling and JSON work on it.
    """
    check_listed(enum, name)
    if name in enum.__members__:
        return
    member: Any = str.__new__(enum, name)  # type: ignore[type-var]  # `enum` is a subclass of str, too
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
    """A wrapped method of one model. It is a `partial`, because a bound wrapper could not be pickled.

    Its arguments are the model, and what the model's own dictionary held before under the method's name. If it held
    nothing (None), the original is the method of the model's class.
    """

    __signature__: inspect.Signature


def wrap_method(model: nn.Module, name: str, wrapper: Callable[..., Any], more: tuple[str, ...] = ()) -> None:
    """Have `model.name(*args)` call `wrapper(model, inner, *args)`. Other models of the class are not affected.

    Args:
        model: whose method is wrapped.
        name: of the method.
        wrapper: takes the model, `inner` (see `original_of`), and the arguments of the call.
        more: names of keyword arguments that the signature gains. Trainer and `generate` read the signature.
    """
    check_listed(type(model), name)
    wrapped = WrappedMethod(wrapper, model, model.__dict__.get(name))
    wrapped.__signature__ = _signature_with(getattr(model, name), more)
    model.__dict__[name] = wrapped


def _signature_with(method: Callable[..., Any], more: tuple[str, ...]) -> inspect.Signature:
    """The signature of `method` with the keyword arguments `more`, in front of its `**kwargs`.

    It has no annotations, because some cannot be pickled.
    """
    named, rest = [], []
    for parameter in inspect.signature(method).parameters.values():
        bare = parameter.replace(annotation=inspect.Parameter.empty)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest.append(bare)
        else:
            named.append(bare)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
    return inspect.Signature([*named, *added, *rest])


def unwrap_method(model: nn.Module, name: str) -> None:
    """Undo `wrap_method`. If the method is not wrapped, nothing happens."""
    wrapped = model.__dict__.get(name)
    if not isinstance(wrapped, WrappedMethod):
        return
    del model.__dict__[name]
    inner = wrapped.args[1]
    if inner is not None:
        model.__dict__[name] = inner


def original_of(module: nn.Module, name: str, inner: Any) -> Callable[..., Any]:
    """The method that is wrapped.

    Args:
        module: the model, or a replica of it that `nn.DataParallel` runs.
        name: of the method.
        inner: what the model's own dictionary held before `wrap_method`; None: nothing, so the original is the method
            of the class of `module`.
    """
    if inner is None:
        return partial(getattr(type(module), name), module)
    original: Callable[..., Any] = inner
    return original
