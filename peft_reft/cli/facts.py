"""What is known of a model and of rows before any weight is loaded: for `suggest` and `sweep`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..config import LoReftConfig
from ..tools.optimizer import create_loreft_optimizer
from ..tuner.architectures import find_targets, skeleton
from .arguments import check_path
from .data import training_data, training_split
from .errors import loading
from .lengths import Lengths, count
from .methods import METHODS
from .rows import columns
from .rules import Form, Kind


@dataclass(frozen=True)
class Model:
    """A model, by its config."""

    name: str
    kind: Kind
    layers: int
    width: int
    parameters: int
    config: Any

    def trained(self, fields: dict[str, Any]) -> int:
        """How many parameters an adapter with these fields of `LoReftConfig` trains, without a head."""
        trained: int = self._adapted(fields).get_nb_trainable_parameters()[0]
        return trained

    def rate(self, fields: dict[str, Any], lr: float) -> float:
        """The lowest rate that `create_loreft_optimizer` gives an adapter with these fields, without norms' gains."""
        groups = create_loreft_optimizer(self._adapted(fields), lr=lr, norm_gains=False).param_groups
        return min(float(group["lr"]) for group in groups)

    def _adapted(self, fields: dict[str, Any]) -> PeftModel:
        empty = skeleton(copy.deepcopy(self.config))
        return get_peft_model(empty, LoReftConfig(**fields), low_cpu_mem_usage=True)


def model_facts(name: str, revision: str | None = None) -> Model:
    """Read a model's config.

    Raises:
        ValueError: there is no such model, or its class is not one of transformers, or it has no blocks to edit.
    """
    check_path(name)
    with loading(name, "config.json"):
        config = AutoConfig.from_pretrained(name, revision=revision)
        empty = skeleton(copy.deepcopy(config))
        targets = find_targets(empty, "block")
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    return Model(name, kind_of(config), len(targets), targets[0].d, parameters, config)


def kind_of(config: Any) -> Kind:
    """Whether a model reads texts, goes on from them, or has one part for each.

    Raises:
        ValueError: transformers knows it as neither.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    classes = config.architectures or []
    types = {config.model_type, config.get_text_config().model_type}
    goes_on = any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in classes)
    if goes_on or getattr(config, "is_decoder", False):
        return "decoder"
    if types & {*MODEL_FOR_MASKED_LM_MAPPING_NAMES}:
        return "encoder"
    if types & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}:
        return "decoder"
    raise ValueError(
        f"A model of model_type={config.model_type!r}, architectures={classes}, is neither an encoder nor a decoder "
        "in transformers' tables: there is no rule for it."
    )


def rows_facts(model: Model, data: Any, mixture: Any, args: Any, form: Form | None) -> Lengths:
    """Read rows as `train` does, and count their tokens. Rows of texts and labels are read, too.

    Args:
        model: whose tokenizer counts.
        data: the arguments of `train` for data, with `mixture` and `args` as `train_arguments.parse` returns them.
        mixture: see `data`.
        args: see `data`.
        form: of the rows, if it is known; None: their columns say it.

    Raises:
        ValueError: the rows cannot be read, or have neither of the columns that are understood.
    """
    unread = training_split(data, mixture)
    name = data.dataset_name or "datasets"
    found = columns(unread, name)
    if form is None:
        form = _form(found, model.kind)
    if form == "labels":
        missing = [column for column in (args.dataset_text_field, "label") if column not in found]
        if missing:
            raise ValueError(
                f"{name} has the columns {found}, no {missing[0]!r}. A classifier's rows have a text "
                f"(--dataset_text_field, default {args.dataset_text_field!r}) and a 'label'."
            )
        rows = unread
    else:
        rows = training_data(METHODS["train"], data, mixture, args)[0]
        form = "prompts" if {"prompt", "messages", "conversations"} & {*columns(rows, name)} else "texts"
    with loading(model.name, "tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(model.name)
    return count(rows, tokenizer, form, args.dataset_text_field, args.max_length, args.seed)


def _form(found: list[str], kind: Kind) -> Form:
    """The form of rows with these columns; those that `train` renames are prompts."""
    return "labels" if kind == "encoder" or "label" in found else "prompts"
