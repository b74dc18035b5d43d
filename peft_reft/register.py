"""Make `PeftType.LOREFT` exist and tell PEFT what belongs to it. The only file that touches PEFT's registries."""

from __future__ import annotations

from peft import PeftType
from peft.utils import register_peft_method

NAME = "LOREFT"


def add_peft_type() -> None:
    """Add the enum member `PeftType.LOREFT`, if it is not there yet.

    PEFT registers methods only for members of this enum, an enum with members cannot be subclassed, and PEFT has no
    entry point. The member is made the way `enum` makes one, so lookup, iteration, pickling and JSON work on it.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # Not setattr: EnumType.__setattr__ refuses to rebind a name that is in the member map. Python 3.12 and later need
    # the attribute itself, earlier ones find the member through the map.
    type.__setattr__(PeftType, NAME, member)


def register() -> None:
    """Register config and model classes with PEFT. Calling it again is harmless."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from .config import LoreftConfig
    from .files import guard_files
    from .hub import complete_all_cards
    from .model import LoreftModel

    peft_type = PeftType(NAME)
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(peft_type, None)  # a reloaded module brings new classes, and PEFT refuses to register twice
    register_peft_method(name=NAME.lower(), config_cls=LoreftConfig, model_cls=LoreftModel, prefix=LoreftModel.prefix)
    complete_all_cards()
    guard_files()
