"""LoRA and LoReFT in one training, in subspaces that a penalty keeps apart (after arXiv 2603.00425, joint adaptation).

LoRA changes the maps that write into the residual stream; LoReFT edits the stream itself. If both write in the same
directions, one of them is wasted. `overlap` measures that. The paper asks for orthogonality; this form of it is ours.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Trainer

from peft_reft import LoReftConfig
from peft_reft.tuner.layer import LoReftLayer

LORA = "lora_beside"
"""Name of the LoRA adapter. LoReFT's is "default"."""

WRITERS = ("o_proj", "down_proj")
"""Linear maps of a block whose output is added to the residual stream."""


def joint_model(base: nn.Module, task_type: str, loreft: dict[str, Any], lora: dict[str, Any]) -> PeftModel:
    """`base` with both adapters, both to be trained."""
    inner = get_peft_model(base, LoraConfig(task_type=task_type, **lora), adapter_name=LORA)
    with _second_adapter():
        model = get_peft_model(inner.base_model.model, LoReftConfig(task_type=task_type, **loreft))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([LORA])  # the second `get_peft_model` froze it
    return model


@contextmanager
def _second_adapter() -> Iterator[None]:
    """Without PEFT's warnings that a model has an adapter already, which is meant here."""
    with warnings.catch_warnings():
        for beginning in ("You are trying to modify a model with PEFT", "Already found a `peft_config`"):
            warnings.filterwarnings("ignore", message=beginning)
        yield


def load_joint(base: nn.Module, folder: Path) -> PeftModel:
    """What `save_pretrained` of a joint model wrote to `folder`, on a new base."""
    inner = PeftModel.from_pretrained(base, str(folder / LORA), adapter_name=LORA)
    with _second_adapter():
        return PeftModel.from_pretrained(inner.base_model.model, str(folder))


def is_joint(model: nn.Module) -> bool:
    """Whether `joint_model` made this model."""
    return LORA in getattr(model, "peft_config", {})


def overlap(model: nn.Module) -> Tensor:
    """Mean squared cosine between what LoReFT adds to a block's output and what LoRA adds within that block.

    0 if all directions are orthogonal, 1 if all are the same. The directions are the rows of the formula's basis, and
    the columns of LoRA's B in the maps that write into the residual stream. It is 0 if LoRA has none of those maps.
    """
    found = []
    for block in model.modules():
        layer = getattr(block, "loreft", None)
        if not isinstance(layer, LoReftLayer):
            continue
        basis = layer.weights("default").current_factors().basis  # (r, d)
        for name, inside in block.named_modules():
            if isinstance(inside, LoraLayer) and name.rpartition(".")[2] in WRITERS:
                columns = inside.lora_B[LORA].weight.float()  # (d, rank)
                squares = (basis @ columns).square()  # (r, rank)
                sizes = basis.square().sum(1, keepdim=True) * columns.square().sum(0)  # (r, rank)
                found.append((squares / (sizes + 1e-8)).mean())  # both start at 0
    return torch.stack(found).mean() if found else torch.zeros(())


class JointTrainer(Trainer):
    """Adds the overlap to the loss."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **named: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **named)
        if model.training:
            loss = loss + overlap(model)
        return (loss, outputs) if return_outputs else loss
