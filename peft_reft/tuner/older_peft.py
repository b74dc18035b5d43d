"""PEFT 0.20, which asks no tuner about the tensors of a file: the two functions that read and write them are wrapped.

From 0.21 on PEFT calls methods of `LoReftModel` instead. Delete this module when 0.20 goes. A program that imported
one of the functions before `peft_reft` has the unchecked one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from ..config import LoReftConfig
from ..patching import wrap
from .layer import PREFIX
from .state_dicts import from_file, is_ours, own_tensors, to_file, without_adapter_name


def wrap_state_dict_functions() -> None:
    """Wrap PEFT's two functions in each of its modules that has them, if this PEFT needs it."""
    if hasattr(BaseTuner, "_get_adapter_state_dict"):
        return
    wrappers: dict[str, Callable[..., Any]] = {"get_peft_model_state_dict": _get, "set_peft_model_state_dict": _set}
    for name, wrapper in wrappers.items():
        for path, module in list(sys.modules.items()):
            if path.partition(".")[0] == "peft" and name in vars(module):
                wrap(module, name, wrapper)


def _get(
    original: Any, model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """Do what PEFT's function does, but give LoReFT's tensors in the form of a file.

    PEFT drops tensors whose keys have the name of another adapter in them. So LoReFT's are picked out anew.
    """
    config: PeftConfig = model.peft_config[adapter_name]
    if not isinstance(config, LoReftConfig):
        return cast("dict[str, Tensor]", original(model, state_dict, adapter_name, *args, **kwargs))
    if state_dict is None:
        state_dict = model.state_dict()
    found: dict[str, Tensor] = original(model, state_dict, adapter_name, *args, **kwargs)
    ours = to_file(own_tensors(adapter_name, state_dict), config)
    beside = {key: tensor for key, tensor in found.items() if not is_ours(key)}  # such as a trained head
    return {**{without_adapter_name(key, adapter_name): tensor for key, tensor in ours.items()}, **beside}


def _set(
    original: Any, model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> Any:
    """Check the tensors of a file as `from_file` does, then do what PEFT's function does.

    Raises:
        ValueError: the file does not fit, or PEFT would take a head that was trained beside LoReFT for a part of it.
    """
    config: PeftConfig = model.peft_config[adapter_name]
    if isinstance(config, LoReftConfig):
        if PREFIX in adapter_name:
            raise ValueError(f"adapter_name={adapter_name!r}: with PEFT 0.20 a name without {PREFIX!r} is needed.")
        peft_model_state_dict = from_file(peft_model_state_dict, model, adapter_name, config)
    return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)
