"""Targets whose edits would be lost: refused before anything is changed.

A module's output is edited when the module is called. PEFT's wrappers (`modules_to_save`, `trainable_token_indices`)
call a copy of the module instead, or compute with its weight alone. Some modules of torch and transformers do the same
with one of their children. LoRA refuses most of these too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import _get_input_embeddings_name, _get_module_names_tied_with_embedding
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..config import LoReftConfig
from ..patching import WrappedMethod
from .forward import ATTRIBUTE, Attachment
from .layer import CHILD, LoReftLayer

# Modules that are only containers.
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Model types whose kernels take the weights of these children of a Mamba mixer.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_OF_MAMBA = ("out_proj", "conv1d")


def refuse_conflicts(
    model: nn.Module, config: LoReftConfig, targets: Collection[str], edited: Collection[str]
) -> None:
    """Refuse targets whose edits would not be computed, and PEFT's wrappers around edited modules.

    Args:
        model: the base model, before injection.
        config: of the new adapter.
        targets: names of the modules that it edits.
        edited: names of the modules that earlier adapters edit.

    Raises:
        ValueError: names the module, the field, and what to do.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wrapped = [name for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for name in targets:
        wrapper = next((outer for outer in wrapped if _is_within(name, outer)), None)
        if wrapper is not None:
            field = modules[wrapper]._error_message_name()
            raise ValueError(
                f"target_modules names {name}, but {wrapper} is in `{field}` of another adapter "
                f"({type(modules[wrapper]).__name__}): what is trained there would not be saved under a name that a "
                f"base model has. Leave {wrapper} out of one of the two."
            )
        layer = getattr(modules[name], CHILD, None)
        edits_input = config.component == "heads"
        if isinstance(layer, LoReftLayer) and layer.edits_input is not edits_input:
            here, there = ("input", "output") if edits_input else ("output", "input")
            raise ValueError(
                f"component={config.component!r}: the {here} of {name} cannot be edited, since another adapter edits "
                f"its {there} (component='heads' edits the input, target_modules the output). Load one of the two."
            )
        if isinstance(modules[name], _NEVER_CALLED):
            raise ValueError(
                f"target_modules names {name}, a {type(modules[name]).__name__}, which is never called and has no "
                "output to edit; name modules inside it."
            )
        leaf = name.rpartition(".")[2]
        fused = model_type in _MAMBA and leaf in _OF_MAMBA
        if fused or isinstance(modules[name], NonDynamicallyQuantizableLinear):
            outer = type(modules[name.rpartition(".")[0]]).__name__
            raise ValueError(
                f"target_modules names {name}, whose weight {outer} takes without calling it, at least in some of its "
                f"paths: an edit of the output would be lost. Edit the output of {outer} instead."
            )
    for field, name in _to_be_wrapped(model, config, modules):
        inner = next((each for each in (*targets, *edited) if _is_within(each, name)), None)
        if inner is not None:
            whose = "this adapter" if inner in targets else "another adapter"
            raise ValueError(
                f"{field} names {name}, but {whose} edits {inner} with LoReFT: the wrapper that PEFT puts there would "
                f"compute without that edit, or with a copy of it. Leave {inner} out of one of the two."
            )


def refuse_shared_modules(model: nn.Module) -> None:
    """Refuse a model that has edited modules of another model, such as a reward model around a policy's backbone.

    A layer knows which tokens to edit from the forward of the model that it was made for.

    Args:
        model: the base model, before injection.

    Raises:
        ValueError: names a module, and how two models share weights.
    """
    attachment: Attachment | None = model.__dict__.get(ATTRIBUTE)
    own = () if attachment is None else (attachment, attachment.decoder)
    for name, module in model.named_modules():
        if isinstance(module, LoReftLayer) and module.attachment not in own:
            raise ValueError(
                f"{name.removesuffix(f'.{CHILD}')} is a module of another model too, which has a LoReFT adapter: "
                "edits there follow the tokens of that model. Two models may share weights, but not modules: "
                "`model.load_state_dict(other.state_dict(keep_vars=True), strict=False, assign=True)`."
            )


def refuse_fused_head(model: Any, given: dict[str, Any]) -> None:
    """Refuse a forward that computes logits without calling the output embeddings, if their output is edited.

    TRL's trainers for SFT, DPO, KTO, GRPO and RLOO multiply the hidden states by `lm_head.weight` themselves
    (`fused_lm_head=True`), and so does Liger's fused loss. TRL refuses LoRA there, but cannot see a LoReFT layer,
    which does not replace the module.

    Args:
        model: the base model.
        given: keyword arguments of its forward.

    Raises:
        ValueError: an active adapter edits the output embeddings.
    """
    by_liger = False
    if model.training and given.get("labels") is not None and not torch.compiler.is_compiling():
        by_liger = _has_ligers_forward(model)
    if not given.get("fused_lm_head") and not by_liger:
        return
    head = model.get_output_embeddings()
    layer = getattr(head, CHILD, None)
    if layer is not None and not layer.disable_adapters and layer.plans.keys() & layer.active_adapters:
        name = next(name for name, module in model.named_modules() if module is head)
        who, way_out = "TRL", ""
        if by_liger:
            who, way_out = "Liger", ", or set liger_kernel_config={'fused_linear_cross_entropy': False}"
        raise ValueError(
            f"target_modules names {name!r}, whose output is never computed here: {who} multiplies the hidden states "
            "by its weight directly, so the adapter would never be trained. "
            f"Remove {name!r} from `target_modules`{way_out}."
        )


def _has_ligers_forward(model: Any) -> bool:
    """Whether Liger's fused loss has replaced the forward of a model, or of its class."""
    own = model.__dict__.get("forward")
    if isinstance(own, WrappedMethod):
        own = own.args[1]
    return str(getattr(own or type(model).forward, "__module__", "")).startswith("liger_kernel.")


def _to_be_wrapped(model: nn.Module, config: LoReftConfig, modules: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Config field and name of each module that PEFT will wrap. PEFT compares the ends of names, so this does too."""
    to_save = tuple(config.modules_to_save or ())
    for name in modules:
        if to_save and name.endswith(to_save):
            yield "modules_to_save", name
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    embeddings = _get_input_embeddings_name(model, "embed_tokens")
    of_tokens = tuple(tokens) if isinstance(tokens, dict) else (embeddings,)
    if embeddings is not None and embeddings.endswith(of_tokens) and _ties_embeddings(model):
        of_tokens += tuple(_get_module_names_tied_with_embedding(model))
    for name in modules:
        if name.endswith(of_tokens):
            yield "trainable_token_indices", name


def _ties_embeddings(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _is_within(name: str, outer: str) -> bool:
    """Whether module `name` is `outer` or a part of it."""
    return name == outer or name.startswith(f"{outer}.")
