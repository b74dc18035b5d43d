"""Register LoReFT with PEFT. `import peft_reft` calls this."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from peft import PeftType
from peft.utils import register_peft_method

from .patching import add_member

if TYPE_CHECKING:
    from .config import LoReftConfig

NAME = "LOREFT"


def add_peft_type() -> None:
    """Add `PeftType.LOREFT`. A second call does nothing."""
    add_member(PeftType, NAME)


def register() -> None:
    """Register the classes of config and model with PEFT, and wrap what `card`, `files` and `tools` need.

    A second call, as after `importlib.reload`, replaces the classes.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from .card import complete_all_cards
    from .config import LoReftConfig
    from .files import guard_files
    from .tools.for_peft import teach_peft
    from .tuner.model import LoReftModel
    from .tuner.older_peft import wrap_state_dict_functions

    peft_type = PeftType(NAME)
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(peft_type, None)  # PEFT refuses to register a method twice
    register_peft_method(name=NAME.lower(), config_cls=LoReftConfig, model_cls=LoReftModel, prefix=LoReftModel.prefix)
    complete_all_cards()
    guard_files()
    teach_peft()
    wrap_state_dict_functions()
    LoReftModel.after_injection = [_add_trainer_callbacks]


def _add_trainer_callbacks(config: LoReftConfig) -> None:
    """Have every Trainer call ours, once there is an adapter to train."""
    if config.inference_mode and "transformers.trainer" not in sys.modules:
        return
    from .integrations.trainer import add_default_callbacks  # imports transformers' Trainer, which serving never needs

    add_default_callbacks()
