"""Read an adapter as a served model needs it: by the library's own loader, into a model without weights."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn

from ..config import LoReftConfig
from ..convert.ours import local_folder
from ..edits.factors import Factors
from ..tuner.layer import LoReftLayer
from .schedule import ServedPlan
from .turns import Reading

_NAME = "served"


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter, module by module.

    Args:
        plans: name of an edited module -> which tokens it edits there, and how they share weights.
        factors: name of an edited module -> what it computes with, float32, with a leading dimension for several sets.
        fingerprint: of its files; equal for equal ones.
        reading: where it finds the ends of prompts.
    """

    plans: dict[str, ServedPlan]
    factors: dict[str, Factors]
    fingerprint: str
    reading: Reading

    @property
    def rank(self) -> int:
        return max((factors.rank or 0 for factors in self.factors.values()), default=0)

    @property
    def sets(self) -> int:
        return max(plan.sets for plan in self.plans.values())


def read_adapter(source: str, empty: nn.Module) -> ServedAdapter:
    """Read what `save_pretrained` wrote.

    Args:
        source: a folder, or a name on the Hub.
        empty: transformers' model that it is for, without weights (`skeleton`).

    Raises:
        ValueError: it is no LoReFT adapter, is damaged, does not fit the model, or cannot be served; says which.
    """
    folder = fetch(source)
    config = _config(folder, source)
    for field in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(config, field):
            raise ValueError(
                f"{source} has {field}={value!r}: a server shares all weights of the model but the edits."
            )
    if config.intervention == "interchange":
        raise ValueError(f"{source} has intervention='interchange', which edits with hidden states of another run.")
    try:
        model: Any = PeftModel.from_pretrained(copy.deepcopy(empty), folder, adapter_name=_NAME, config=config)
    except (RuntimeError, SafetensorError) as error:  # shapes that do not fit, a file cut short
        raise ValueError(f"{source} does not fit {type(empty).__name__}: {error}") from error
    plans, factors = {}, {}
    with torch.inference_mode():
        for name, layer in _layers(model.get_base_model()):
            plan = layer.plans[_NAME]
            plans[name] = ServedPlan(plan.groups, plan.sharing)
            factors[name] = layer.weights(_NAME).eval().requires_grad_(False).current_factors()
    return ServedAdapter(plans, factors, fingerprint(folder), Reading.of(config))


def _config(folder: str, source: str) -> LoReftConfig:
    config = LoReftConfig.from_pretrained(folder)
    if not isinstance(config, LoReftConfig):
        raise ValueError(f"{source} holds an adapter of type {config.peft_type}, not of LoReFT.")
    return config


def facts(source: str) -> dict[str, Any]:
    """What the front end must know of an adapter, as plain data: its `fingerprint`, and `reading`, the fields of one.

    Raises:
        ValueError: `source` is no LoReFT adapter.
    """
    folder = fetch(source)
    return {"fingerprint": fingerprint(folder), "reading": asdict(Reading.of(_config(folder, source)))}


def fetch(source: str) -> str:
    """The folder of an adapter; ValueError, naming what is missing, if it is none."""
    folder = local_folder(source, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{source} has no {name}: it is no adapter that `save_pretrained` wrote.")
    return folder


def fingerprint(folder: str) -> str:
    """Of an adapter's files: the same for the same adapter wherever it lies, and in every process."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:32]


def _layers(model: nn.Module) -> Iterator[tuple[str, LoReftLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoReftLayer):
            yield name.rpartition(".")[0], module
