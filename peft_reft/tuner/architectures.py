"""Find a model's blocks and their hidden size.

The rule: the blocks are the one `ModuleList` with as many entries as the text model has layers. An encoder-decoder
model has two such lists; the encoder's counts, because the encoder reads the prompt. In a multimodal model the list of
the part that reads text counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Names of the attention and of the feed-forward module of a block. The first name that a block has counts. In BERT and
# similar models the feed-forward module is split: `output` is the half that returns to the residual stream.
COMPONENT_NAMES: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "self_attention", "attention", "temporal_block"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2", "output"),
}

# Names, within the attention, of the linear map that reads the outputs of all heads, one behind the other.
HEADS_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "output.dense", "attention.out_proj", "out_lin", "Wo", "wo")

# Attributes, of the attention or of a module in it, with the number of heads.
_NUMBERS_OF_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")

# Parts of multimodal models that do not read text.
_NOT_TEXT = ("vision", "visual", "audio", "image")

# Models, by class or by `model_type`, whose hidden states do not have one row for each row of input tokens.
_NO_ROWS_OF_TOKENS = {
    "blt": "its blocks read patches of several bytes, and the inputs do not show how many bytes a patch has",
    "cpmant": "it puts prompt tokens of its own before the text, which its inputs do not show",
    "ProphetNetForCausalLM": "its blocks return several hidden states of each token, one for each token to predict",
    "fsmt": "its hidden states are of shape (seq, batch, d)",
    "git": "it puts the image before the text, which its inputs do not show",
    "reformer": "its blocks are reversible: each returns two halves of a hidden state",
    "xlnet": "its hidden states are of shape (seq, batch, d)",
}

# Fields of a model's config with the number of hidden states that a block has of each token.
_STREAMS = ("hc_mult", "hc_count", "altup_num_inputs")

_SIZE_NAMES = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Target:
    """A module whose output, or input, can be edited: its name, its layer, and the size d of the hidden state."""

    name: str
    layer: int
    d: int
    heads: int | None = None
    """With `component="heads"`: the number of heads, whose outputs are the input of the module and make up d."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of `torch.compile`; without a wrapper, `model` itself."""
    inner: nn.Module | None = getattr(model, "_orig_mod", None)
    return model if inner is None else inner


def in_base(name: str) -> str:
    """Name of a module without the wrapper of `torch.compile`, which PEFT leaves out too."""
    return name.removeprefix("_orig_mod.")


def find_targets(model: nn.Module, component: str) -> list[Target]:
    """The blocks of `model`, or modules in them, one for each layer, in order.

    Args:
        model: the base model.
        component: "block", "attention", "mlp"; or "heads": the output projections of the attention.

    Raises:
        ValueError: no list of modules could be the blocks, or more than one could, or a block has no such component.
    """
    config = _text_config(model)
    blocks = _block_list(model, config)
    d = _hidden_size(model, config)
    targets = []
    for layer, (index, block) in enumerate(model.get_submodule(blocks).named_children()):
        name = f"{blocks}.{index}"
        if component == "heads":
            targets.append(_heads(model, f"{name}.{_component(block, name, 'attention', component)}", layer))
            continue
        if component != "block":
            name = f"{name}.{_component(block, name, component, component)}"
        targets.append(Target(name, layer, d))
    return targets


def check_tokens(model: nn.Module) -> None:
    """Raise ValueError if `model` does not have hidden states (batch, seq, d), one for each token of its input."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    reason = _NO_ROWS_OF_TOKENS.get(type(model).__name__) or _NO_ROWS_OF_TOKENS.get(model_type)
    if reason is not None:
        raise ValueError(
            f"LoReFT cannot edit {type(model).__name__}: {reason}. It edits hidden states of shape (batch, seq, d), "
            "one for each token of the input."
        )


def check_streams(model: nn.Module, targets: list[Target]) -> None:
    """Raise ValueError if a target is a block that returns several hidden states of each token."""
    config = _text_config(model)
    for name in _STREAMS:
        streams = getattr(config, name, None)
        for target in targets:
            is_block = target.name.rpartition(".")[2].isdigit()
            if is_block and isinstance(streams, int) and streams > 1:
                raise ValueError(
                    f"LoReFT cannot edit {target.name} of {type(model).__name__}: its blocks return {streams} hidden "
                    f"states of each token ({name}={streams} in the model's config), of which none alone is the "
                    "residual stream. Use component='attention' or 'mlp', or name such modules with `target_modules`."
                )


# Attributes with the size of a module's output: of nn.Linear, nn.Embedding, transformers' Conv1D (GPT-2),
# nn.MultiheadAttention.
_SIZES_OF_OUTPUT = ("out_features", "embedding_dim", "nf", "embed_dim")


def output_size(model: nn.Module, name: str) -> int:
    """Size of the last dimension of what module `name` returns; the hidden size, if the module does not say it."""
    module = model.get_submodule(name)
    for attribute in _SIZES_OF_OUTPUT:
        size = getattr(module, attribute, None)
        if isinstance(size, int) and size:
            return size
    normalised = getattr(module, "normalized_shape", ())  # of `nn.LayerNorm` and `nn.RMSNorm`
    if normalised:
        return int(normalised[-1])
    return _hidden_size(model, _text_config(model))


def skeleton(config: Any) -> nn.Module:
    """The model of a transformers config on the meta device: its modules, without memory for weights."""
    import transformers

    model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    make = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        model: nn.Module = make(config)
    return model


def modules_of_encoder(model: Any) -> set[int] | None:
    """Ids of the modules that an encoder-decoder model reads its prompt with; None for any other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return {id(module) for module in model.get_encoder().modules()}


