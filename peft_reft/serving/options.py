"""The options that users pass to the engine as `additional_config["loreft"]`, and their checks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KEY = "loreft"
"""The key of the options in `additional_config`, and of the adapter's name in a request's `extra_args`."""

SCALE = "loreft_scale"
"""The key in a request's `extra_args` of what multiplies the adapter's edits; 1 if it is not there."""

PROMPT_LENGTH = "loreft_prompt_length"
"""The key in a request's `extra_args` of how many of its tokens are the prompt. The others are an answer: text that is
scored. If it is not there, all of them are the prompt, or the marks of the chat template say where answers are."""

CHOICE = "loreft_choice"
"""The key in a request's `extra_args` of what the core tells the worker: the fields of `chosen.Choice`."""

HUB = "hub"
"""The value of `resolve_from` that means the Hub."""

_LONGEST_NAME = 200


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
        edit_answers: whether adapters may edit generated tokens if the engine captures its steps as graphs. Then
            each captured step computes edits for all its tokens. None: whether any of `adapters` does it.
        resolve_from: where adapters are loaded from when a request first names them: a folder, whose folders have the
            adapters' names; or "hub" for names such as "owner/adapter". None: such requests are refused.

    Each edited module takes `((max_adapters + 1) * max_positions + 1) * (2 * max_rank * d + max_rank) * 4` bytes for
    LoReFT: weights that are replaced stay until their last request ends, and one set of weights edits nothing. Each
    further formula in use takes memory of its own.

    Examples:
        >>> from peft_reft.serving.options import Options
        >>> Options.read({"loreft": {"adapters": {"emoji": "outputs/adapter"}, "max_rank": 4}}).max_rank
        4
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    max_adapters: int | None = None
    max_rank: int | None = None
    max_positions: int | None = None
    edit_answers: bool | None = None
    resolve_from: str | None = None

    @property
    def most_adapters(self) -> int:
        """`max_adapters`, or what it is if it is not given."""
        return self.max_adapters or max(8, len(self.adapters))

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
        if options.edit_answers is not None and type(options.edit_answers) is not bool:
            raise ValueError(f"loreft.edit_answers={options.edit_answers!r}: expected true or false.")
        source = options.resolve_from
        if source is not None and not (isinstance(source, str) and (source == HUB or os.path.isdir(source))):
            raise ValueError(f'loreft.resolve_from={source!r}: expected a folder that exists, or "{HUB}".')
        named = len(options.adapters)
        if options.max_adapters is not None and options.max_adapters < named:
            raise ValueError(f"loreft.max_adapters={options.max_adapters}, but {named} are named in loreft.adapters.")
        return options


def check_name(name: Any) -> str:
    """Return `name` if it can be an adapter's name, else raise ValueError."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ValueError(
            f"{KEY}={shorten(name)}: an adapter's name is a string of 1 to {_LONGEST_NAME} printable characters."
        )
    return name


def check_request(args: Mapping[str, Any]) -> tuple[str, str, object] | None:
    """Look at what a request's `extra_args` say about adapters, but for whether the adapter exists.

    Returns:
        None if nothing is wrong; else the key, what is wrong with it, and its value.
    """
    allowed = (KEY, SCALE, PROMPT_LENGTH)
    for key in args:
        if isinstance(key, str) and key.startswith(KEY) and key not in allowed:
            return key, f"there is no such argument (allowed: {', '.join(allowed)})", args[key]
    for key in (SCALE, PROMPT_LENGTH):
        if key in args and KEY not in args:
            return key, f"the request names no adapter ({KEY})", args[key]
    scale = args.get(SCALE, 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        return SCALE, "expected a finite number", scale
    length = args.get(PROMPT_LENGTH, 1)
    if type(length) is not int or length < 1:
        return PROMPT_LENGTH, "expected an int of 1 or more", length
    return None


def shorten(value: object) -> str:
    """The value for a message: at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
