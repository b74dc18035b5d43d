"""Control vectors of llama.cpp and repeng: one GGUF file with a vector `direction.N`, added behind block N."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..config import LoReftConfig
from ..files import check_finite
from .ours import Adapter, targets_of
from .pyreft_write import their_modules

_ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(?P<layer>[1-9][0-9]*)")
_FORMULAS = ("bias", "lobireft")


def to_control_vector(adapter: Adapter, destination: str, base: str | None = None) -> None:
    """Write one GGUF file, for llama.cpp's `--control-vector` and repeng's `ControlVector.import_gguf`.

    `direction.N` is the vector added behind block N, counted from 0 as in `layers`: b of `intervention="bias"`, Rᵀb of
    `"lobireft"`. Both programs add it to every token of prompt and answer, so the adapter must have `positions="all"`.
    No file can hold a vector for block 0.

    Args:
        adapter: what `Adapter.load` returns.
        destination: a file that does not exist.
        base: the base model, whose config is read; None: the one that the adapter's config names. repeng wants its
            type in the file, and with `tie="model"` it says which layers share the weights.

    Raises:
        ValueError: a control vector cannot hold the adapter, or no base model is named, or the file exists.
        ImportError: the package `gguf` is not installed.
    """
    config = adapter.config
    _check_config(config)
    if adapter.others:
        fields = (
            f"modules_to_save={config.modules_to_save!r}, trainable_token_indices={config.trainable_token_indices!r}"
        )
        raise ValueError(f"{fields}: a control vector has no place for what was trained besides the edits.")
    named = base or config.base_model_name_or_path
    if not named:
        raise ValueError("base_model_name_or_path=None: give `base`, the model whose type a control vector names.")
    directions = {}
    for module in their_modules(adapter, named):
        if module.layer == 0:
            raise ValueError(
                f"layers={config.layers!r}: the adapter edits layer 0, and a control vector has layers from 1 only "
                "(llama.cpp refuses `direction.0`). Train it without layer 0."
            )
        directions[module.layer] = _vector(module.intervention(0))
    if os.path.exists(destination):
        raise ValueError(f"{destination} exists. Give another, nothing is overwritten.")
    writer = _gguf().GGUFWriter(destination, _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", AutoConfig.from_pretrained(named).model_type)
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in sorted(directions.items()):
        writer.add_tensor(f"direction.{layer}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def from_control_vector(path: str, base: str | None = None, task_type: str | None = None) -> Adapter:
    """Read a control vector, that llama.cpp or repeng wrote, as an adapter of `intervention="bias"`.

    The vectors stay as they are, at strength 1; `model.set_scale` or `--control-vector-scaled` sets another.

    Args:
        path: the GGUF file.
        base: name of the base model, whose config says how blocks are called; None: as in Llama and similar models.
        task_type: as in any PEFT config.

    Raises:
        ValueError: the file is missing, damaged, or no control vector, or has layers that the base has not.
        ImportError: the package `gguf` is not installed.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file. Expected a GGUF file with a control vector.")
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else bytes(field.parts[-1]).decode()
    except Exception as error:  # it raises errors of numpy, struct and its own
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error
    if architecture != _ARCHITECTURE:
        raise ValueError(f"{path}: general.architecture={architecture!r}, expected {_ARCHITECTURE!r}.")
    directions: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        match = _DIRECTION.fullmatch(tensor.name)
        if match is None:
            raise ValueError(f"{path} holds the tensor {tensor.name!r}, expected `direction.N` with N from 1.")
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32 or tensor.data.ndim != 1:
            raise ValueError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name} of shape {tensor.data.shape}, "
                "expected F32 with one dimension."
            )
        directions[int(match["layer"])] = torch.from_numpy(tensor.data.copy())
    if not directions:
        raise ValueError(f"{path} holds no tensor `direction.N`.")
    sizes = sorted({len(direction) for direction in directions.values()})
    if len(sizes) > 1:
        raise ValueError(f"{path} has vectors of the sizes {sizes}, expected one size.")
    check_finite({f"direction.{layer}": direction for layer, direction in directions.items()}, path)
    return added_vectors(directions, base, task_type)


def added_vectors(directions: dict[int, Tensor], base: str | None, task_type: str | None) -> Adapter:
    """Return the adapter that adds a vector to every token behind each of some blocks.

    Raises:
        ValueError: the base model has fewer layers.
    """
    targets = targets_of(base, "block")
    weights = {}
    for layer, direction in sorted(directions.items()):
        if targets is not None and layer >= len(targets):
            raise ValueError(f"layer {layer}: the base model has the layers 0 to {len(targets) - 1}.")
        name = f"model.layers.{layer}" if targets is None else targets[layer].name
        weights[name] = {"b": direction}
    config = LoReftConfig(
        task_type=task_type,
        intervention="bias",
        positions="all",
        layers=sorted(directions),
        base_model_name_or_path=base,
    )
    return Adapter(config, weights)


def _check_config(config: LoReftConfig) -> None:
    """Check that all tokens get the same vector, whatever their hidden state."""
    if config.intervention not in _FORMULAS:
        allowed = ", ".join(map(repr, _FORMULAS))
        raise ValueError(
            f"intervention={config.intervention!r}: a control vector adds the same to each hidden state. "
            f"Allowed: {allowed}."
        )
    for name, needed in {"component": "block", "gate": False, "target_modules": None}.items():
        value = getattr(config, name)
        if value != needed:
            raise ValueError(
                f"{name}={value!r}: a control vector is added behind blocks, ungated. Allowed: {needed!r}."
            )
    if not config.edits_everything:
        raise ValueError(
            f"positions={config.positions!r} with tie={config.tie!r}: a control vector is added to every token alike. "
            "Allowed: positions='all' with tie='layer' or 'model'."
        )


def _vector(parameters: dict[str, Tensor]) -> Tensor:
    """Return what the formula adds, (d,) float32."""
    if "R" not in parameters:
        return parameters["b"].float()
    return parameters["R"].float().mT @ parameters["b"].float()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"Control vectors need the package gguf: pip install gguf ({error})") from error
    return gguf
