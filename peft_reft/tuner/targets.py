"""Choose the modules that a config edits, each with its positions and rank. All that can be wrong raises here."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from ..config import LoReftConfig
from ..positions.spec import Positions
from .architectures import (
    Target,
    check_streams,
    check_tokens,
    find_targets,
    modules_of_decoder,
    modules_of_encoder,
    output_size,
)
from .layer import CHILD


@dataclass(frozen=True)
class Chosen:
    """A module that is edited, where it is edited, and with what rank."""

    target: Target
    positions: Positions
    r: int | None
    """None for a formula without a rank."""


@dataclass(frozen=True)
class Choice:
    """All modules that an adapter edits, by name."""

    by_config: dict[str, Chosen]
    only_in_state_dict: dict[str, Chosen]
    """Modules that the config does not name. A state dict, from whose keys PEFT injects the adapter, has them."""

    def __getitem__(self, name: str) -> Chosen:
        return self.by_config[name] if name in self.by_config else self.only_in_state_dict[name]


def choose(model: nn.Module, config: LoReftConfig, in_state_dict: Collection[str]) -> Choice:
    """Decide which modules an adapter edits. Nothing is changed but `target_modules="all-linear"` in `config`.

    Args:
        model: the base model.
        config: of the adapter.
        in_state_dict: names of the modules that a given state dict has weights for; empty if none is given.

    Raises:
        ValueError: the model cannot be edited, or not in this way; the message names the field and what is allowed.
    """
    in_encoder, in_decoder = modules_of_encoder(model), modules_of_decoder(model)
    readers = None if in_encoder is None else in_encoder | (in_decoder or set())
    if isinstance(config.target_modules, str):
        _write_out_all_linear(model, config, readers)
    check_tokens(model)
    targets = targets_of(model, config)
    check_streams(model, targets)
    _check_readers(model, targets, readers)
    by_config: dict[str, Chosen] = {}
    if targets:
        specs = config.positions_by_layer(len(targets))
        ranks = config.ranks(specs, len(targets))
        for target in targets:
            if target.layer in specs:
                by_config[target.name] = Chosen(target, specs[target.layer], ranks[target.layer])
    _check_ranks(by_config)
    found = Choice(by_config, _only_in_state_dict(model, config, targets, {*in_state_dict} - {*by_config}))
    if config.tie == "model":
        all_targets = [each.target for each in (found.by_config | found.only_in_state_dict).values()]
        sizes, heads = {target.d for target in all_targets}, {target.heads for target in all_targets}
        if len(sizes) > 1 or len(heads) > 1:
            numbers = f", and {sorted(map(str, heads))} heads" if len(heads) > 1 else ""
            raise ValueError(f"tie='model' needs one hidden size, but the targets have {sorted(sizes)}{numbers}.")
    return found


def targets_of(model: nn.Module, config: LoReftConfig) -> list[Target]:
    """The modules that `config` could edit, in order, whatever its `layers` and `positions`."""
    if config.target_modules is None:
        return find_targets(model, config.component)
    names = [
        name
        for name, _ in model.named_modules()
        if name and not _is_inside_ours(name) and check_target_module_exists(config, name)
    ]
    return [Target(name, layer, output_size(model, name)) for layer, name in enumerate(names)]


def _is_inside_ours(name: str) -> bool:
    """Whether a module is a part of a `LoReftLayer`."""
    return f".{CHILD}." in f".{name}."


def _write_out_all_linear(model: nn.Module, config: LoReftConfig, readers: set[int] | None) -> None:
    """Replace `target_modules="all-linear"` by PEFT's list of names, without maps that do not read token by token."""
    shorthand = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is shorthand:
        return
    config.target_modules = {
        name
        for name in config.target_modules or ()
        if "pooler" not in name.split(".") and _reads_tokens(model, name, readers)
    }


def _reads_tokens(model: nn.Module, name: str, readers: set[int] | None) -> bool:
    return readers is None or id(model.get_submodule(name)) in readers


def _check_readers(model: nn.Module, targets: list[Target], readers: set[int] | None) -> None:
    """Raise ValueError if a target of an encoder-decoder model is in neither of the two."""
    outside = [target.name for target in targets if not _reads_tokens(model, target.name, readers)]
    if outside:
        raise ValueError(
            f"target_modules names {', '.join(outside)}, in neither the encoder nor the decoder of "
            f"{type(model).__name__}. Only modules of these can be edited: positions count in their inputs."
        )


def _check_ranks(chosen: dict[str, Chosen]) -> None:
    for name, each in chosen.items():
        heads = each.target.heads
        if each.r is not None and heads is not None and each.r > each.target.d // heads:
            raise ValueError(
                f"r={each.r} is larger than a head of {name}: each of its {heads} heads has {each.target.d // heads} "
                f"dimensions, so allowed are 1 to {each.target.d // heads}."
            )
        if each.r is not None and each.r > each.target.d:
            raise ValueError(
                f"r={each.r} is larger than the hidden size {each.target.d} of {name}: "
                f"allowed are 1 to {each.target.d}."
            )


def _only_in_state_dict(
    model: nn.Module, config: LoReftConfig, targets: list[Target], names: set[str]
) -> dict[str, Chosen]:
    """Modules of `model` that a state dict names and the config does not, read as if `layers` were `"all"`."""
    there = {name for name, _ in model.named_modules()}
    if not names & there:
        return {}
    for_all = copy.copy(config)
    for_all.layers = "all"
    known = {target.name: target for target in targets}
    specs = for_all.positions_by_layer(len(targets))
    found: dict[str, Chosen] = {}
    for name in sorted(names & there):
        if config.component == "heads" and name not in known:
            raise ValueError(f"state_dict has {name}, which component='heads' does not edit.")
        target = known.get(name) or Target(name, -1, output_size(model, name))
        spec = specs.get(target.layer)
        if spec is None and isinstance(for_all.positions, str):
            spec = for_all.specs[0]
        if spec is None:
            raise ValueError(f"state_dict has {name}, but positions={config.positions!r} has no spec there.")
        found[name] = Chosen(target, spec, for_all.ranks([target.layer], len(targets))[target.layer])
    return found
