"""What EasySteer, a fork of vLLM, reads for its `loreft` algorithm: one folder for each vector of one layer."""

from __future__ import annotations

import json
import os

import torch

from .ours import Adapter, new_folder
from .pyreft import their_modules, their_state


def to_easysteer(adapter: Adapter, destination: str, base: str | None = None) -> None:
    """Write `destination/layer_N` for each layer, to be named as a `SteerVectorRequest`'s or `VectorConfig`'s path.

    A folder holds config.json, which names the layer, and one file with `rotate_layer` (d, r), `weight` (r, d) and
    `bias` (r,). Interventions of their own by group go to `layer_N_f7` and `layer_N_l7`. Which tokens are edited is
    said there by each request (`prefill_trigger_positions`: 0, 1 ... and -1, -2 ...).

    Raises:
        ValueError: EasySteer has no such algorithm; it has `loreft` after blocks alone.
    """
    config = adapter.config
    for name, needed in {"intervention": "loreft", "component": "block", "act_fn": None, "gate": False}.items():
        if getattr(config, name) != needed:
            raise ValueError(f"{name}={getattr(config, name)!r}: EasySteer's `loreft` has only {needed!r}.")
    if config.tie == "position" or (config.tie == "group" and isinstance(config.positions, dict)):
        raise ValueError(
            f"tie={config.tie!r} with positions={config.positions!r}: EasySteer has one vector a request."
        )
    groups = [f"_{group}" for group in config.specs[0].groups] if config.tie == "group" else [""]
    modules = their_modules(adapter, base)
    new_folder(destination)
    for (layer, _), _, parameters in modules:
        for n, group in enumerate(groups):
            folder = os.path.join(destination, f"layer_{layer}{group}")
            os.makedirs(folder)
            own = {name: tensor[n] for name, tensor in parameters.items()}
            key = f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0"
            torch.save(their_state("loreft", own), os.path.join(folder, f"intkey_{key}.bin"))
            representation = {"layer": layer, "component": "block_output", "low_rank_dimension": len(own["R"])}
            with open(os.path.join(folder, "config.json"), "w") as file:
                json.dump({"representations": [representation], "sorted_keys": [key]}, file, indent=2)