def modules_of_decoder(model: Any) -> set[int] | None:
    """Ids of the modules that an encoder-decoder model writes its answer with; None for any other model."""
    if modules_of_encoder(model) is None:
        return None
    return {id(module) for module in model.get_decoder().modules()}


def _text_config(model: nn.Module) -> Any:
    """The config of the part that reads text; None if the model has no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hidden_size(model: nn.Module, config: Any) -> int:
    for name in _SIZE_NAMES:
        size = getattr(config, name, None)
        if isinstance(size, int):
            return size
    raise ValueError(
        f"The hidden size of {type(model).__name__} is unknown: its config has none of {', '.join(_SIZE_NAMES)}. "
        "In a network of your own, modules to edit need an attribute `out_features`, as `nn.Linear` has."
    )


def _block_list(model: nn.Module, config: Any) -> str:
    """Name of the list of blocks."""
    lists: dict[str, nn.ModuleList] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    n_layers = getattr(config, "num_hidden_layers", None)
    if all(len(module) != n_layers for module in lists.values()):  # LongCat counts the two halves of its blocks
        n_layers = getattr(config, "num_layers", n_layers)
    candidates: list[str] = [name for name, module in lists.items() if len(module) == n_layers]
    # A list inside another candidate (the experts of a block) is part of a block, not a list of blocks.
    candidates = [name for name in candidates if not any(name.startswith(f"{other}.") for other in candidates)]
    of_text = [name for name in candidates if not any(part in name for part in _NOT_TEXT)]
    candidates = of_text or candidates
    encoder = modules_of_encoder(model)
    if encoder is not None:
        candidates = [name for name in candidates if id(lists[name]) in encoder]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(f"{name} ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in lists.items())
    if candidates:
        problem = f"more than one list of modules could be the blocks: {', '.join(candidates)}"
    else:
        problem = f"no list of modules has as many entries as the config has layers ({n_layers})"
    raise ValueError(
        f"Cannot find the blocks of {type(model).__name__}: {problem}. Lists of modules found: {found or 'none'}. "
        "Name the modules to edit with `target_modules`."
    )


def _component(block: nn.Module, name: str, component: str, asked: str) -> str:
    """Name of a component within its block, which is called `name`; `asked`: the field's value, for the message."""
    children = dict(block.named_children())
    for candidate in COMPONENT_NAMES[component]:
        if candidate in children:
            return candidate
    raise ValueError(
        f"component={asked!r}: {name} ({type(block).__name__}) has no module of that kind by a known name "
        f"({', '.join(COMPONENT_NAMES[component])}). It has: {', '.join(children)}. Use `target_modules`."
    )


def _heads(model: nn.Module, attention: str, layer: int) -> Target:
    """The output projection of the attention of that name.

    Raises:
        ValueError: there is none by a known name, or its input is not made up of heads.
    """
    module = model.get_submodule(attention)
    inside = dict(module.named_modules())
    found = next((name for name in HEADS_NAMES if name in inside), None)
    if found is None:
        children = ", ".join(name for name, _ in module.named_children())
        raise ValueError(
            f"component='heads': {attention} ({type(module).__name__}) has no output projection by a known name "
            f"({', '.join(HEADS_NAMES)}). It has: {children}. Use another component."
        )
    name = f"{attention}.{found}"
    d, heads = input_size(inside[found]), _number_of_heads(model, module)
    if d is None or heads is None or d % heads:
        raise ValueError(
            f"component='heads': the input of {name} has the size {d}, and {type(module).__name__} says that it has "
            f"{heads} heads; a head's share of the input is not known. Use another component."
        )
    return Target(name, layer, d, heads)


def input_size(module: nn.Module) -> int | None:
    """Size of the last dimension of what a linear map is given; None if it does not say it."""
    for attribute in ("in_features", "nx"):  # `nx`: transformers' Conv1D (GPT-2)
        size = getattr(module, attribute, None)
        if isinstance(size, int) and size:
            return size
    return None


def _number_of_heads(model: nn.Module, attention: nn.Module) -> int | None:
    """The number of heads of an attention: what it says itself, or a module in it, or else the config of the model."""
    for part in (*attention.modules(), _text_config(model)):
        for attribute in _NUMBERS_OF_HEADS:
            number = getattr(part, attribute, None)
            if isinstance(number, int):
                return number
    return None
