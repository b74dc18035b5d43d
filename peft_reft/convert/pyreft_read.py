"""Read folders of `pyreft`: a pickle for each intervention, and a config.json without positions."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor

from ..config import LoReftConfig, Tie
from ..edits.formulas import INTERVENTIONS
from .ours import Adapter, load_json, load_pickled, local_folder, rotation_of, stack, targets_of

FORMULAS = {
    "Loreft": "loreft",
    "Noreft": "noreft",
    "Direft": "direft",
    "Nodireft": "nodireft",
    "Consreft": "consreft",
    "Lobireft": "lobireft",
}
"""Our formula for each of their classes, without the ending "Intervention"."""
COMPONENTS = {"block_output": "block", "attention_output": "attention", "mlp_output": "mlp"}
"""Our component for each of theirs."""
LLAMA = {"block": "model.layers.{}", "attention": "model.layers.{}.self_attn", "mlp": "model.layers.{}.mlp"}
"""Names of blocks and their parts in Llama, Qwen, Mistral and Gemma."""

_KEYS = {
    "weight": ("learned_source.weight", "weight"),
    "bias": ("learned_source.bias", "learned_source", "bias"),
    "rotation": ("rotate_layer", "rotate_layer.weight"),
}
"""The names that a tensor may have in a file of theirs; the first that is there is taken. The `state_dict` of their
LoReFT drops the names of its parts."""
ORIGINAL, BASE = "rotate_layer.parametrizations.weight.original", "rotate_layer.parametrizations.weight.0.base"
"""The names of R in the form of torch's `parametrizations.orthogonal`, see `rotation_of`."""
_PEFT = "base_model.model."
"""The beginning of names in a `PeftModel`, if their `ReftModel` wraps one."""


@dataclass(frozen=True)
class _Place:
    """Where one of their interventions acts, and its file."""

    component: str | None
    """Our name of the component; None if theirs names a module."""
    layer: int
    module: str | None
    """The module that theirs names, if it names one."""
    file: str


def from_pyreft(
    path_or_name: str,
    positions: str | dict[str, str],
    act_fn: str | None = None,
    dropout: float = 0.0,
    base: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> Adapter:
    """Read a folder that `pyreft`'s `ReftModel.save` wrote.

    Args:
        path_or_name: the folder, or its name on the Hub.
        positions: the tokens that it was trained on, as in `LoReftConfig`; the folder does not say them. If each group
            has an intervention (`share_weights=False`), these are in the order of the groups. Their data sets of class
            `ReftSupervisedDataset` leave out the last token of the prompt: their `f2+l2` is our `f2+l2~1`.
        act_fn: the activation that it was trained with; the folder does not say it.
        dropout: for further training. Theirs falls on the edited state, ours on the edit.
        base: folder or Hub name of the base model, of which only the config is read. Without it, blocks are taken to
            have the names that Llama, Qwen, Mistral and Gemma give them.
        task_type: as in any PEFT config.

    Returns:
        The adapter. Its `tie` is `"layer"`, `"group"` or `"position"`, by the number of interventions in a layer.

    Raises:
        ValueError: a file is damaged or missing, or something in it has no form in a `LoReftConfig`.
    """
    folder = local_folder(path_or_name, ["config.json", "intkey*", "pytorch_model.bin"])
    config = _read_config(folder)
    formula = _formula(config)
    places = _places(folder, config["representations"])
    by_module, fields = _modules(places, base)
    interventions: dict[str, list[dict[str, Tensor]]] = {}
    for module, there in by_module.items():
        interventions[module] = [_read(place, formula, act_fn) for place in there]
    ranks = [next(iter(each[0].values())).shape[0] for each in interventions.values()]
    layers = [there[0].layer for there in by_module.values()]
    if len(set(ranks)) > 1 and "target_modules" in fields:
        raise ValueError(f"Interventions on modules that are no blocks have the ranks {ranks}: expected a single one.")
    converted = LoReftConfig(
        task_type=task_type,
        intervention=formula,
        r=ranks[0] if len(set(ranks)) == 1 else {str(layer): r for layer, r in zip(layers, ranks)},
        positions=positions,
        act_fn=act_fn,
        dropout=dropout,
        base_model_name_or_path=base,
        **fields,
    )
    tie = _tie(converted, {module: len(each) for module, each in interventions.items()}, layers)
    weights = {}
    for module, each in interventions.items():
        weights[module] = each[0] if tie == "layer" else stack(each)
    path = os.path.join(folder, "pytorch_model.bin")
    others = _trained(path) if os.path.isfile(path) else {}
    modules_to_save = sorted({name.partition(".")[0] for name in others})
    for name in modules_to_save:
        if any(module.startswith(f"{name}.") for module in weights):
            raise ValueError(f"{path} holds weights of the blocks themselves: {sorted(others)[:3]} ...")
    return Adapter(replace(converted, tie=tie, modules_to_save=modules_to_save or None), weights, others)


def _read_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, "config.json")
    config = load_json(path)
    if not config.get("representations") or not config.get("intervention_types"):
        raise ValueError(f"{path} has no `representations` and `intervention_types`: pyreft did not write it.")
    return config


