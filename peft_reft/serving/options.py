"""The options that users pass to the engine as `additional_config["loreft"]`, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KEY = "loreft"
"""The key of the options in `additional_config`, and of the adapter's name in a request's `extra_args`."""

BLOCKS = "loreft_blocks"
"""The key in a request's `extra_args` of what the front end tells the core: the fields of `blocks.BlockKeys`."""


@dataclass(frozen=True)
class Options:
    """How adapters are served.

    Args:
        adapters: from an adapter's name to the folder that `save_pretrained` wrote, or to its name on the Hub.
        max_adapters: how many adapters there may be at once. None: 8, or the number of `adapters` if that is more.
        max_rank: the largest rank. None: 8, or the largest rank among `adapters` if that is more.
        max_positions: the largest number of sets of weights that an adapter may have in a layer: 1 if all positions
            share one set (`tie` "layer" and "model"), else the number of its groups or positions. None: the largest
            number among `adapters`, at least 1.

    Each edited module takes `max_adapters * max_positions * (2 * max_rank * d + max_rank) * 4` bytes for LoReFT.
    Each further formula in use takes memory of its own.

    Examples:
        >>> from peft_reft.serving.options import Options
        >>> Options.read({"loreft": {"adapters": {"emoji": "outputs/adapter"}, "max_rank": 4}}).max_rank
        4
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    max_adapters: int | None = None
    max_rank: int | None = None
    max_positions: int | None = None

    @staticmethod
    def read(additional_config: Any) -> Options | None:
        """The options in vLLM's `additional_config`, None if it does not ask for LoReFT.

        Raises:
            ValueError: an option is unknown or its value is not allowed. The message names it.
        """
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        given = additional_config[KEY]
        allowed = [each.name for each in fields(Options)]
        if not isinstance(given, Mapping):
            raise ValueError(f"additional_config[{KEY!r}]={given!r}; allowed is a mapping with {', '.join(allowed)}.")
        unknown = [repr(name) for name in given if name not in allowed]
        if unknown:
            raise ValueError(f"additional_config[{KEY!r}] has {', '.join(unknown)}; allowed are {', '.join(allowed)}.")
        options = Options(**given)
        if not isinstance(options.adapters, Mapping):
            raise ValueError(f"loreft.adapters={options.adapters!r}: expected a mapping from names to folders.")
        for name, path_or_name in options.adapters.items():
            check_name(name)
            if not isinstance(path_or_name, str) or not path_or_name:
                raise ValueError(
                    f"loreft.adapters[{name!r}]={path_or_name!r}: expected a folder, or a name on the Hub."
                )
        for name in ("max_adapters", "max_rank", "max_positions"):
            value = getattr(options, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"loreft.{name}={value!r}: expected an int of 1 or more.")
        named = len(options.adapters)
        if options.max_adapters is not None and options.max_adapters < named:
            raise ValueError(f"loreft.max_adapters={options.max_adapters}, but {named} are named in loreft.adapters.")
        return options


def check_name(name: Any) -> str:
    """Return `name` if it can be an adapter's name, else raise ValueError."""
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"loreft={name!r}: an adapter's name must be a string that is not empty and has no slash.")
    return name
