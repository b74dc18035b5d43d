"""What gives rewards in `peft-reft grpo` and `peft-reft rloo`, named as for TRL's own command."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from trl import rewards

from .arguments import check_path

_OF_LENGTH = "get_soft_overlong_punishment"
"""The one function of TRL's scripts that makes a reward and is none; TRL's scripts call it with these numbers."""
_LENGTHS = {"max_completion_len": 1280, "soft_punish_cache": 256}
_NAMES = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", _OF_LENGTH)


def rewards_of(data: Any) -> list[Any]:
    """The rewards that the arguments name: functions, or the path or name of a model.

    Args:
        data: has `reward_model_name_or_path` and `reward_funcs`.

    Raises:
        ValueError: there are none, or one cannot be found. The message names the argument.
    """
    found: list[Any] = []
    if data.reward_model_name_or_path:
        check_path(data.reward_model_name_or_path)
        found.append(data.reward_model_name_or_path)
    found += [_function(name) for name in data.reward_funcs or []]
    if not found:
        raise ValueError(f"Nothing gives rewards. Give --reward_funcs ({_allowed()}) or --reward_model_name_or_path.")
    return found


def _function(name: str) -> Any:
    """The reward of that name: TRL's, or one that is imported, also from the working directory."""
    if name == _OF_LENGTH:
        return rewards.get_soft_overlong_punishment(**_LENGTHS)
    if name in _NAMES:
        return getattr(rewards, name)
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(f"--reward_funcs {name}: expected {_allowed()}.")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward_funcs {name}: {error}. Expected {_allowed()}.") from error


def _allowed() -> str:
    return f"{', '.join(_NAMES)}, or module.function"