def _formula(config: dict[str, Any]) -> str:
    """Return our formula for the class of all their interventions."""
    types = config["intervention_types"]
    if isinstance(types, str):
        types = [types]
    classes = {re.sub(r"^.*?(\w+)'?>?$", r"\1", each) for each in types}  # <class 'pyreft.interventions.NAME'>
    known = {f"{name}Intervention": formula for name, formula in FORMULAS.items()}
    if len(classes) > 1 or not classes <= set(known):
        raise ValueError(f"Interventions of class {sorted(classes)}: expected one of {', '.join(known)} throughout.")
    return known[classes.pop()]


def _places(folder: str, representations: list[Any]) -> list[_Place]:
    """Read where their interventions act, and find the file of each."""
    fields = ("layer", "component", "unit", "max_number_of_units")
    files = {re.sub(r"\W", "_", name): name for name in os.listdir(folder)}
    seen: dict[str, int] = {}
    places = []
    for entry in representations:
        values = entry if isinstance(entry, dict) else dict(zip(fields, entry))
        layer = values.get("layer", 0)
        component = values.get("component", "block_output")
        unit = values.get("unit", "pos")
        units = values.get("max_number_of_units", 1)
        if unit != "pos" or units != 1:
            raise ValueError(f"unit={unit!r} with {units} units: only 'pos', one unit a position, can be converted.")
        names_module = "." in component
        beginning = f"comp_{component}" if names_module else f"layer_{layer}_comp_{component}"
        key = f"{beginning}_unit_{unit}_nunit_{units}"
        seen[key] = seen.get(key, -1) + 1
        name = f"intkey_{key}#{seen[key]}.bin"
        found = files.get(re.sub(r"\W", "_", name))
        if found is None:
            raise ValueError(f"{folder} has no {name}, which its config.json names.")
        file = os.path.join(folder, found)
        if names_module:
            module = _module(component)
            last = module.rpartition(".")[2]
            places.append(_Place(None, int(last) if last.isdigit() else int(layer), module, file))
        elif component in COMPONENTS:
            places.append(_Place(COMPONENTS[component], int(layer), None, file))
        else:
            raise ValueError(
                f"component={component!r}: expected one of {', '.join(COMPONENTS)}, or a module's output."
            )
    return places


def _module(component: str) -> str:
    """Turn `model.layers[15].output` into `model.layers.15`, its name in the model that a `PeftModel` wraps."""
    path, _, end = re.sub(r"\[(\d+)\]", r".\1", component).rpartition(".")
    if end != "output":
        raise ValueError(f"component={component!r}: only outputs of modules can be edited.")
    return path.removeprefix(_PEFT)


def _modules(places: list[_Place], base: str | None) -> tuple[dict[str, list[_Place]], dict[str, Any]]:
    """Sort places by the name of their module; also return the fields of the config that choose these modules."""
    components = {place.component for place in places}
    if len(components) > 1:
        raise ValueError(f"Interventions on several components {sorted(map(str, components))}: one adapter has one.")
    (component,) = components
    targets = targets_of(base, component or "block")
    by_module: dict[str, list[_Place]] = {}
    for place in sorted(places, key=lambda place: place.layer):
        if place.module is not None:
            module = place.module
        elif targets is None:
            module = LLAMA[str(component)].format(place.layer)
        elif 0 <= place.layer < len(targets):
            module = targets[place.layer].name
        else:
            raise ValueError(f"Layer {place.layer} is edited, but base={base!r} has {len(targets)} layers.")
        by_module.setdefault(module, []).append(place)
    layers = [there[0].layer for there in by_module.values()]
    if component is None and not all(re.fullmatch(r".*\.\d+", module) for module in by_module):
        return by_module, {"target_modules": [*by_module]}
    return by_module, {"layers": layers, "component": component or "block"}


