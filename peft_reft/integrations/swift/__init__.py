"""ms-swift: `swift sft --external_plugins "$(peft-reft swift-plugin)" --tuner_type loreft`.

The fields of `LoReftConfig` stand in `--reft_args`, as JSON. ms-swift keeps the labels, or a part of them, from the
model's forward. So its collator is wrapped, which sees them whole: a batch then has the positions in it.

`loreft_plugin.py` beside this file is what ms-swift imports. ms-swift puts its folder first on `sys.path`, so nothing
else may stand there.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import MISSING, fields
from typing import Any

from peft import get_peft_model
from swift.arguments.tuner_args import TunerArguments
from swift.trainers.mixin import SwiftMixin
from swift.tuner_plugin import PeftTuner, tuners_map
from swift.tuners import Swift
from torch import nn

from ...config import LoReftConfig
from ...patching import wrap
from ...tools.chat import loreft_configs
from ...tools.collator import DataCollatorForLoReft

TUNER = "loreft"
_TASKS = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}
_TRAINERS = ("Seq2SeqTrainer", "Trainer", "DPOTrainer")
"""Names of the trainers that are tested: of `swift sft`, of classifiers, of `--rlhf_type dpo`."""


class LoReftTuner(PeftTuner):
    """LoReFT for ms-swift. Its methods are those of ms-swift's `Tuner`."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """Add a new adapter.

        Raises:
            ValueError: `--reft_args` is no JSON object with fields of `LoReftConfig`; the task is not supported; or
                an argument of another tuner is given, which would have no effect.
        """
        adapted: nn.Module = get_peft_model(model, config_of(args))
        return adapted

    @staticmethod
    def save_pretrained(
        model: nn.Module,
        save_directory: str,
        state_dict: dict[str, Any] | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save the adapter; from `state_dict` if DeepSpeed or FSDP has gathered one, which `PeftTuner` would drop."""
        PeftTuner.save_pretrained(
            model, save_directory, safe_serialization=safe_serialization, **{**kwargs, "state_dict": state_dict}
        )


def config_of(args: Any) -> LoReftConfig:
    """Make the config of a new adapter from ms-swift's arguments; see `LoReftTuner.prepare_model`."""
    for field in fields(TunerArguments):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, field.name)
        unchanged = value == default or (value is True and default == "true")
        if field.name != "reft_args" and not unchanged:
            raise ValueError(
                f"--{field.name} {value} has no effect on --tuner_type {TUNER}. Leave it out, and give the fields of "
                'LoReftConfig in --reft_args, as JSON: --reft_args \'{"r": 8, "positions": "f7+l7"}\'.'
            )
    if args.task_type not in _TASKS:
        raise ValueError(f"--task_type {args.task_type}: --tuner_type {TUNER} supports {', '.join(_TASKS)}.")
    try:
        given = json.loads(args.reft_args or "{}")
        return LoReftConfig(task_type=_TASKS[args.task_type], **given)
    except (json.JSONDecodeError, TypeError) as error:
        known = ", ".join(field.name for field in fields(LoReftConfig))
        raise ValueError(
            f"--reft_args {args.reft_args}: expected a JSON object with fields of LoReftConfig ({error}). These are "
            f"{known}."
        ) from error


def _prepare_trainer(init: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Make a trainer of ms-swift, and wrap its collator.

    Raises:
        ValueError: the trainer is none of those that are tested, or rows are cut among processes.
    """
    init(trainer, *args, **kwargs)
    config = next(iter(loreft_configs(trainer.model).values()), None)
    if config is None:
        return
    if type(trainer).__name__ not in _TRAINERS:
        raise ValueError(
            f"LoReFT does not know which tokens ms-swift's {type(trainer).__name__} gives the model. With LoReFT use "
            "`swift sft` or `swift rlhf --rlhf_type dpo`; TRL has the other trainers."
        )
    template = trainer.template
    if template.sequence_parallel_size > 1:
        raise ValueError(
            f"--sequence_parallel_size {template.sequence_parallel_size} cuts rows among processes, and LoReFT needs "
            "whole rows. Use 1."
        )
    groups = "+".join(str(group) for group in config.layout if group.counts_from_beginning)
    if template.truncation_strategy == "left" and groups:
        warnings.warn(
            f"LoReFT: --truncation_strategy left cuts the beginning of rows longer than --max_length "
            f"{template.max_length}, and {groups} of positions={config.positions!r} then edits other tokens "
            "than `generate` does. Use 'right', or 'delete', which leaves long rows out.",
            stacklevel=2,
        )
    if template.task_type == "causal_lm":
        trainer.data_collator = DataCollatorForLoReft(trainer.data_collator, config)


def _refuse_merge(merge: Any, model: Any, **kwargs: Any) -> None:
    """Raise ValueError for LoReFT: ms-swift saves what is merged without a look whether the config can say it."""
    if loreft_configs(model):
        raise ValueError(
            "ms-swift cannot merge LoReFT into the weights. `peft-reft export ADAPTER DST` does it, if the edit folds "
            "into them exactly. Otherwise use the adapter as it is: `swift infer --adapters ADAPTER`."
        )
    merge(model, **kwargs)


tuners_map[TUNER] = LoReftTuner
wrap(SwiftMixin, "__init__", _prepare_trainer)
wrap(Swift, "merge_and_unload", _refuse_merge)
