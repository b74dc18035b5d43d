"""Write folders of `pyreft`: a pickle for each intervention, and a config.json without positions."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import LoReftConfig
from ..positions.layers import resolve_layers
from .ours import Adapter, new_folder, targets_of
from .pyreft_read import BASE, COMPONENTS, FORMULAS, ORIGINAL


@dataclass(frozen=True)
class TheirModule:
    """An edited module as they name it, with its interventions."""

    layer: int
    component: str
    key: str
    """The beginning of the interventions' keys."""
    parameters: dict[str, Tensor]
    """By name, with a leading dimension: one for each intervention."""

    @property
    def count(self) -> int:
        """The number of interventions."""
        return len(self.parameters["b"])

    def intervention(self, number: int) -> dict[str, Tensor]:
        """Return the parameters of one intervention."""
        return {name: tensor[number] for name, tensor in self.parameters.items()}


def to_pyreft(adapter: Adapter, destination: str, base: str | None = None) -> None:
    """Write a folder for `pyreft`'s `ReftModel.load`.

    The folder has neither positions nor activation nor dropout: give them to `pyreft` yourself. With `tie="group"` or
    `"position"`, interventions are written as `pyreft` orders them: those of the first group in all layers, then those
    of the second.

    Args:
        adapter: what `Adapter.load` returns.
        destination: a folder that is new or empty.
        base: the base model; None: the one that the config names. Needed only with `tie="model"`: it says which layers
            share the weights.

    Raises:
        ValueError: `pyreft` has no such intervention.
    """
    config = adapter.config
    names = {ours: theirs for theirs, ours in FORMULAS.items()}
    if config.intervention not in names:
        raise ValueError(f"intervention={config.intervention!r}: pyreft has only {', '.join(map(repr, names))}.")
    if config.gate:
        raise ValueError("gate=True: pyreft's interventions have no gate.")
    if config.component not in COMPONENTS.values():
        raise ValueError(
            f"component={config.component!r}: pyreft has only {', '.join(map(repr, COMPONENTS.values()))}."
        )
    modules = their_modules(adapter, base)
    new_folder(destination)
    representations: list[list[Any]] = []
    keys: list[str] = []
    dimensions: list[int] = []
    for number in range(max(module.count for module in modules)):
        for module in modules:
            if number >= module.count:
                continue
            own = module.intervention(number)
            r, d = own["R" if "R" in own else "W2"].shape
            key = f"{module.key}_unit_pos_nunit_1#{number}"
            keys.append(key)
            representations.append([module.layer, module.component, "pos", 1, r, *[None] * 9])
            dimensions.append(d)
            torch.save(their_state(config.intervention, own), os.path.join(destination, f"intkey_{key}.bin"))
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


def their_modules(adapter: Adapter, base: str | None) -> list[TheirModule]:
    """Return all edited modules as they name them."""
    has_several = adapter.config.tie in ("group", "position")
    found = []
    for module, parameters in _for_each_layer(adapter, base):
        if not has_several:
            parameters = {name: tensor.unsqueeze(0) for name, tensor in parameters.items()}
        found.append(_their_module(adapter.config, module, parameters))
    return found


def _for_each_layer(adapter: Adapter, base: str | None) -> list[tuple[str, dict[str, Tensor]]]:
    """Return the parameters of each module by its name; with `tie="model"` the same ones for each layer."""
    config = adapter.config
    if config.tie != "model":
        return list(adapter.weights.items())
    first, shared = next(iter(adapter.weights.items()))
    if config.target_modules is not None:
        raise ValueError("tie='model' with target_modules: which modules share the weights is not known.")
    targets = targets_of(base or config.base_model_name_or_path, config.component)
    if targets is None:
        raise ValueError("tie='model': give the base model, which says how many layers share the weights.")
    names = [targets[layer].name for layer in resolve_layers(config.layers, len(targets), "layers")]
    if first not in names:
        raise ValueError(f"The adapter edits {first}, the base model's layers are {', '.join(names)}.")
    return [(name, shared) for name in names]


def _their_module(config: LoReftConfig, module: str, parameters: dict[str, Tensor]) -> TheirModule:
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", module)  # model.layers.15.mlp -> ["15"]
    layer = int(numbers[0]) if numbers else 0
    if config.target_modules is None and numbers:
        component = {ours: theirs for theirs, ours in COMPONENTS.items()}[config.component]
        return TheirModule(layer, component, f"layer_{layer}_comp_{component}", parameters)
    component = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", module) + ".output"  # model.layers[15].mlp.output
    return TheirModule(layer, component, f"comp_{component.replace('.', '_')}", parameters)


def their_state(formula: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of their class for the parameters of one of our interventions."""
    if formula == "loreft":
        return {"weight": own["W"].clone(), "bias": own["b"].clone(), "rotate_layer": own["R"].mT.contiguous()}
    r, d = own["R" if "R" in own else "W2"].shape
    state = {"embed_dim": torch.tensor(d), "interchange_dim": torch.tensor(d)}
    if "R" not in own:
        state["proj_layer.weight"] = own["W2"].clone()
        state["learned_source.weight"] = own["W1"].clone()
        state["learned_source.bias"] = own["b"].clone()
        if "p" in own:
            state["proj_layer.bias"] = own["p"].clone()
        return state
    # Rᵀ = base @ [1 0]ᵀ, with Rᵀ completed to a square matrix as the base. In their form [1 0]ᵀ is a product of
    # reflections with -1 on the diagonal, or exp(0) if R itself is square.
    rotation = own["R"].double().mT  # (d, r)
    q, _ = torch.linalg.qr(rotation, mode="complete")  # (d, d)
    state[ORIGINAL] = -torch.eye(d, r) if r < d else torch.zeros(d, d)
    state[BASE] = torch.cat([rotation, q[:, r:]], 1).float()
    if "W" in own:
        state["learned_source.weight"] = own["W"].clone()
        state["learned_source.bias"] = own["b"].clone()
    else:
        state["learned_source"] = own["b"].clone()
    return state
