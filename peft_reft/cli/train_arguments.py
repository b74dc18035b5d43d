"""The arguments of the commands that train: those of TRL's classes that are used, and the fields of our configs."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import MISSING, fields, make_dataclass
from dataclasses import field as dataclass_field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from peft import PeftConfig
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig

from peft_reft_cli import TRAINING

from ..config import LoReftConfig
from ..runtime_config import LoReftRuntimeConfig
from .methods import METHODS, Method
from .train_help import TrainParser

# The fields of TRL's classes that these commands read. There is no argument for the others, which would be ignored.
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
_UNTRUE_HERE = (" Works only with LoRA.", " If `datasets` is provided, this will be ignored.")
"""What the help of TRL's fields says of TRL's own command."""
_WITH_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")

_INSTEAD = {
    "lora_r": "--r",
    "lora_alpha": "--learning_rate (LoReFT has no scaling)",
    "lora_dropout": "--dropout",
    "lora_target_modules": "--layers and --component, or --target_modules",
    "lora_modules_to_save": "--modules_to_save",
    "lora_task_type": "nothing (the command knows it)",
}
"""What to give in place of the LoRA arguments of TRL's own command."""

_OF_EVERY_METHOD = {field.name for field in fields(PeftConfig)}
_RUNTIME = {"runtime_config"}  # its fields are arguments
_HINTS = get_type_hints(LoReftConfig) | get_type_hints(LoReftRuntimeConfig)


def _types(hint: Any) -> set[Any]:
    """The types that a hint allows, without their contents: `str | list[int]` is {str, list}."""
    if get_origin(hint) in (Union, UnionType):
        found: set[Any] = set()
        for each in get_args(hint):
            found |= _types(each)
        return found
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    return {get_origin(hint) or hint}


def _part_of(whole: Any, names: Collection[str], more: list[Any]) -> Any:
    """A dataclass with the fields `names` of the dataclass `whole`, and the fields `more`."""
    hints = get_type_hints(whole)
    taken = []
    for field in fields(whole):
        if field.name in names:
            help_text = field.metadata["help"]
            for untrue in _UNTRUE_HERE:
                help_text = help_text.replace(untrue, "")
            copied = dataclass_field(default=field.default, metadata={**field.metadata, "help": help_text})
            taken.append((field.name, hints[field.name], copied))
    return make_dataclass(f"{whole.__name__}Part", taken + more)


def _loreft_argument(field: Any) -> tuple[str, Any, Any]:
    """The argument for a field of a config: name, type, dataclass field. Lists and mappings are given as JSON."""
    hint = _HINTS[field.name]
    types = _types(hint) - {type(None)}
    if len(types) == 1 and types <= {str, float, bool}:
        form = ""
    elif str in types:
        form = " Text or JSON."
    else:
        form = " JSON."
    default = None if field.default is MISSING else field.default
    argument = dataclass_field(default=default, metadata={"help": field.metadata["help"] + form})
    return field.name, hint if hint in (float, bool) else str | None, argument


def _argument(name: str, hint: Any, help_text: str, default: Any = None) -> tuple[str, Any, Any]:
    """An argument of this command alone."""
    return name, hint, dataclass_field(default=default, metadata={"help": help_text})


def _names(dataclass: Any) -> list[str]:
    return [field.name for field in fields(dataclass)]


_OF_ROWS = [
    _argument("test_file", str | None, "File of rows to evaluate on."),
    _argument(
        "prompt_column",
        list[str] | None,
        "The column of prompts, if it is not `prompt`. Several are joined by an empty line: instruction input.",
    ),
    _argument("chat", bool, "Make a user's message of each prompt, an assistant's of each answer.", False),
]
_OF_COMPLETIONS = [_argument("completion_column", str | None, "The column of answers, if it is not `completion`.")]

ModelArguments: Any = _part_of(ModelConfig, _OF_MODEL, [])
LoReftArguments: Any = make_dataclass(
    "LoReftArguments",
    [
        _loreft_argument(field)
        for field in (*fields(LoReftConfig), *fields(LoReftRuntimeConfig))
        if field.name not in _OF_EVERY_METHOD | _RUNTIME
    ],
)


def data_arguments(method: Method) -> Any:
    """The class of the arguments that say which rows there are, and what else the script of a method takes."""
    of_script, *_ = method.dataclasses()
    of_rows = _OF_ROWS + (_OF_COMPLETIONS if method.has_completions else [])
    return _part_of(of_script, _OF_SCRIPT | {*method.of_script}, of_rows)


