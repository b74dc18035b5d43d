"""Read AxBench's dictionaries of directions, such as those of its rank-1 ReFT: one matrix, a row for each concept."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..files import check_finite
from .control_vector import added_vectors
from .ours import Adapter


def from_axbench(
    path: str, concept: int, layer: int, strength: float, base: str | None = None, task_type: str | None = None
) -> Adapter:
    """Read one concept of a dictionary as an adapter of `intervention="bias"` that adds it to every token.

    This is how AxBench steers: h + factor · max_act · weight[concept], behind one block. How strongly is in no file of
    the weights, so you say it. The biases beside the weights take no part in steering.

    Args:
        path: the file of weights, `l20/weight.pt` of a published dictionary or the `LsReFT_weight.pt` of a training.
        concept: the row, as `concept_id` in their `metadata.jsonl`.
        layer: the block, counted from 0 as they and we do. The file does not say it.
        strength: what the row is multiplied by: their factor times the concept's largest activation (`max_act`).
        base: name of the base model, whose config says how blocks are called; None: as in Llama and similar models.
        task_type: as in any PEFT config.

    Raises:
        ValueError: the file is missing, damaged or holds no matrix, or a number is out of range.
    """
    weight = _matrix(path)
    if not 0 <= concept < len(weight):
        raise ValueError(f"concept={concept!r}: {path} has the concepts 0 to {len(weight) - 1}.")
    if layer < 0:
        raise ValueError(f"layer={layer!r}: expected the number of a block, from 0.")
    if not math.isfinite(strength):
        raise ValueError(f"strength={strength!r}: expected a finite number.")
    return added_vectors({layer: weight[concept].float() * strength}, base, task_type)


def _matrix(path: str) -> Tensor:
    """Read the matrix, (concepts, d). Nothing but tensors is unpickled."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file. Expected the weights of an AxBench dictionary.")
    try:
        weight = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise errors of their own
        raise ValueError(f"{path} cannot be read as a tensor: {error}") from error
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        held = f"a tensor of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{path} holds {held}, expected one matrix with a row for each concept.")
    check_finite({"weight": weight}, path)
    return weight
