"""`peft-reft export`: base model and adapter as one model, if the edit folds into the weights."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from typing import Any

import torch
from torch import nn

from ..convert.ours import new_folder
from .load import load_model

_BIAS_SWITCHES = ("mlp_bias", "attention_bias")
"""Fields by which a model's config says that linear maps have biases: Llama, Qwen3, Gemma, Granite and others."""


def run(args: Namespace) -> None:
    model, tokenizer = load_model(args.path_or_name, args.base)
    with warnings.catch_warnings():
        # That a new bias may be lost: here it is kept, or refused.
        warnings.filterwarnings("ignore", message="[0-9]+ linear maps without a bias")
        merged = model.merge_and_unload(safe_merge=True)
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.get_text_config().tie_word_embeddings = False  # one of the two was trained, or edited
    added = _keep_biases(merged)
    _refuse_lost_tensors(merged)
    new_folder(args.destination)
    merged.save_pretrained(args.destination)
    tokenizer.save_pretrained(args.destination)
    size = sum(os.path.getsize(entry) for entry in os.scandir(args.destination))
    print(f"Wrote {args.destination}, {size / 2**20:.0f} MiB.")
    for switch in added:
        print(f"Its config has {switch}=true, for the biases that the edit needs. Other biases of that kind are 0.")


def _keep_biases(merged: Any) -> list[str]:
    """Let the config say which linear maps have a bias, and give a bias of 0 to the others of their kind.

    Returns:
        The fields of the config that are true now and were not.
    """
    config = merged.config.get_text_config()
    added: list[str] = []
    for switch in _BIAS_SWITCHES:
        lost, _ = _compare(merged)
        if lost and getattr(config, switch, None) is False:
            setattr(config, switch, True)
            if len(_compare(merged)[0]) < len(lost):
                added.append(switch)
            else:
                setattr(config, switch, False)
    if added:
        for name in _compare(merged)[1]:
            linear: Any = merged.get_submodule(name.rpartition(".")[0])
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    return added


def _compare(merged: Any) -> tuple[list[str], list[str]]:
    """Return the tensors that a model made from the config of `merged` lacks, and those that `merged` lacks."""
    with torch.device("meta"):
        made_from_config = type(merged)(merged.config)
    here, there = merged.state_dict().keys(), made_from_config.state_dict().keys()
    return sorted(here - there), sorted(there - here)


def _refuse_lost_tensors(merged: Any) -> None:
    """Raise ValueError if a model made from the saved config has no place for a tensor, such as a bias."""
    lost, _ = _compare(merged)
    if lost:
        raise ValueError(
            f"A saved {type(merged).__name__} would lose {lost[0]}, which the base model does not have and the merged "
            "model needs. Keep the adapter beside the model."
        )
