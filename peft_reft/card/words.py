"""An adapter's settings and size in words."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..edits.formulas import INTERVENTIONS
from ..positions.spec import Positions

if TYPE_CHECKING:
    from ..config import LoReftConfig


def describe(config: LoReftConfig) -> str:
    """Return one paragraph: formula, rank, modules, edited tokens."""
    tokens = f"Edited tokens: {_tokens(config)} (`positions={config.positions!r}`)."
    return f"{_formula(config)}, on {_modules(config)}. {tokens}"


def _formula(config: LoReftConfig) -> str:
    words = f"Formula `{config.intervention}`"
    if config.act_fn:
        words += f" with `act_fn={config.act_fn!r}`"
    if config.gate:
        words += ", gated"
    if INTERVENTIONS[config.intervention].has_rank:
        if isinstance(config.r, dict):
            words += f", rank {', '.join(f'{r} in layers {layers}' for layers, r in config.r.items())}"
        else:
            words += f", rank {config.r}"
    return words


def _modules(config: LoReftConfig) -> str:
    if not config.target_modules:
        layers = "all layers" if config.layers == "all" else f"layers {config.layers}"
        if config.component == "heads":
            return f"the output of each attention head of {layers}"
        return f"the {config.component} output of {layers}"
    words = f"the output of modules {config.to_dict()['target_modules']}"
    if config.layers_to_transform is not None:
        words += f" in layers {config.layers_to_transform}"
    return words


def _tokens(config: LoReftConfig) -> str:
    if isinstance(config.positions, str):
        return Positions.parse(config.positions).describe()
    specs = [f"layers {layers}: {Positions.parse(spec).describe()}" for layers, spec in config.positions.items()]
    return "; ".join(specs)


def how_to_ask(config: LoReftConfig) -> str:
    """Say in which form to give prompts, that of the training data; empty if the config does not say it."""
    if config.response_template is None:
        return ""
    if config.response_template:
        return " It was trained on chats: give prompts in the tokenizer's chat template."
    return " It was trained on prompts without a chat template: give them as they are."


def size(directory: str) -> str:
    """Say how many parameters and bytes the weights in `directory` have; empty if there are none."""
    shapes = shapes_of_weights(directory)
    if not shapes:
        return ""
    parameters = sum(math.prod(shape) for shape in shapes.values())
    size_of_file = os.path.getsize(os.path.join(directory, SAFETENSORS_WEIGHTS_NAME))
    return f" Size: {parameters:,} parameters, {math.ceil(size_of_file / 1024):,} KiB."


def shapes_of_weights(directory: str) -> dict[str, list[int]]:
    """Return the shape of each tensor in the weights of `directory`, by name; empty if there are none."""
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # `file` is no dict
    except (OSError, SafetensorError):
        return {}
