"""`peft-reft train`: TRL's supervised finetuning with LoReFT's fields among its arguments."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import MISSING, fields, make_dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from datasets import load_dataset
from peft import PeftConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_quantization_config,
)

from .config import LoreftConfig

_OF_ALL_METHODS = {field.name for field in fields(PeftConfig)}
# Text on a command line, where JSON says what is not: 8, [0, 3], {"0-11": "f5"}, false.
_TEXT = {"r", "positions", "layers", "init_weights", "target_modules", "exclude_modules", "modules_to_save"}
_LEFT_OUT = {"target_parameters", "trainable_token_indices"}  # not supported; not for a command line

LoreftArguments: Any = make_dataclass(
    "LoreftArguments",
    [
        (
            field.name,
            {"dropout": float, "gate": bool}.get(field.name, str | None),
            dataclass_field(
                default=None if field.default is MISSING else field.default,
                metadata={"help": field.metadata["help"] + (" Text or JSON." if field.name in _TEXT else "")},
            ),
        )
        for field in fields(LoreftConfig)
        if field.name not in _OF_ALL_METHODS | _LEFT_OUT
    ],
)


def loreft_config(arguments: Any) -> LoreftConfig:
    """The config that command-line arguments or a YAML file describe."""
    given = {field.name: getattr(arguments, field.name) for field in fields(arguments)}
    return LoreftConfig(task_type="CAUSAL_LM", **{name: _value(name, value) for name, value in given.items()})


def _value(name: str, value: Any) -> Any:
    if name not in _TEXT or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C lets the step that is under way end, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nSaving a checkpoint after this step; once more to stop at once.", flush=True)


def parser() -> TrlParser:
    """All arguments of TRL's `SFTConfig` and `ModelConfig`, and LoReFT's."""
    classes: Any = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, LoreftArguments)
    made = TrlParser(
        classes,
        prog="peft-reft train",
        description="Finetune a causal LM with LoReFT: TRL's SFTTrainer, its arguments and those of LoreftConfig.",
    )
    made.set_defaults(output_dir="outputs/loreft", learning_rate=1e-3, report_to="none")
    if not torch.accelerator.is_available():
        made.set_defaults(bf16=False)  # TRL's default, which a CPU refuses
    return made


def main(arguments: list[str]) -> int:
    """Train, save, push if asked to. Returns the exit code: 130 if interrupted, with a checkpoint left behind."""
    script, args, model, mixture, loreft = parser().parse_args_and_config(arguments)
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a folder, or a name on the Hub.")
    config = loreft_config(loreft)
    if mixture.datasets:
        data = get_dataset(mixture)
    elif script.dataset_name and os.path.isfile(script.dataset_name):
        data = load_dataset("json", data_files=script.dataset_name)
    elif script.dataset_name:
        data = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    else:
        raise ValueError("--dataset_name is missing: a file of JSON lines, a folder, or a name on the Hub.")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    stop = SaveOnInterrupt()
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=config,
        callbacks=[stop],
    )
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    if stop.interrupted:
        step = trainer.state.global_step
        print(f"Stopped after step {step}. Go on with the same command and --resume_from_checkpoint true.")
        return 130
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if trainer.is_world_process_zero():
        print(f"Saved to {args.output_dir}. Ask it: peft-reft generate {args.output_dir} 'A prompt'")
    return 0


def _checkpoint(args: Any) -> Any:
    """`--resume_from_checkpoint true` is the newest checkpoint; else it is a folder."""
    given = args.resume_from_checkpoint
    return given.lower() == "true" if str(given).lower() in ("true", "false") else given
