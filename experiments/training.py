"""Training that the experiments share: an adapter on a model, transformers' Trainer, checkpoints to go on from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from joint import JointTrainer, is_joint, joint_model, load_joint
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_reft import DataCollatorForLoReft, LoReftConfig, create_loreft_optimizer

HEADS = ("classifier", "score")
CHECKPOINTS = dict(save_strategy="steps", save_steps=0.25, save_total_limit=1)
"""Arguments of a Trainer: four checkpoints a run, of which the last is kept."""


def adapt(base: nn.Module, method: str, task_type: str, loreft: dict[str, Any], lora: dict[str, Any]) -> nn.Module:
    """`base` with the adapter of a method: "loreft...", "lora...", "dora...", or "joint..." (both adapters).

    "head" trains the classifier's head alone.

    Args:
        loreft: fields of `LoReftConfig`, for a method that begins with "loreft" or "joint".
        lora: fields of `LoraConfig`, for a method that begins with "lora", "dora" or "joint".
    """
    if method == "head":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in HEADS)
        return base
    if method.startswith("joint"):
        return joint_model(base, task_type, loreft=loreft, lora=lora)
    if method.startswith("loreft"):
        return get_peft_model(base, LoReftConfig(task_type=task_type, **loreft))
    return get_peft_model(base, LoraConfig(task_type=task_type, **lora))


def reload(base: nn.Module, method: str, folder: Path) -> nn.Module:
    """`base` with the adapter of a method that `save_pretrained` wrote to `folder`."""
    if method.startswith("joint"):
        return load_joint(base, folder)
    return PeftModel.from_pretrained(base, str(folder))


def trainable(model: nn.Module) -> int:
    """Number of parameters that are trained. A classifier's head does not count, as in the paper."""
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(head in name for head in HEADS):
            count += parameter.numel()
    return count


def kept_mib(model: nn.Module, batch: dict[str, Any]) -> float:
    """MiB that autograd keeps for the backward of one training step, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # one tensor for each storage: as long as it lives, no other gets its address

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own) / 2**20


def resume(trainer: Trainer) -> None:
    """Train, from the last checkpoint in the trainer's folder if there is one."""
    folder = Path(trainer.args.output_dir)
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)


def train(
    model: nn.Module,
    rows: Any,
    collate: Callable[..., Any],
    folder: Path,
    *,
    seed: int,
    learning_rate: float,
    batch: int,
    steps: int,
    epochs: float = 1.0,
    fitted: bool = False,
) -> None:
    """Train with transformers' Trainer: linear decay, a tenth of the steps to warm up, AdamW without weight decay.

    Args:
        folder: this run's own. Checkpoints are there until the run is done; an interrupted run goes on from the last.
            One with two adapters begins anew, because a Trainer's checkpoint would bring back one of them.
        batch: rows in a batch.
        steps: number of steps; -1 trains for `epochs`.
        fitted: whether `create_loreft_optimizer` makes the optimizer; every parameter has the same rate otherwise.
    """
    set_seed(seed)
    if isinstance(model, PeftModel) and isinstance(config := model.peft_config["default"], LoReftConfig):
        collate = DataCollatorForLoReft(collate, config)
    settings = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch,
        max_steps=steps,
        num_train_epochs=epochs,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        report_to="none",
        logging_steps=50,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available(),
        **(dict(save_strategy="no") if is_joint(model) else CHECKPOINTS),
    )
    trainer = JointTrainer if is_joint(model) else Trainer
    optimizer = create_loreft_optimizer(model, lr=learning_rate) if fitted else None
    resume(trainer(model, settings, train_dataset=rows, data_collator=collate, optimizers=(optimizer, None)))
    shutil.rmtree(folder, ignore_errors=True)
    model.eval()
