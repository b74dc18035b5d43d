"""An adapter as `save_pretrained` writes it, without a model around it; and what the modules of this room share."""

from __future__ import annotations

import json
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
        config: the adapter's config.
        weights: the tensors, by the name of the edited module in the base model, then by the parameter's name in the
            formula. With `tie="group"` or `"position"` they have a leading dimension, one intervention for each group
            or position. With `tie="model"` the first module stands for all.
        others: the tensors of `modules_to_save`, by their names in the base model.
    """

    config: LoReftConfig
    weights: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def load(path_or_name: str) -> Adapter:
        """Read an adapter from a folder or the Hub.

        Raises:
            ValueError: a file is missing, damaged or of another method, has values that are not finite, or tensors
                that are not those of the formula; the message names the file.
        """
        folder = local_folder(path_or_name, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
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
        """Write the folder that PEFT loads.

        Raises:
            ValueError: shapes do not fit each other, or the folder is not empty.
        """
        self._check_shapes()
        new_folder(destination)
        tensors = {}
        for module, parameters in self.weights.items():
            for name, tensor in parameters.items():
                tensors[f"{_PREFIX}{module}{_WEIGHTS}{name}"] = tensor.contiguous()
        for name, tensor in self.others.items():
            tensors[f"{_PREFIX}{name}"] = tensor.contiguous()
        save_file(tensors, os.path.join(destination, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        self.config.inference_mode = True
        self.config.save_pretrained(destination)  # also writes the model card

    def _check_shapes(self) -> None:
        """Check that every module has the tensors of the formula, with one r and one d."""
        expected = INTERVENTIONS[self.config.intervention].shapes_of(self.config.act_fn, self.config.gate)
        for module, parameters in self.weights.items():
            if set(expected) != set(parameters):
                raise ValueError(f"{module} has the tensors {sorted(parameters)}, but the formula {sorted(expected)}.")
            sizes = {"1": 1}  # of "r" and "d", as the first tensor that has them says
            for name, dimensions in expected.items():
                shape = parameters[name].shape[-len(dimensions) :]
                for letter, size in zip(dimensions, shape):
                    if sizes.setdefault(letter, size) != size:
                        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
                        raise ValueError(f"{module} has tensors that do not go together: {shapes}.")


def local_folder(path_or_name: str, patterns: list[str]) -> str:
    """Return the folder that `path_or_name` is; if it is a name on the Hub, one with the files of `patterns`."""
    if os.path.isdir(path_or_name):
        return path_or_name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_name):
        raise ValueError(f"{path_or_name} is no folder, and no name on the Hub.")
    return snapshot_download(path_or_name, allow_patterns=patterns)


def new_folder(path: str) -> None:
    """Make a folder to write to.

    Raises:
        ValueError: there is a file of that name, or a folder that is not empty.
    """
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ValueError(f"{path} exists and is not an empty folder. Give another, nothing is overwritten.")
    os.makedirs(path, exist_ok=True)


def load_pickled(path: str) -> dict[str, Any]:
    """Read the tensors of a file that `torch.save` wrote. Nothing but tensors is unpickled.

    Raises:
        ValueError: the file is damaged, or holds something else than tensors; the message names it.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise errors of their own
        raise ValueError(f"{path} cannot be read as a file of tensors: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, expected a dict of tensors.")
    return held


def load_json(path: str) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing or damaged; the message names it.
    """
    try:
        with open(path) as file:
            content: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return content


def stack(interventions: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the parameters of interventions along a new leading dimension."""
    return {name: torch.stack([each[name] for each in interventions]) for name in interventions[0]}


def targets_of(base: str | None, component: str) -> list[Target] | None:
    """Return the modules that `component` names in the base model, without loading weights; None without a base."""
    if base is None:
        return None
    from transformers import AutoConfig

    return find_targets(skeleton(AutoConfig.from_pretrained(base)), component)


def rotation_of(original: Tensor, base: Tensor | None) -> Tensor:
    """Compute R of torch's `parametrizations.orthogonal` from the tensors in its state dict.

    Args:
        original: (d, r), or (r, d) if it is of a linear layer: the unconstrained tensor.
        base: (d, d), which multiplies the parametrised matrix; or None.

    Returns:
        R, (r, d) float32.
    """
    x = (original.mT if original.shape[-2] < original.shape[-1] else original).float()  # (d, r)
    # torch takes the matrix exponential for square matrices, and Householder reflections for others.
    if x.shape[0] == x.shape[1]:
        lower = x.tril()
        q = torch.linalg.matrix_exp(lower - lower.mT)  # (d, d)
    else:
        below = x.tril(-1)  # (d, r): a reflection in each column
        q = torch.linalg.householder_product(below, 2 / (1 + (below * below).sum(-2)))
        q = q * x.diagonal().int()  # (d, r): torch keeps the signs in the diagonal
    if base is not None:
        q = base.float() @ q
    rotation: Tensor = q.mT.contiguous()
    return rotation
