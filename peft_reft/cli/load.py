"""Reading an adapter: its config, its tensors, or the whole model with its tokenizer."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config import LoReftConfig
from ..convert import Adapter
from .arguments import check_path
from .errors import loading

_TOKENIZER_FILE = "tokenizer_config.json"


def load_config(path_or_name: str) -> LoReftConfig:
    """The config of an adapter."""
    with loading(path_or_name, CONFIG_NAME):
        return LoReftConfig.from_pretrained(path_or_name)


def load_adapter(path_or_name: str) -> Adapter:
    """The config and the tensors of an adapter, without a base model.

    Raises:
        ValueError: a file cannot be loaded, or no tensor belongs to LoReFT. The message names the file.
    """
    if os.path.isdir(path_or_name):
        load_config(path_or_name)  # so that an error of the config names the config's file
    with loading(path_or_name, SAFETENSORS_WEIGHTS_NAME):
        adapter = Adapter.load(path_or_name)
    if not adapter.weights:
        raise ValueError(f"{os.path.join(path_or_name, SAFETENSORS_WEIGHTS_NAME)} has no tensors of LoReFT.")
    return adapter


def load_model(path_or_name: str, base: str | None, device: str | None = None) -> tuple[PeftModel, Any]:
    """An adapter in its base model, and the tokenizer.

    Args:
        path_or_name: folder or Hub name of an adapter.
        base: folder or Hub name of the base model; None: the one that the adapter's config names.
        device: None: a GPU if there is one, else the CPU.

    Returns:
        The model in evaluation mode; a tokenizer that pads on the left.

    Raises:
        ValueError: something is missing or cannot be loaded, or the adapter is not for a causal language model.
    """
    check_path(path_or_name)
    config = load_config(path_or_name)
    task_type = getattr(config.task_type, "value", config.task_type)
    if task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{path_or_name} has task_type={task_type!r}. This command takes causal language models only."
        )
    if os.path.isdir(path_or_name) and not _has_weights(path_or_name):
        raise ValueError(f"{path_or_name} has no weights: no file {SAFETENSORS_WEIGHTS_NAME}.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = config.base_model_name_or_path
    if not (base or named):
        raise ValueError(f"{path_or_name} names no base model: give --base.")
    try:
        base_model = _load_base(base or named, device)
    except ValueError as error:
        if base:
            raise
        # Often a folder on its author's machine.
        raise ValueError(
            f"{error} ({path_or_name} names {named} as its base model. If yours is elsewhere, give --base.)"
        ) from error
    tokenizer = _load_tokenizer(path_or_name, base or named)
    with loading(path_or_name):
        return PeftModel.from_pretrained(base_model, path_or_name).eval(), tokenizer


def _load_base(base: str, device: str) -> Any:
    check_path(base)
    with loading(base, "config.json"):
        return AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device)


def _has_weights(folder: str) -> bool:
    return any(name.startswith("adapter_model.") for name in os.listdir(folder))


def _load_tokenizer(path_or_name: str, base: str) -> Any:
    """The tokenizer that was saved with the adapter; if there is none, that of the base model."""
    is_folder = os.path.isdir(path_or_name)
    tokenizer = None
    if not is_folder or os.path.isfile(os.path.join(path_or_name, _TOKENIZER_FILE)):
        try:
            with loading(path_or_name, _TOKENIZER_FILE):
                tokenizer = AutoTokenizer.from_pretrained(path_or_name)
        except ValueError:
            if is_folder:  # the file is there, and is damaged
                raise
    if tokenizer is None:
        with loading(base, _TOKENIZER_FILE):
            tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
