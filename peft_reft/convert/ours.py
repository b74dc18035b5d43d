"""An adapter as `save_pretrained` writes it, without a model around it; and what the other modules share."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import LoReftConfig
from ..edits.formulas import INTERVENTIONS
from ..files import check_finite
from ..tuner.architectures import Target, find_targets, skeleton
from ..tuner.layer import CHILD

_PREFIX = "base_model.model."
_WEIGHTS = f".{CHILD}.loreft_weights."


@dataclass
class Adapter:
    """Config and tensors of an adapter file.

    Args:
        config: as saved.
        weights: name of an edited module in the base model -> name of a parameter, as in the formula -> the tensor,
            with a leading dimension for interventions of their own by group or position. With `tie="model"` the first
            module stands for all.
        others: what `modules_to_save` saved: name in the base model -> the tensor.
    """

    config: LoReftConfig
    weights: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def load(source: str) -> Adapter:
        """Read a folder, or what the Hub has by that name.

        Raises:
            ValueError: a file is missing, damaged or of another method, has values that are not finite, or tensors
                that are not those of the formula; names it.
        """
        folder = local_folder(source, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if not os.path.isfile(os.path.join(folder, name)):
                raise ValueError(f"{folder} has no {name}: it is no adapter that `save_pretrained` wrote.")
        config = LoReftConfig.from_pretrained(folder)
        if not isinstance(config, LoReftConfig):
            raise ValueError(f"{folder} holds an adapter of type {config.peft_type}, not of LoReFT.")
        adapter = Adapter(config, {})
        tensors = load_file(path)
        check_finite(tensors, path)
        for key, tensor in tensors.items():
            module, found, parameter = key.removeprefix(_PREFIX).partition(_WEIGHTS)
            if found:
                adapter.weights.setdefault(module, {})[parameter] = tensor
            else:
                adapter.others[module] = tensor
        try:
            adapter._check_shapes()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return adapter

    def save(self, destination: str) -> None:
        """Write the folder that PEFT loads. Raises ValueError if shapes do not fit, or something is there already."""
        self._check_shapes()
        new_folder(destination)
        tensors = {
            f"{_PREFIX}{module}{_WEIGHTS}{name}": tensor.contiguous()
            for module, parameters in self.weights.items()
            for name, tensor in parameters.items()
        }
        tensors |= {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in self.others.items()}
        save_file(tensors, os.path.join(destination, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        self.config.inference_mode = True
        self.config.save_pretrained(destination)  # and the model card

    def _check_shapes(self) -> None:
        names = INTERVENTIONS[self.config.intervention].shapes_of(self.config.act_fn, self.config.gate)
        for module, parameters in self.weights.items():
            sizes = {"1": 1}
            if {*names} != {*parameters}:
                raise ValueError(f"{module} has the tensors {sorted(parameters)}, but the formula {sorted(names)}.")
            for name, dimensions in names.items():
                shape = parameters[name].shape[-len(dimensions) :]
                if any(sizes.setdefault(letter, size) != size for letter, size in zip(dimensions, shape)):
                    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
                    raise ValueError(f"{module} has tensors that do not go together: {shapes}.")


def local_folder(source: str, patterns: list[str]) -> str:
    """`source` itself if it is a folder, else what the Hub has by that name, the files of `patterns` only."""
    if os.path.isdir(source):
        return source
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"{source} is no folder, and no name on the Hub.")
    return snapshot_download(source, allow_patterns=patterns)


def new_folder(path: str) -> None:
    """Make a folder to write to. Raises ValueError rather than mixing with what is there."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ValueError(f"{path} exists and is not an empty folder. Give another, nothing is overwritten.")
    os.makedirs(path, exist_ok=True)


def load_pickled(path: str) -> dict[str, Any]:
    """The tensors of a file that `torch.save` wrote; nothing but tensors is unpickled.

    Raises:
        ValueError: it is damaged, or holds something else than tensors; the message names the file.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(f"{path} cannot be read as a file of tensors: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, expected a dict of tensors.")
    return held


def targets_of(base: str | None, component: str) -> list[Target] | None:
    """The modules that `component` names in the base model, without loading a weight; None if no base is given."""
    if base is None:
        return None
    from transformers import AutoConfig

    return find_targets(skeleton(AutoConfig.from_pretrained(base)), component)


def rotation_of(original: Tensor, base: Tensor | None) -> Tensor:
    """R, (r, d) float32, of torch's `parametrizations.orthogonal`, from what its state dict holds.

    Args:
        original: (d, r), or (r, d) as of a linear layer: the unconstrained tensor.
        base: (d, d): what the parametrised matrix is multiplied by, or None.
    """
    x = (original.mT if original.shape[-2] < original.shape[-1] else original).float()
    if x.shape[0] == x.shape[1]:  # torch's choice for square ones
        lower = x.tril()
        q = torch.linalg.matrix_exp(lower - lower.mT)
    else:
        below = x.tril(-1)
        q = torch.linalg.householder_product(below, 2 / (1 + (below * below).sum(-2)))
        q = q * x.diagonal().int()
    return (q if base is None else base.float() @ q).mT.contiguous()
