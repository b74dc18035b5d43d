"""`LoReftRuntimeConfig`: how an adapter is run on this machine. It is not saved with the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

UntouchedPrompt = Literal["auto", "on", "off"]


@dataclass
class LoReftRuntimeConfig:
    """How an adapter is run. None of it changes what is computed, and none of it is saved (as `LoraRuntimeConfig`).

    Args:
        untouched_prompt: Whether a training step runs the part of each row before its first edited token without
            gradient, because it is the base model's. `"auto"`: if the positions leave such a part (`"l7"`, `"l7+g"`;
            not `"f7+l7"`), if it is long enough, and on devices where that was measured to be faster (CPUs).
            `"on"`: if any row has such a part; what makes it impossible raises. `"off"`: never. Of several active
            adapters one that says `"off"` decides, else one that says `"on"`.
        kept_mb: How many MiB may be kept from step to step of beginnings that rows share, such as a system prompt.
            0: none.
        kept_device: Where they are kept, such as `"cpu"`. None: where the model runs.

    Raises:
        ValueError: a field has a value that is not allowed.

    Examples:
        >>> from peft_reft import LoReftConfig, LoReftRuntimeConfig
        >>> runtime = LoReftRuntimeConfig(untouched_prompt="on", kept_mb=0)
        >>> config = LoReftConfig(task_type="CAUSAL_LM", positions="l7", runtime_config=runtime)
        >>> "runtime_config" in config.to_dict()
        False
    """

    untouched_prompt: UntouchedPrompt = field(
        default="auto", metadata={"help": "Whether what stands before the first edited token runs without gradient."}
    )
    kept_mb: int = field(default=512, metadata={"help": "MiB to keep of beginnings that rows share; 0 keeps none."})
    kept_device: str | None = field(default=None, metadata={"help": "Where they are kept; None: with the model."})

    def __post_init__(self) -> None:
        if self.untouched_prompt not in get_args(UntouchedPrompt):
            raise ValueError(
                f"untouched_prompt={self.untouched_prompt!r}: expected one of "
                f"{', '.join(map(repr, get_args(UntouchedPrompt)))}."
            )
        if type(self.kept_mb) is not int or self.kept_mb < 0:
            raise ValueError(f"kept_mb={self.kept_mb!r}: expected an int, 0 or more.")
        if self.kept_device is not None and not isinstance(self.kept_device, str):
            raise ValueError(
                f"kept_device={self.kept_device!r}: expected the name of a device, such as 'cpu', or None."
            )