def _trained(path: str) -> dict[str, Tensor]:
    """Read what was trained besides the interventions, by its name in the base model."""
    trained: dict[str, Tensor] = {}
    for key, tensor in load_pickled(path).items():
        name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key.removeprefix(_PEFT))
        if any(f".{prefix}" in name for prefix in (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "base_layer.")):
            raise ValueError(
                f"{path} holds {key}, of a PEFT adapter that was trained together with the interventions. Save it "
                "with PEFT's `save_pretrained`, and convert a copy of the folder without this file."
            )
        trained[name] = tensor
    return trained


def _tie(config: LoReftConfig, counts: dict[str, int], layers: list[int]) -> Tie:
    """Find how weights are tied, by the number of interventions of each module.

    Args:
        config: with the positions.
        counts: the number of interventions, by module.
        layers: the layer of each module, in the same order.
    """
    if isinstance(config.positions, str):
        specs = config.specs * len(counts)
    else:
        by_layer = config.positions_by_layer(max(layers) + 1)
        specs = [by_layer[layer] for layer in layers]
    expected: dict[Tie, list[int | None]] = {"layer": [], "group": [], "position": []}
    for spec in specs:
        expected["layer"].append(1)
        expected["group"].append(len(spec.groups))
        expected["position"].append(spec.groups.width if spec.counted else None)
    for tie, numbers in expected.items():
        if numbers == list(counts.values()):
            return tie
    raise ValueError(
        f"The modules have {counts} interventions, but positions={config.positions!r} needs 1 in each (tied), "
        f"{expected['group']} (one for each group) or {expected['position']} (one for each position)."
    )


def _read(place: _Place, formula: str, act_fn: str | None) -> dict[str, Tensor]:
    """Read one of their files as the parameters of `formula`."""
    held = load_pickled(place.file)
    bias = _take("bias", held, place.file)
    shapes = INTERVENTIONS[formula].parameter_shapes
    if "R" in shapes:
        parameters = {"b": bias, "R": _rotation(held, place.file)}
        if "W" in shapes:
            parameters["W"] = _take("weight", held, place.file)
        return parameters
    if "proj_layer.weight" not in held:
        raise ValueError(f"{place.file} has no proj_layer.weight, but {', '.join(map(str, held))}.")
    parameters = {"b": bias, "W1": _take("weight", held, place.file), "W2": held["proj_layer.weight"].float()}
    if formula == "noreft":
        subtracted_bias = held.get("proj_layer.bias", torch.zeros_like(bias)).float()
        if act_fn is None:  # one constant less the other is one constant
            parameters["b"] = bias - subtracted_bias
        else:
            parameters["p"] = subtracted_bias
    return parameters


def _take(what: str, held: dict[str, Any], file: str) -> Tensor:
    """Return the tensor that has one of the names in `_KEYS`, float32."""
    for key in _KEYS[what]:
        found = held.get(key)
        if isinstance(found, Tensor):
            return found.float()
    raise ValueError(f"{file} has no {' or '.join(_KEYS[what])}, but {', '.join(map(str, held))}.")


def _rotation(held: dict[str, Any], file: str) -> Tensor:
    """Return R, (r, d) float32, in whichever of their forms it is stored."""
    if ORIGINAL in held:
        r = rotation_of(held[ORIGINAL], held.get(BASE))
    else:
        r = _take("rotation", held, file).mT.contiguous()
    error = (r @ r.mT - torch.eye(len(r))).abs().max()
    if not error < 0.05:  # NaN is not, either
        raise ValueError(f"{file}: the rows of R are not orthonormal (R Rᵀ is off by {error:.2g}).")
    return r
