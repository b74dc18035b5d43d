"""`peft-reft inspect`: what an adapter is."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..card import describe, how_to_ask
from .errors import loading
from .load import load_adapter


def run(args: Namespace) -> None:
    adapter = load_adapter(args.path_or_name)
    config = adapter.config
    with loading(args.path_or_name, SAFETENSORS_WEIGHTS_NAME):
        rows = [_row(module, adapter.weights[module]) for module in sorted(adapter.weights, key=_by_number)]
    parameters = sum(row["parameters"] for row in rows)
    parameters_of_others = sum(tensor.numel() for tensor in adapter.others.values())
    if args.json:
        fields = {name: value for name, value in config.to_dict().items() if value is not None}
        found = {
            "config": fields,
            "parameters": parameters,
            "modules_to_save": parameters_of_others,
            "layers": rows,
        }
        print(json.dumps(found, indent=2))
        return
    print(f"{describe(config)}{how_to_ask(config)}")
    print(f"Base model: {config.base_model_name_or_path or 'not said'}")
    others = f", and {parameters_of_others:,} of {config.modules_to_save}" if parameters_of_others else ""
    print(f"Parameters: {parameters:,}{others}\n")
    _print_table(rows)


def _by_number(module: str) -> list[tuple[int, str]]:
    """The key that sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def _row(module: str, parameters: dict[str, Tensor]) -> dict[str, Any]:
    """A row of the table: one edited module, its number of parameters, and their norms."""
    row: dict[str, Any] = {"module": module, "parameters": sum(tensor.numel() for tensor in parameters.values())}
    if "R" in parameters:
        rotation = parameters["R"].float()  # (r, d); (K, r, d) if each position has its own
        error = rotation @ rotation.mT - torch.eye(rotation.shape[-2])
        row["orthogonality error"] = float(error.abs().max())
    if "R" in parameters and "W" in parameters:
        row["|W - R|"] = float((parameters["W"].float() - parameters["R"].float()).norm())
    for name, tensor in parameters.items():
        if name != "R":
            row[f"|{name}|"] = float(tensor.float().norm())
    return row


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows with a header; the first column is aligned to the left, the others to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        lines.append([_cell(row.get(name, "")) for name in names])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join(cells))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
