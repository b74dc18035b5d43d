"""`peft-reft export`: base model and adapter as one model, if the edit folds into the weights."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import torch

from ..convert.ours import new_folder
from .load import load_model


def run(args: Namespace) -> None:
    model, tokenizer = load_model(args.path_or_name, args.base)
    merged = model.merge_and_unload(safe_merge=True)
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.get_text_config().tie_word_embeddings = False  # one of the two was trained, or edited
    _refuse_lost_tensors(merged)
    new_folder(args.destination)
    merged.save_pretrained(args.destination)
    tokenizer.save_pretrained(args.destination)
    size = sum(os.path.getsize(entry) for entry in os.scandir(args.destination))
    print(f"Wrote {args.destination}, {size / 2**20:.0f} MiB.")


def _refuse_lost_tensors(merged: Any) -> None:
    """Raise ValueError if a model made from the saved config has no place for a tensor, such as a bias."""
    with torch.device("meta"):
        made_from_config = type(merged)(merged.config)
    lost = sorted(set(merged.state_dict()) - set(made_from_config.state_dict()))
    if lost:
        raise ValueError(
            f"A saved {type(merged).__name__} would lose {lost[0]}, which the base model does not have and the merged "
            "model needs. Keep the adapter beside the model."
        )
