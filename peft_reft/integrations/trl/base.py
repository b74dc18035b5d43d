"""Whether the base model of the trainer is the one on disk, which the engine loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""Types of a tensor in a file whose values are the model's, but for rounding."""


def check_base(base: nn.Module, name_or_path: str) -> None:
    """Raise ValueError if the trainer's base model is not the one that the engine loads from `name_or_path`.

    Of each tensor the first row is compared. That finds what people do to a base model: merge an adapter into it, or
    train it. Tensors that are quantised, or in parts on several processes, are not compared, nor is a model whose
    files have other names for its tensors.

    Args:
        base: the model, without the adapter.
        name_or_path: its folder, or its name on the Hub.
    """
    own = dict(base.named_parameters())
    for path in _files(name_or_path):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # the file is no mapping
                parameter = own.get(name)
                if parameter is None or not _is_whole(parameter):
                    continue
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) == tuple(parameter.shape) and parameter.ndim:
                    row = stored[:1] if parameter.ndim > 1 else stored[:]
                    if row.dtype in _PLAIN and not _are_same(row, parameter.detach()[: len(row)].cpu(), base):
                        raise ValueError(
                            f"use_vllm=True: the engine loads the base model from {name_or_path}, where {name} has "
                            "other values than in the trainer. Save the base model as it is now (`save_pretrained`), "
                            "and load it from there before the adapter is added."
                        )


def _are_same(stored: Tensor, own: Tensor, base: nn.Module) -> bool:
    """Whether values are the same but for the type that they were loaded in, and cast to later."""
    dtype = getattr(base, "dtype", own.dtype)
    return torch.equal(stored.to(own.dtype), own) or torch.equal(stored.to(dtype).to(own.dtype), own)


def _is_whole(parameter: Tensor) -> bool:
    return parameter.dtype in _PLAIN and parameter.numel() > 0 and not hasattr(parameter, "full_tensor")


def _files(name_or_path: str) -> Iterator[str]:
    """The files with the tensors of a model that is on this machine."""
    whole = _file(name_or_path, SAFE_WEIGHTS_NAME)
    if whole is not None:
        yield whole
        return
    index = _file(name_or_path, SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            names = sorted({*json.load(file)["weight_map"].values()})
        yield from (path for path in (_file(name_or_path, name) for name in names) if path is not None)


def _file(name_or_path: str, name: str) -> str | None:
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, name)
        return path if os.path.isfile(path) else None
    found = None
    with suppress(ValueError):  # no name that the Hub could have, such as that of a model made in code
        found = try_to_load_from_cache(name_or_path, name)
    return found if isinstance(found, str) else None
