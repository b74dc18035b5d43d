"""`pyreft`'s folders: a pickle for each intervention; config.json knows neither positions nor activation."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor

from ..config import LoReftConfig, Tie
from ..edits.formulas import INTERVENTIONS
from ..positions.layers import resolve_layers
from .ours import Adapter, load_pickled, local_folder, new_folder, rotation_of, targets_of

FORMULAS = {
    "Loreft": "loreft",
    "Noreft": "noreft",
    "Direft": "direft",
    "Nodireft": "nodireft",
    "Consreft": "consreft",
    "Lobireft": "lobireft",
}
COMPONENTS = {"block_output": "block", "attention_output": "attention", "mlp_output": "mlp"}
LLAMA = {"block": "model.layers.{}", "attention": "model.layers.{}.self_attn", "mlp": "model.layers.{}.mlp"}

# Where each of our tensors may stand in a file of theirs; the first that is there is taken. LoReFT's own `state_dict`
# drops the names of its parts.
_SOURCES = {
    "weight": ("learned_source.weight", "weight"),
    "bias": ("learned_source.bias", "learned_source", "bias"),
    "rotation": ("rotate_layer", "rotate_layer.weight"),
}
_ORIGINAL, _BASE = "rotate_layer.parametrizations.weight.original", "rotate_layer.parametrizations.weight.0.base"


_PEFT = "base_model.model."
"""How names begin in a `PeftModel`, which `ReftModel` can be put around."""


@dataclass(frozen=True)
class _Place:
    """Where one of their interventions acts."""

    component: str | None
    """Ours, or None where theirs names a module itself."""
    layer: int
    module: str | None
    file: str


def from_pyreft(
    source: str,
    positions: str | dict[str, str],
    act_fn: str | None = None,
    dropout: float = 0.0,
    base: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> Adapter:
    """Read a folder that `pyreft`'s `ReftModel.save` wrote.

    Args:
        source: the folder, or its name on the Hub.
        positions: which tokens it was trained on, which the folder does not say, as in `LoReftConfig`. An intervention
            for each group (`share_weights=False`) goes in the order of the groups. Their data sets of class
            `ReftSupervisedDataset` leave out the last token of the prompt: what is `f2+l2` there, is `f2+l2~1` here.
        act_fn: the activation it was trained with, which the folder does not say.
        dropout: for further training; theirs falls on the edited state, ours on the edit.
        base: folder or Hub name of the base model, whose config alone is read. Without it the blocks are taken to have
            the names that Llama, Qwen, Mistral and Gemma give them.
        task_type: as in any PEFT config.

    Returns:
        The adapter; `tie` is `"layer"`, `"group"` or `"position"`, by the number of interventions in a layer.

    Raises:
        ValueError: a file is damaged or missing, or something in it cannot be said in a `LoReftConfig`.
    """
    folder = local_folder(source, ["config.json", "intkey*", "pytorch_model.bin"])
    config = _read_config(folder)
    formula = _formula(config)
    places = _places(folder, config["representations"])
    by_module, fields = _modules(places, base)
    weights: dict[str, list[dict[str, Tensor]]] = {
        module: [_read(place, formula, act_fn) for place in there] for module, there in by_module.items()
    }
    ranks = [next(iter(each[0].values())).shape[0] for each in weights.values()]
    layers = [there[0].layer for there in by_module.values()]
    if len({*ranks}) > 1 and "target_modules" in fields:
        raise ValueError(f"Interventions on modules that are no blocks have the ranks {ranks}: only one can be said.")
    converted = LoReftConfig(
        task_type=task_type,
        intervention=formula,
        r=ranks[0] if len({*ranks}) == 1 else {str(layer): r for layer, r in zip(layers, ranks)},
        positions=positions,
        act_fn=act_fn,
        dropout=dropout,
        base_model_name_or_path=base,
        **fields,
    )
    tie = _tie(converted, {module: len(each) for module, each in weights.items()}, layers)
    stacked = {
        module: each[0] if tie == "layer" else {name: torch.stack([own[name] for own in each]) for name in each[0]}
        for module, each in weights.items()
    }
    others = os.path.join(folder, "pytorch_model.bin")
    trained = _trained(others) if os.path.isfile(others) else {}
    modules_to_save = sorted({name.partition(".")[0] for name in trained}) or None
    if modules_to_save and any(module.startswith(f"{name}.") for module in weights for name in modules_to_save):
        raise ValueError(f"{others} holds weights of the blocks themselves: {sorted(trained)[:3]} ...")
    return Adapter(replace(converted, tie=tie, modules_to_save=modules_to_save), stacked, trained)


def to_pyreft(adapter: Adapter, destination: str, base: str | None = None) -> None:
    """Write a folder for `pyreft`'s `ReftModel.load`.

    It keeps neither positions nor activation nor dropout: pass them there as ever. Interventions of their own by group
    or position are written as `pyreft` orders them: those of the first group in all layers, then of the second.

    Args:
        adapter: what `Adapter.load` returns.
        destination: a folder that is new or empty.
        base: the base model, needed only with `tie="model"` and `layers="all"`: it says how many layers there are.

    Raises:
        ValueError: `pyreft` has no such intervention.
    """
    config = adapter.config
    names = {ours: theirs for theirs, ours in FORMULAS.items()}
    if config.intervention not in names:
        raise ValueError(f"intervention={config.intervention!r}: pyreft has only {', '.join(map(repr, names))}.")
    if config.gate:
        raise ValueError("gate=True: pyreft's interventions have no gate.")
    modules = their_modules(adapter, base)
    new_folder(destination)
    representations, keys, dimensions = [], [], []
    for n in range(max(len(parameters["b"]) for *_, parameters in modules)):
        for place, key, parameters in modules:
            if n < len(parameters["b"]):
                own = {name: tensor[n] for name, tensor in parameters.items()}
                r, d = own["R" if "R" in own else "W2"].shape
                keys.append(f"{key}_unit_pos_nunit_1#{n}")
                representations.append([*place, "pos", 1, r, *[None] * 9])
                dimensions.append(d)
                torch.save(their_state(config.intervention, own), os.path.join(destination, f"intkey_{keys[-1]}.bin"))
    with open(os.path.join(destination, "config.json"), "w") as file:
        class_name = f"<class 'pyreft.interventions.{names[config.intervention]}Intervention'>"
        content = {
            "intervention_constant_sources": [True] * len(keys),
            "intervention_dimensions": dimensions,
            "intervention_types": [class_name] * len(keys),
            "mode": "parallel",
            "representations": representations,
            "sorted_keys": keys,
        }
        json.dump(content, file, indent=2)
    if adapter.others:
        torch.save(adapter.others, os.path.join(destination, "pytorch_model.bin"))


# Theirs -> ours.


def _read_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, "config.json")
    try:
        with open(path) as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not config.get("representations") or not config.get("intervention_types"):
        raise ValueError(f"{path} has no `representations` and `intervention_types`: pyreft did not write it.")
    return config


def _formula(config: dict[str, Any]) -> str:
    types = config["intervention_types"]
    classes = {re.sub(r"^.*?(\w+)'?>?$", r"\1", each) for each in ([types] if isinstance(types, str) else types)}
    known = {f"{name}Intervention": formula for name, formula in FORMULAS.items()}
    if len(classes) > 1 or not classes <= {*known}:
        raise ValueError(f"Interventions of class {sorted(classes)}: expected one of {', '.join(known)} throughout.")
    return known[classes.pop()]


def _places(folder: str, representations: list[Any]) -> list[_Place]:
    fields = ("layer", "component", "unit", "max_number_of_units")
    files = {re.sub(r"\W", "_", name): name for name in os.listdir(folder)}
    seen: dict[str, int] = {}
    places = []
    for entry in representations:
        at = entry if isinstance(entry, dict) else dict(zip(fields, entry))
        layer, component, unit = at.get("layer", 0), at.get("component", "block_output"), at.get("unit", "pos")
        units = at.get("max_number_of_units", 1)
        if unit != "pos" or units != 1:
            raise ValueError(f"unit={unit!r} with {units} units: only 'pos', one unit a position, can be converted.")
        own_name = "." in component
        key = f"{f'comp_{component}' if own_name else f'layer_{layer}_comp_{component}'}_unit_{unit}_nunit_{units}"
        number = seen[key] = seen.get(key, -1) + 1
        name = f"intkey_{key}#{number}.bin"
        found = files.get(re.sub(r"\W", "_", name))
        if found is None:
            raise ValueError(f"{folder} has no {name}, which its config.json speaks of.")
        if not own_name and component not in COMPONENTS:
            raise ValueError(
                f"component={component!r}: expected one of {', '.join(COMPONENTS)}, or a module's output."
            )
        module = _module(component) if own_name else None
        if module is not None and (last := module.rpartition(".")[2]).isdigit():
            layer = int(last)
        ours = None if own_name else COMPONENTS[component]
        places.append(_Place(ours, int(layer), module, os.path.join(folder, found)))
    return places


def _module(component: str) -> str:
    """`model.layers[15].output` -> `model.layers.15`, as it is called in the model that a `PeftModel` wraps."""
    path, _, end = re.sub(r"\[(\d+)\]", r".\1", component).rpartition(".")
    if end != "output":
        raise ValueError(f"component={component!r}: only outputs of modules can be edited.")
    return path.removeprefix(_PEFT)


def _modules(places: list[_Place], base: str | None) -> tuple[dict[str, list[_Place]], dict[str, Any]]:
    """The interventions of each module by its name, and the fields of the config that choose these modules."""
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
    """What was trained besides, by its name in the base model."""
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
    """How weights are tied, from how many interventions each module has."""
    if isinstance(config.positions, str):
        specs = config.specs * len(counts)
    else:
        by_layer = config.positions_by_layer(max(layers) + 1)
        specs = [by_layer[layer] for layer in layers]
    wanted: dict[Tie, list[int | None]] = {
        "layer": [1] * len(specs),
        "group": [len(spec.groups) for spec in specs],
        "position": [spec.groups.width if spec.counted else None for spec in specs],
    }
    for tie, numbers in wanted.items():
        if numbers == [*counts.values()]:
            return tie
    raise ValueError(
        f"The modules have {counts} interventions, but positions={config.positions!r} wants 1 of each (tied), "
        f"{wanted['group']} (one for each group) or {wanted['position']} (one for each position)."
    )


def _read(place: _Place, formula: str, act_fn: str | None) -> dict[str, Tensor]:
    """One of their files, as the parameters of `formula`."""
    held = load_pickled(place.file)

    def take(what: str) -> Tensor:
        for key in _SOURCES[what]:
            if isinstance(held.get(key), Tensor):
                return held[key].float()
        raise ValueError(f"{place.file} has no {' or '.join(_SOURCES[what])}, but {', '.join(map(str, held))}.")

    def rotation() -> Tensor:
        r = rotation_of(held[_ORIGINAL], held.get(_BASE)) if _ORIGINAL in held else take("rotation").mT.contiguous()
        error = (r @ r.mT - torch.eye(len(r))).abs().max()
        if not error < 0.05:
            raise ValueError(f"{place.file}: the rows of R are not orthonormal (R Rᵀ is off by {error:.2g}).")
        return r

    parameters: dict[str, Tensor] = {"b": take("bias")}
    if "R" in INTERVENTIONS[formula].parameter_shapes:
        parameters["R"] = rotation()
        if "W" in INTERVENTIONS[formula].parameter_shapes:
            parameters["W"] = take("weight")
    else:
        if "proj_layer.weight" not in held:
            raise ValueError(f"{place.file} has no proj_layer.weight, but {', '.join(map(str, held))}.")
        parameters |= {"W1": take("weight"), "W2": held["proj_layer.weight"].float()}
        if formula == "noreft":
            p = held.get("proj_layer.bias", torch.zeros_like(parameters["b"])).float()
            if act_fn is None:  # one constant less the other
                parameters["b"] = parameters["b"] - p
            else:
                parameters["p"] = p
    return parameters


# Ours -> theirs.


def their_modules(adapter: Adapter, base: str | None) -> list[tuple[tuple[int, str], str, dict[str, Tensor]]]:
    """For each edited module: layer and component as they name them, the beginning of its interventions' keys, and the
    parameters, always with a leading dimension for these interventions."""
    lead = adapter.config.tie in ("group", "position")
    return [
        (*_their_place(adapter.config, module), {name: t if lead else t[None] for name, t in parameters.items()})
        for module, parameters in _for_each_layer(adapter, base)
    ]


def _for_each_layer(adapter: Adapter, base: str | None) -> list[tuple[str, dict[str, Tensor]]]:
    """Module by module; with `tie="model"` the one set of weights for each layer."""
    if adapter.config.tie != "model":
        return list(adapter.weights.items())
    config, (first, shared) = adapter.config, next(iter(adapter.weights.items()))
    if config.target_modules is not None:
        raise ValueError("tie='model' with target_modules: which modules share the weights cannot be told.")
    targets = targets_of(base or config.base_model_name_or_path, config.component)
    if targets is None:
        raise ValueError("tie='model': give the base model, which says how many layers share the weights.")
    names = [targets[layer].name for layer in resolve_layers(config.layers, len(targets), "layers")]
    if first not in names:
        raise ValueError(f"The adapter edits {first}, the base model's layers are {', '.join(names)}.")
    return [(name, shared) for name in names]


def _their_place(config: LoReftConfig, module: str) -> tuple[tuple[int, str], str]:
    """Layer and component as they name them, and the beginning of the intervention's key."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", module)
    layer = int(numbers[0]) if numbers else 0
    if config.target_modules is None and numbers:
        component = {ours: theirs for theirs, ours in COMPONENTS.items()}[config.component]
        return (layer, component), f"layer_{layer}_comp_{component}"
    component = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", module) + ".output"
    return (layer, component), f"comp_{component.replace('.', '_')}"


def their_state(formula: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of one of their interventions."""
    if formula == "loreft":
        return {"weight": own["W"].clone(), "bias": own["b"].clone(), "rotate_layer": own["R"].mT.contiguous()}
    r, d = own["R" if "R" in own else "W2"].shape
    state = {"embed_dim": torch.tensor(d), "interchange_dim": torch.tensor(d)}
    if "R" not in own:
        state |= {"proj_layer.weight": own["W2"].clone(), "learned_source.weight": own["W1"].clone()}
        state |= {"learned_source.bias": own["b"].clone()}
        return state | ({"proj_layer.bias": own["p"].clone()} if "p" in own else {})
    # R = base @ [1 0]ᵀ, base being R completed to a square matrix; reflections by -1 each, or exp(0), make [1 0]ᵀ.
    q, _ = torch.linalg.qr(own["R"].double().mT, mode="complete")
    base = torch.cat([own["R"].double().mT, q[:, r:]], 1).float()
    state |= {_ORIGINAL: -torch.eye(d, r) if r < d else torch.zeros(d, d), _BASE: base}
    if "W" in own:
        return state | {"learned_source.weight": own["W"].clone(), "learned_source.bias": own["b"].clone()}
    return state | {"learned_source": own["b"].clone()}
