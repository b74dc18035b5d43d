"""What `additional_config["loreft"]` may say. No vLLM here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KEY = "loreft"
"""Name of the options in `additional_config`, and of the adapter in a request's `extra_args`."""


@dataclass(frozen=True)
class Options:
    """How adapters are served.

    Args:
        adapters: name -> folder that `save_pretrained` wrote, or its name on the Hub.
        max_adapters: how many there may be at once; None for 8, or as many as are named if more.
        max_rank: largest rank; None for 8, or the largest among those named if more.
        max_positions: most sets of weights that an adapter may have in a layer: 1 if its positions share one (`tie`
            "layer" and "model"), else the number of its groups, or of its positions. None for 1, or the largest among
            those named.

    Memory is `max_adapters * max_positions * (2 * max_rank * d + max_rank) * 4` bytes for each edited module, taken
    with the first adapter of a kind of formula.

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
        """The options in vLLM's `additional_config`, or None if LoReFT is not asked for.

        Raises:
            ValueError: an option is unknown or its value is no good; the message names it.
        """
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        given = additional_config[KEY]
        allowed = [each.name for each in fields(Options)]
        if not isinstance(given, Mapping) or (unknown := [name for name in given if name not in allowed]):
            got = repr(given) if not isinstance(given, Mapping) else f"has {', '.join(map(repr, unknown))}"
            raise ValueError(f"additional_config[{KEY!r}] {got}; allowed are {', '.join(allowed)}.")
        options = Options(**given)
        if not isinstance(options.adapters, Mapping):
            raise ValueError(f"loreft.adapters={options.adapters!r}: expected a mapping from names to folders.")
        for name, source in options.adapters.items():
            check_name(name)
            if not isinstance(source, str) or not source:
                raise ValueError(f"loreft.adapters[{name!r}]={source!r}: expected a folder, or a name on the Hub.")
        for name in ("max_adapters", "max_rank", "max_positions"):
            value = getattr(options, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"loreft.{name}={value!r}: expected an int of 1 or more.")
        if options.max_adapters is not None and options.max_adapters < len(options.adapters):
            raise ValueError(f"loreft.max_adapters={options.max_adapters}, but {len(options.adapters)} are named.")
        return options


def check_name(name: Any) -> str:
    """`name`, if an adapter can go by it; else ValueError."""
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"loreft={name!r}: an adapter's name is a string of one character or more, without a slash.")
    return name
