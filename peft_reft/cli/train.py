"""`peft-reft train`: TRL's supervised finetuning with LoReFT's fields among its arguments."""

from __future__ import annotations

import json
import signal
from collections.abc import Collection
from dataclasses import MISSING, fields, make_dataclass
from dataclasses import field as dataclass_field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from peft import PeftConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_quantization_config,
)

from ..config import LoReftConfig
from .data import training_data
from .paths import check_path

# What of TRL's classes this command uses. The rest is not taken, so that nothing is ignored without a word.
_OF_MODEL = {
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
}
_OF_SCRIPT = {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"}
_WITH_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")

_INSTEAD = {
    "lora_r": "--r",
    "lora_alpha": "--learning_rate (LoReFT has no scaling)",
    "lora_dropout": "--dropout",
    "lora_target_modules": "--layers and --component, or --target_modules",
    "lora_modules_to_save": "--modules_to_save",
}
"""What to give in place of arguments that TRL's own command has for LoRA."""

_OF_ALL_METHODS = {field.name for field in fields(PeftConfig)}
_LEFT_OUT = {"target_parameters"}  # not supported
_KINDS = get_type_hints(LoReftConfig)


def _part_of(whole: Any, names: Collection[str], more: list[Any]) -> Any:
    """A dataclass with the fields `names` of another, and `more`."""
    hints = get_type_hints(whole)
    taken = [
        (
            field.name,
            hints[field.name],
            dataclass_field(
                default=field.default,
                metadata={**field.metadata, "help": field.metadata["help"].replace(" Works only with LoRA.", "")},
            ),
        )
        for field in fields(whole)
        if field.name in names
    ]
    return make_dataclass(f"{whole.__name__}Part", taken + more)


def _types(kind: Any) -> set[Any]:
    """The types that a hint allows, without what they hold: `str | list[int]` is {str, list}."""
    if get_origin(kind) in (Union, UnionType):
        return set().union(*(_types(each) for each in get_args(kind)))
    if get_origin(kind) is Literal:
        return {type(value) for value in get_args(kind)}
    return {get_origin(kind) or kind}


def _loreft_argument(field: Any) -> tuple[str, Any, Any]:
    kind = _KINDS[field.name]
    types = _types(kind) - {type(None)}
    form = "" if len(types) == 1 and types <= {str, float, bool} else " Text or JSON." if str in types else " JSON."
    metadata = {"help": field.metadata["help"] + form}
    default = None if field.default is MISSING else field.default
    return (
        field.name,
        kind if kind in (float, bool) else str | None,
        dataclass_field(default=default, metadata=metadata),
    )


_TEST_FILE = (
    "test_file",
    str | None,
    dataclass_field(default=None, metadata={"help": "File of rows to evaluate on."}),
)

ModelArguments: Any = _part_of(ModelConfig, _OF_MODEL, [])
DataArguments: Any = _part_of(ScriptArguments, _OF_SCRIPT, [_TEST_FILE])
LoReftArguments: Any = make_dataclass(
    "LoReftArguments",
    [_loreft_argument(field) for field in fields(LoReftConfig) if field.name not in _OF_ALL_METHODS | _LEFT_OUT],
)


def loreft_config(arguments: Any) -> LoReftConfig:
    """The config that command-line arguments or a YAML file describe."""
    given = {field.name: getattr(arguments, field.name) for field in fields(arguments)}
    named = {field.name: field.default for field in fields(arguments)}
    return LoReftConfig(
        task_type="CAUSAL_LM",
        **{name: _value(name, value) for name, value in given.items() if value != named[name]},
    )


def _value(name: str, value: Any) -> Any:
    """What a word on a command line says: JSON where the field takes more than text."""
    types = _types(_KINDS[name])
    if not isinstance(value, str) or types <= {str, type(None)}:
        return value
    try:
        return json.loads(value)
    except ValueError:
        if str in types:
            return value
        if list[str] in get_args(_KINDS[name]):  # one name
            return [value]
        raise ValueError(f"--{name} {value!r} is no JSON. Expected {LoReftConfig.__annotations__[name]}.") from None


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
    """All arguments of TRL's `SFTConfig`, those of its other classes that are used here, and LoReFT's."""
    classes: Any = (DataArguments, SFTConfig, ModelArguments, DatasetMixtureConfig, LoReftArguments)
    made = TrlParser(
        classes,
        prog="peft-reft train",
        description="Finetune a causal LM with LoReFT: TRL's SFTTrainer, its arguments and those of LoReftConfig.",
    )
    made.set_defaults(output_dir="outputs/loreft", learning_rate=1e-3, report_to="none")
    if not torch.accelerator.is_available():
        made.set_defaults(bf16=False)  # TRL's default, which a CPU refuses
    return made


def _refuse(unknown: list[str]) -> None:
    """Raise ValueError if there are arguments that nobody reads; of LoRA's it says what to give instead."""
    flags = [word.removeprefix("--").partition("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
    of_lora = [flag for flag in flags if flag.startswith("lora_") or flag in ("use_peft", "use_dora", "use_rslora")]
    if of_lora:
        instead = "".join(f" For --{flag} give {_INSTEAD[flag]}." for flag in of_lora if flag in _INSTEAD)
        raise ValueError(
            f"{', '.join(f'--{flag}' for flag in of_lora)}: for LoRA, which this command does not train. It always "
            f"trains a LoReFT adapter.{instead}"
        )
    if unknown:
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}. `peft-reft train --help` has all.")


def main(arguments: list[str]) -> int:
    """Train, save, push if asked to. Returns the exit code: 130 if interrupted, with a checkpoint left behind."""
    try:
        parsed = parser().parse_args_and_config(arguments, return_remaining_strings=True)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"The arguments, or the file that --config names, cannot be read: {error}") from error
    data, args, model, mixture, loreft, unknown = parsed
    _refuse(unknown)
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a folder, or a name on the Hub.")
    check_path(model.model_name_or_path)
    if model.load_in_4bit and model.load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit exclude each other. Give one.")
    for field in fields(model):
        if field.name in _WITH_4BIT and getattr(model, field.name) != field.default and not model.load_in_4bit:
            raise ValueError(f"--{field.name} {getattr(model, field.name)} goes with --load_in_4bit true.")
    config = loreft_config(loreft)
    train, test = training_data(data, mixture, args)
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
        train_dataset=train,
        eval_dataset=test,
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
        trainer.push_to_hub(dataset_name=data.dataset_name)
    if trainer.is_world_process_zero():
        print(f"Saved to {args.output_dir}. {_how_to_ask(args.output_dir, trainer.model.peft_config['default'])}")
    return 0


def _how_to_ask(folder: str, config: LoReftConfig) -> str:
    said = f"Ask it: peft-reft generate {folder} 'A prompt'"
    if config.response_template is None:
        return said
    form = "in the chat template" if config.response_template else "with the prompt as it is, without a chat template"
    return f"{said}\n(`generate` asks as the training data did: {form}.)"


def _checkpoint(args: Any) -> Any:
    """`--resume_from_checkpoint true` is the newest checkpoint; else it is a folder."""
    given = args.resume_from_checkpoint
    return given.lower() == "true" if str(given).lower() in ("true", "false") else given
