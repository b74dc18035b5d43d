"""Make LoReFT's cases from LoRA's: each row of a parametrised test that tries LoRA gets one of LoReFT beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig

from peft_reft import LoReftConfig

# What a row that names no modules is tried with, and its name in a test's id.
VARIANTS: dict[str, dict[str, Any]] = {
    "LoReFT": {},
    "LoReFT on mlp": {"positions": "all", "component": "mlp"},  # the kind that can be merged
    "LoReFT untied": {"positions": "f1+l1", "tie": "position", "intervention": "nodireft"},
}
# Rows that name modules are those of PEFT's own small models, whose inputs have no prompt and no answer.
# The smallest has a layer with one output.
ON_MODULES = {"positions": "all", "r": 1}
SAME = {"task_type", "modules_to_save", "trainable_token_indices", "exclude_modules"}
DROPPED = {"r", "lora_alpha", "lora_dropout", "bias"}  # LoRA's own, without a counterpart that matters to a test


def _translate(lora: dict[str, Any]) -> dict[str, Any] | None:
    """Translate arguments of `LoraConfig` into those of `LoReftConfig`; None for a variant without a counterpart."""
    ours: dict[str, Any] = {"r": 2}
    for name, value in lora.items():
        if name == "target_modules" and any("conv2d" in module for module in value or []):
            return None  # its output is (batch, channels, height, width), without tokens
        if name in SAME or (name == "target_modules" and value is not None):
            ours[name] = value
        elif name == "init_lora_weights" and isinstance(value, bool):
            ours["init_weights"] = value
        elif name not in DROPPED and value is not None:
            return None
    return ours | (ON_MODULES if "target_modules" in ours else {})


def _from_config(config: LoraConfig) -> LoReftConfig | None:
    defaults = LoraConfig()
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.init and getattr(config, field.name) != getattr(defaults, field.name)
    }
    given.pop("peft_type", None)
    ours = _translate(given)
    return None if ours is None else LoReftConfig(**ours)


def is_lora(value: Any) -> bool:
    return value is LoraConfig or type(value) is LoraConfig


def _convert(value: Any) -> Any:
    """Translate one value of a row; None if it has no counterpart."""
    if value is LoraConfig:
        return LoReftConfig
    if type(value) is LoraConfig:
        return _from_config(value)
    if isinstance(value, dict):
        return _translate(value)
    if isinstance(value, str):
        return value.replace("LoRA", "LoReFT")
    return value


def _label(row: tuple[Any, ...], method: str) -> str:
    """Return the part of a test's id that says what is tried."""
    if isinstance(row[0], str):
        return row[0]
    tokens = any(isinstance(value, dict) and "trainable_token_indices" in value for value in row)
    return f"{method} with tokens" if tokens else method


def beside(row: tuple[Any, ...]) -> list[tuple[str, tuple[Any, ...]]]:
    """What to try for a row of PEFT's: itself and LoReFT's, each with its label; nothing for all rows but LoRA's.

    A variant of LoRA that has no counterpart is left out, as the methods of others are.
    """
    if not any(is_lora(value) for value in row) or any(str(value).startswith("Conv") for value in row):
        return []
    ours = [_convert(value) for value in row]
    if any(new is None and old is not None for new, old in zip(ours, row)):
        return []
    rows = {"LoReFT": ours}
    on_modules = any(isinstance(value, dict) and "target_modules" in value for value in ours)
    if any(isinstance(value, dict) and "task_type" in value for value in ours) and not on_modules:
        rows = {
            name: [value | extra if isinstance(value, dict) else value for value in ours]
            for name, extra in VARIANTS.items()
        }
    return [(_label(row, "LoRA"), row), *((_label(tuple(new), name), tuple(new)) for name, new in rows.items())]