def build_parser(command: str = "train") -> TrainParser:
    """All arguments of the config of TRL's trainer, those of its other classes that are used here, and LoReFT's."""
    method = METHODS[command]
    of_data = data_arguments(method)
    _, of_trainer, _, of_mixture = method.dataclasses()
    classes: Any = (of_data, of_trainer, ModelArguments, of_mixture, LoReftArguments)
    parser = TrainParser(
        classes,
        groups={
            "rows": _names(of_data),
            "LoReFT": _names(LoReftArguments),
            "the base model": _names(ModelArguments),
        },
        needed=method.needed,
        of_trainer=of_trainer.__name__,
        prog=f"peft-reft {command}",
        description=f"{TRAINING[command]} --config FILE reads arguments from YAML.",
    )
    parser.set_defaults(output_dir="outputs/loreft", learning_rate=1e-3, report_to="none")
    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)  # TRL's default is True, which a CPU refuses
    return parser


def parse(command: str, words: list[str]) -> tuple[Any, TrainingArguments, Any, DatasetMixtureConfig, LoReftConfig]:
    """Read the command line, and the YAML file that `--config` names.

    Returns:
        `data_arguments`, the config of TRL's trainer, `ModelArguments`, `DatasetMixtureConfig`, the adapter's config.

    Raises:
        ValueError: an argument is unknown, has a wrong value, or would have no effect.
    """
    try:
        parsed = build_parser(command).parse_args_and_config(words, return_remaining_strings=True)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"The arguments, or the file that --config names, cannot be read: {error}") from error
    data, args, model, mixture, loreft, unknown = parsed
    _refuse_unknown(command, unknown)
    _check_model(model)
    return data, args, model, mixture, loreft_config(loreft, METHODS[command].task_type)


def _refuse_unknown(command: str, unknown: list[str]) -> None:
    """Raise ValueError if there are unknown arguments; for those of LoRA it says what to give instead."""
    flags = [word.removeprefix("--").partition("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
    of_lora = [flag for flag in flags if flag.startswith("lora_") or flag in ("use_peft", "use_dora", "use_rslora")]
    if of_lora:
        instead = "".join(f" For --{flag} give {_INSTEAD[flag]}." for flag in of_lora if flag in _INSTEAD)
        raise ValueError(
            f"{', '.join(f'--{flag}' for flag in of_lora)}: for LoRA, which this command does not train. It always "
            f"trains a LoReFT adapter.{instead}"
        )
    if unknown:
        raise ValueError(
            f"Unknown arguments: {' '.join(unknown)}. `peft-reft {command} --help_all` lists all. Those of "
            f"`accelerate launch` stand before: accelerate launch ... -m peft_reft.cli {command} ..."
        )


def _check_model(model: Any) -> None:
    """Raise ValueError if the model is missing, or an argument for it would have no effect."""
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a folder, or a name on the Hub.")
    if model.load_in_4bit and model.load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit exclude each other. Give one.")
    for field in fields(model):
        value = getattr(model, field.name)
        if field.name in _WITH_4BIT and value != field.default and not model.load_in_4bit:
            raise ValueError(f"--{field.name} {value} goes with --load_in_4bit true.")


def loreft_config(arguments: Any, task_type: str) -> LoReftConfig:
    """The config that the `LoReftArguments` describe. A field that was not given keeps its default."""
    given = {}
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if value != field.default:
            given[field.name] = _read_value(field.name, value)
    of_runtime = {field.name: given.pop(field.name) for field in fields(LoReftRuntimeConfig) if field.name in given}
    return LoReftConfig(task_type=task_type, runtime_config=LoReftRuntimeConfig(**of_runtime), **given)


def _read_value(name: str, value: Any) -> Any:
    """The value of a field of LoReftConfig, from the text of its argument.

    Text is read as JSON if the field takes more than text. If it is not JSON, it stands for itself, or for a list of
    one name (`--modules_to_save lm_head`).
    """
    types = _types(_HINTS[name])
    if not isinstance(value, str) or types <= {str, type(None)}:
        return value
    try:
        return json.loads(value)
    except ValueError:
        if str in types:
            return value
        if list[str] in get_args(_HINTS[name]):
            return [value]
        raise ValueError(f"--{name} {value!r} is no JSON. Expected {_HINTS[name]}.") from None
