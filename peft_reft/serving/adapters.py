"""Read an adapter for serving: PEFT loads it into a model without weights, and its plans and factors are taken out."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config import LoReftConfig
from ..edits.factors import Factors
from ..files import check_finite
from ..tuner.layer import LoReftLayer
from ..tuner.state_dicts import is_ours, without_adapter_name
from .chosen import Facts
from .schedule import ServedPlan
from .sources import AdapterFiles, Source, fingerprint

_NAME = "served"
_MOST_MADE = 8
"""How many models a reader keeps."""
_ABOUT_THE_BASE = ("base_model_name_or_path", "revision")
"""Fields of a config that change nothing in an adapter."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter, module by module.

    Args:
        plans: from the name of an edited module to which tokens are edited there and how they share weights.
        factors: from the name of an edited module to the tensors of the formula, float32, with a leading dimension if
            there are several sets of weights.
        facts: what else must be known of it, its fingerprint among them.
        edits_inputs: whether it edits the inputs of the modules, not their outputs.
    """

    plans: dict[str, ServedPlan]
    factors: dict[str, Factors]
    facts: Facts
    edits_inputs: bool = False

    @property
    def rank(self) -> int:
        """The largest rank of the edits; 0 if the formula has none."""
        return max((factors.rank or 0 for factors in self.factors.values()), default=0)

    @property
    def sets(self) -> int:
        """The largest number of sets of weights in a module."""
        return max(plan.sets for plan in self.plans.values())

    @property
    def edits_answers(self) -> bool:
        """Whether any generated token is edited."""
        return any(plan.edits_answers for plan in self.plans.values())


class Reader:
    """Reads adapters for one model. Adapters of one config are read into one model, which PEFT has made for the first.

    Args:
        empty: the transformers model that the adapters are for, without weights (`skeleton`).
    """

    def __init__(self, empty: nn.Module) -> None:
        self.empty = empty
        self.made: dict[str, _Made] = {}
        """By the config, as JSON."""

    def read(self, source: Source) -> ServedAdapter:
        """Read what `save_pretrained` wrote.

        Args:
            source: a folder, or a name on the Hub; or the files themselves.

        Raises:
            ValueError: this is no LoReFT adapter, or it is damaged, does not fit the model or cannot be served. The
                message says which.
        """
        files = AdapterFiles.read(source) if isinstance(source, str) else source
        config = files.parsed_config()
        facts = Facts.of(config, files.fingerprint)
        for field in ("modules_to_save", "trainable_token_indices"):
            value = getattr(config, field)
            if value:
                raise ValueError(
                    f"{files.named} has {field}={value!r}: the adapters of a server share all weights but their "
                    "edits (allowed: None)."
                )
        if config.intervention == "interchange":
            raise ValueError(f"{files.named} has intervention='interchange': it needs hidden states of another run.")
        recipe = json.dumps({**config.to_dict(), **dict.fromkeys(_ABOUT_THE_BASE)}, sort_keys=True)
        made = self.made.get(recipe)
        tensors = files.parsed_weights()
        if made is None or not made.fill(tensors, files.weights_file):
            made = _Made(self._load(config, files))
            if len(self.made) == _MOST_MADE:
                del self.made[next(iter(self.made))]
            self.made[recipe] = made
        plans = {
            name: ServedPlan(layer.plans[_NAME].groups, layer.plans[_NAME].sharing) for name, layer in made.layers
        }
        factors = made.factors()
        if isinstance(source, str) and fingerprint(source) != facts.fingerprint:
            raise ValueError(f"{source} changed while it was read. Load it again when it is complete.")
        return ServedAdapter(plans, factors, facts, edits_inputs=config.component == "heads")

    def _load(self, config: LoReftConfig, files: AdapterFiles) -> PeftModel:
        """Have PEFT load an adapter into a copy of the empty model. PEFT reads weights from folders only."""
        with TemporaryDirectory(prefix="loreft-") as folder:
            with open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), "wb") as file:
                file.write(files.weights)
            try:
                return PeftModel.from_pretrained(copy.deepcopy(self.empty), folder, adapter_name=_NAME, config=config)
            except (RuntimeError, SafetensorError) as error:  # shapes that do not fit
                raise ValueError(f"{files.named} does not fit {type(self.empty).__name__}: {error}") from error


class _Made:
    """A model that PEFT has made for an adapter, with its weights; other adapters of the same config fit into it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [*_layers(model.get_base_model())]
        for _, layer in self.layers:
            layer.weights(_NAME).eval().requires_grad_(False)
        self.parameters: dict[str, nn.Parameter] = {}
        """By the name that they have in a file. Those that layers share are there once."""
        for key, parameter in model.named_parameters():
            if is_ours(key):
                self.parameters[without_adapter_name(key, _NAME)] = parameter

    def fill(self, tensors: dict[str, Tensor], where: str) -> bool:
        """Take over the weights of another adapter.

        Args:
            tensors: by the name that they have in a file.
            where: what messages call the file.

        Returns:
            Whether the tensors have the names and shapes that they should have. If not, nothing has changed; who makes
            a new model for them learns what is wrong.

        Raises:
            ValueError: a value is not finite.
        """
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        if shapes != {key: parameter.shape for key, parameter in self.parameters.items()}:
            return False
        check_finite(tensors, where)
        for key, tensor in tensors.items():
            self.parameters[key].copy_(tensor)
        return True

    @torch.inference_mode()
    def factors(self) -> dict[str, Factors]:
        """From the name of each edited module to its tensors, which stay when the weights change."""
        return {name: layer.weights(_NAME).current_factors().map(torch.clone) for name, layer in self.layers}


def read_adapter(source: Source, empty: nn.Module) -> ServedAdapter:
    """Do what `Reader.read` does, for one adapter."""
    return Reader(empty).read(source)


def _layers(model: nn.Module) -> Iterator[tuple[str, LoReftLayer]]:
    """The edited modules of a model: their names, and the layers of LoReFT in them."""
    for name, module in model.named_modules():
        if isinstance(module, LoReftLayer):
            edited_module = name.rpartition(".")[0]
            yield edited_module, module
