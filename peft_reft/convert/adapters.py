"""Read folders of `adapters`: adapter_config.json, and one file of tensors, pickled or safetensors."""

from __future__ import annotations

import os
import re

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import LoReftConfig
from .ours import Adapter, load_json, load_pickled, local_folder, rotation_of, stack

_CONFIG, _SAFE, _PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
# model.layers.0.reft_layer.refts.NAME.units.0.learned_source.weight
_KEY = re.compile(r"(?P<module>.+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>\d+)\.(?P<name>.+)")
_ORIGINAL, _BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
_ACT_FN = {"leakyrelu": "leaky_relu"}
"""Activations that transformers spells in another way."""
FORMULAS = ("loreft", "noreft", "direft", "nodireft")


def from_adapters(
    path_or_name: str, intervention: str | None = None, base: str | None = None, task_type: str | None = None
) -> Adapter:
    """Read a folder that `adapters`' `save_adapter` wrote with one of its ReFT configs.

    Their prefix and suffix count in the whole row, answer included; while decoding, each token is a row. Ours count in
    the prompt. If a row is nothing but a prompt, as for a classifier, both edit the same tokens, unless prefix and
    suffix meet.

    Args:
        path_or_name: the folder, or its name on the Hub.
        intervention: the formula, `"loreft"`, `"noreft"`, `"direft"` or `"nodireft"` (which they call DiReFT). The
            folder does not say whether the projection is subtracted. Needed if R is not orthonormal; if it is, None
            stands for `"loreft"`.
        base: name of the base model; None: the one that the folder names.
        task_type: as in any PEFT config. The folder does not say it.

    Raises:
        ValueError: a file is damaged or missing, or `intervention` is needed, or contradicts the folder.
    """
    folder = local_folder(path_or_name, [_CONFIG, _SAFE, _PICKLED])
    path = os.path.join(folder, _CONFIG)
    saved = load_json(path)
    theirs = saved.get("config") or {}
    if theirs.get("architecture") != "reft":
        raise ValueError(f"{path} is of architecture {theirs.get('architecture')!r}, expected 'reft'.")
    formula = _formula(intervention, bool(theirs["orthogonality"]), theirs.get("subtract_projection"))
    prefix, suffix, tied = theirs["prefix_positions"], theirs["suffix_positions"], theirs["tied_weights"]
    positions = "+".join(f"{letter}{count}" for letter, count in (("f", prefix), ("l", suffix)) if count)
    # Untied, unit 0 is the prefix's and unit 1 the suffix's. Both are in the file, even if one has no token.
    units = [0] if tied else [unit for unit, count in enumerate((prefix, suffix)) if count]
    act_fn = theirs.get("non_linearity")
    weights = {}
    for module, by_unit in _by_unit(folder).items():
        each = [_read(by_unit[unit], formula, act_fn, module) for unit in units]
        weights[module] = each[0] if len(each) == 1 else stack(each)
    config = LoReftConfig(
        task_type=task_type,
        intervention=formula,
        r=theirs["r"],
        positions=positions,
        layers=theirs["layers"],
        act_fn=None if act_fn is None else _ACT_FN.get(act_fn.lower(), act_fn.lower()),
        tie="layer" if tied or len(units) == 1 else "group",
        dropout=theirs.get("dropout", 0.0),
        base_model_name_or_path=base or saved.get("model_name"),
    )
    return Adapter(config, weights)


def _formula(intervention: str | None, orthonormal: bool, subtracts: bool | None) -> str:
    """Return the formula: the one given, if it fits what the folder says, or the only one that fits."""
    fits: tuple[str, ...] = ("loreft", "direft") if orthonormal else ("noreft", "nodireft")
    if subtracts is not None:
        fits = fits[:1] if subtracts else fits[1:]
    if intervention is None:
        if len(fits) == 1 or orthonormal:
            return fits[0]
        raise ValueError(
            "intervention: the folder does not say whether the projection is subtracted. Give 'noreft' (their "
            "NoReftConfig) or 'nodireft' (their DiReftConfig)."
        )
    if intervention not in fits:
        raise ValueError(
            f"intervention={intervention!r}: by what the folder says, it can only be {' or '.join(map(repr, fits))}."
        )
    return intervention


def _by_unit(folder: str) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Read the tensors: by module, number of the unit, and name."""
    safe, pickled = os.path.join(folder, _SAFE), os.path.join(folder, _PICKLED)
    if not os.path.isfile(safe) and not os.path.isfile(pickled):
        raise ValueError(f"{folder} has neither {_SAFE} nor {_PICKLED}.")
    held = load_file(safe) if os.path.isfile(safe) else load_pickled(pickled)
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in held.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{folder} holds {key}, which is no part of a ReFT module.")
        units = found.setdefault(match["module"], {})
        units.setdefault(int(match["unit"]), {})[match["name"]] = tensor
    return found


def _read(held: dict[str, Tensor], formula: str, act_fn: str | None, module: str) -> dict[str, Tensor]:
    """Return the tensors of one of their units as the parameters of `formula`."""
    if _ORIGINAL in held:
        projection = rotation_of(held[_ORIGINAL], held.get(_BASE))
    elif "projection.weight" in held:
        projection = held["projection.weight"].float()
    else:
        raise ValueError(f"{module} has no projection, but {', '.join(held)}.")
    weight, bias = held["learned_source.weight"].float(), held["learned_source.bias"].float()
    if formula in ("loreft", "direft"):
        return {"R": projection, "W": weight, "b": bias}
    parameters = {"W2": projection, "W1": weight, "b": bias}
    if formula == "noreft" and act_fn:
        parameters["p"] = torch.zeros_like(bias)  # they have none
    return parameters
