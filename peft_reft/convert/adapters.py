"""`adapters`' folders: adapter_config.json, and one file of tensors, pickled or safetensors."""

from __future__ import annotations

import json
import os
import re

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import LoReftConfig
from .ours import Adapter, load_pickled, local_folder, rotation_of

_CONFIG, _SAFE, _PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
_KEY = re.compile(r"(?P<module>.+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>\d+)\.(?P<name>.+)")
_ORIGINAL, _BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
_ACT_FN = {"leakyrelu": "leaky_relu"}
FORMULAS = ("loreft", "noreft", "direft", "nodireft")


def from_adapters(
    source: str, intervention: str | None = None, base: str | None = None, task_type: str | None = None
) -> Adapter:
    """Read a folder that `adapters`' `save_adapter` wrote with one of its ReFT configs.

    Args:
        source: the folder, or its name on the Hub.
        intervention: which formula it is, `"loreft"`, `"noreft"`, `"direft"` or `"nodireft"` (what they call DiReFT):
            the folder does not say whether the projection is subtracted. Needed where R is not orthonormal; where it
            is, `"loreft"` unless given.
        base: name of the base model; None: the one that the folder names.
        task_type: as in any PEFT config; the folder does not say it.

    Their prefix and suffix are those of the whole row, answer included, and of every single token while decoding; ours
    are those of the prompt. A row that is nothing but a prompt, as of a classifier, is edited alike by both unless
    prefix and suffix meet.

    Raises:
        ValueError: a file is damaged or missing, or `intervention` is needed or contradicts what is there.
    """
    folder = local_folder(source, [_CONFIG, _SAFE, _PICKLED])
    path = os.path.join(folder, _CONFIG)
    try:
        with open(path) as file:
            saved = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    theirs = saved.get("config") or {}
    if theirs.get("architecture") != "reft":
        raise ValueError(f"{path} is of architecture {theirs.get('architecture')!r}, expected 'reft'.")
    formula = _formula(intervention, bool(theirs["orthogonality"]), theirs.get("subtract_projection"))
    prefix, suffix, tied = theirs["prefix_positions"], theirs["suffix_positions"], theirs["tied_weights"]
    positions = "+".join(f"{kind}{count}" for kind, count in (("f", prefix), ("l", suffix)) if count)
    units = [n for n, count in enumerate((prefix, suffix)) if count]  # untied, each has its own, also for no token
    act_fn = theirs.get("non_linearity")
    weights = {}
    for module, own in _by_unit(folder).items():
        each = [_read(own[n], formula, act_fn, module) for n in ([0] if tied else units)]
        weights[module] = {name: torch.stack([unit[name] for unit in each]) for name in each[0]}
        if len(each) == 1:
            weights[module] = each[0]
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
            f"intervention={intervention!r}: what the folder says of it allows {' or '.join(map(repr, fits))}."
        )
    return intervention


def _by_unit(folder: str) -> dict[str, dict[int, dict[str, Tensor]]]:
    safe, pickled = os.path.join(folder, _SAFE), os.path.join(folder, _PICKLED)
    if not os.path.isfile(safe) and not os.path.isfile(pickled):
        raise ValueError(f"{folder} has neither {_SAFE} nor {_PICKLED}.")
    held = load_file(safe) if os.path.isfile(safe) else load_pickled(pickled)
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in held.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{folder} holds {key}, which is no part of a ReFT module.")
        found.setdefault(match["module"], {}).setdefault(int(match["unit"]), {})[match["name"]] = tensor
    return found


def _read(held: dict[str, Tensor], formula: str, act_fn: str | None, module: str) -> dict[str, Tensor]:
    """One of their units, as the parameters of `formula`."""
    if _ORIGINAL in held:
        projection = rotation_of(held[_ORIGINAL], held.get(_BASE))
    elif "projection.weight" in held:
        projection = held["projection.weight"].float()
    else:
        raise ValueError(f"{module} has no projection, but {', '.join(held)}.")
    orthonormal = formula in ("loreft", "direft")
    source, b = held["learned_source.weight"].float(), held["learned_source.bias"].float()
    if orthonormal:
        return {"R": projection, "W": source, "b": b}
    parameters = {"W2": projection, "W1": source, "b": b}
    return parameters | ({"p": torch.zeros_like(b)} if formula == "noreft" and act_fn else {})
