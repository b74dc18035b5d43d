"""Write folders for EasySteer, a fork of vLLM: its `loreft` algorithm reads one folder for each vector of a layer."""

from __future__ import annotations

import json
import os

import torch

from .ours import Adapter, new_folder
from .pyreft_write import their_modules, their_state


def to_easysteer(adapter: Adapter, destination: str, base: str | None = None) -> None:
    """Write `destination/layer_N` for each layer, the path to give to a `SteerVectorRequest` or `VectorConfig`.

    A folder holds config.json, which names the layer, and one file with `rotate_layer` (d, r), `weight` (r, d) and
    `bias` (r,). With `tie="group"` there is a folder for each group: `layer_N_f7` and `layer_N_l7`. In EasySteer each
    request says which tokens are edited (`prefill_trigger_positions`: 0, 1 ... and -1, -2 ...).

    Args:
        adapter: what `Adapter.load` returns.
        destination: a folder that is new or empty.
        base: the base model; None: the one that the config names. Needed only with `tie="model"`: it says which layers
            share the weights.

    Raises:
        ValueError: EasySteer cannot compute the adapter. It has `loreft` behind blocks only.
    """
    config = adapter.config
    for name, needed in {"intervention": "loreft", "component": "block", "act_fn": None, "gate": False}.items():
        value = getattr(config, name)
        if value != needed:
            raise ValueError(f"{name}={value!r}: EasySteer's `loreft` has only {needed!r}.")
    if config.tie == "position" or (config.tie == "group" and isinstance(config.positions, dict)):
        raise ValueError(
            f"tie={config.tie!r} with positions={config.positions!r}: EasySteer has one vector a request."
        )
    endings = [f"_{group}" for group in config.specs[0].groups] if config.tie == "group" else [""]
    modules = their_modules(adapter, base)
    new_folder(destination)
    for module in modules:
        key = f"layer_{module.layer}_comp_block_output_unit_pos_nunit_1#0"
        for number, ending in enumerate(endings):
            folder = os.path.join(destination, f"layer_{module.layer}{ending}")
            os.makedirs(folder)
            own = module.intervention(number)
            torch.save(their_state("loreft", own), os.path.join(folder, f"intkey_{key}.bin"))
            representation = {"layer": module.layer, "component": "block_output", "low_rank_dimension": len(own["R"])}
            with open(os.path.join(folder, "config.json"), "w") as file:
                json.dump({"representations": [representation], "sorted_keys": [key]}, file, indent=2)
