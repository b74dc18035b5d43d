"""What one front end knows of the engine's adapters. There may be several front ends; the core knows best."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft.utils import CONFIG_NAME

from .chosen import Facts
from .engine.openai import base_names, lora_names, offer
from .options import HUB, Options
from .sources import is_loreft

_FOLDER_NAME = re.compile(r"\w[\w.-]*")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass
class Offered:
    """The adapters that requests can choose here.

    Args:
        options: how adapters are served.
        facts: from an adapter's name to its facts.
        paths: from an adapter's name to its folder, or its name on the Hub; `SENT` if its files were sent.
    """

    options: Options
    facts: dict[str, Facts]
    paths: dict[str, str]
    shown_in: object | None = None
    """What the OpenAI server of this process offers (`OpenAIServingModels`), if there is one."""
    counter: Callable[[str], Any] | None = None
    """From an adapter's name to the counter of its requests, if this process has metrics."""
    last_used: dict[str, float] = field(default_factory=dict)
    """From an adapter that was loaded on its first use to the time of its last."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while an adapter is loaded on its first use."""
    of_vllm: set[str] = field(default_factory=set)
    """Paths of `LoRARequest`s that are no LoReFT adapters."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.facts

    def __str__(self) -> str:
        return ", ".join(sorted(self.facts)) or "none"

    def note(self, name: str, facts: Facts, path_or_name: str) -> None:
        """Let requests choose an adapter that the engine has loaded."""
        self.last_used.pop(name, None)
        self._note(name, facts, path_or_name)
        self._publish()

    def _note(self, name: str, facts: Facts, path_or_name: str) -> None:
        self.paths[name] = path_or_name
        self.facts[name] = facts
        if self.counter is not None:
            self.counter(name)  # it begins with 0

    def forget(self, names: Iterable[str]) -> None:
        """Refuse new requests for adapters."""
        for name in names:
            for known in (self.facts, self.paths, self.last_used):
                known.pop(name, None)
        self._publish()

    def follow(self, listed: dict[str, dict[str, Any]]) -> None:
        """Take over what the core knows (`core.known`)."""
        self.forget([name for name in self.facts if name not in listed])
        for name, data in listed.items():
            self._note(name, Facts.read(data["facts"]), data["path"])
        self._publish()

    def publish_in(self, models: object) -> None:
        """Offer the adapters in the OpenAI server of this process.

        Args:
            models: the server's `OpenAIServingModels`.

        Raises:
            ValueError: an adapter has the name of another model.
        """
        self.shown_in = models
        for name in self.facts:
            self.check_new(name)
        self._publish()

    def _publish(self) -> None:
        if self.shown_in is not None:
            offer(self.shown_in, self.paths)

    def count_in_metrics(self, base_name: str) -> None:
        """Count the requests for each adapter from now on, in vLLM's metrics. Several servers add up."""
        from prometheus_client import Counter  # vLLM needs it, and says where it keeps its values before this runs

        labels = ["model_name", "adapter"]
        counter = Counter("vllm:loreft_requests", "Number of requests that chose a LoReFT adapter.", labels)
        self.counter = partial(counter.labels, base_name)
        for name in self.facts:
            self.counter(name)

    def count(self, name: str) -> None:
        """Count a request for an adapter."""
        if self.counter is not None:
            self.counter(name).inc()

    def check_new(self, name: str) -> None:
        """Raise ValueError if the OpenAI server of this process offers another model of this name."""
        if self.shown_in is None:
            return
        if name in base_names(self.shown_in):
            raise ValueError(f"{name!r} is the name of the base model. Give the adapter another name.")
        if name in lora_names(self.shown_in):
            raise ValueError(f"There is a LoRA adapter {name!r} already. Give the adapter another name.")

    def is_ours(self, path_or_name: str) -> bool:
        """Whether the path of a `LoRARequest` is that of a LoReFT adapter."""
        if path_or_name in self.paths.values():
            return True
        if path_or_name in self.of_vllm:
            return False
        if is_loreft(path_or_name):
            return True
        self.of_vllm.add(path_or_name)
        return False

    def resolve(self, name: object) -> str | None:
        """Where an adapter of this name may be loaded from on its first use: a folder, or a name on the Hub."""
        source = self.options.resolve_from
        if source is None or not isinstance(name, str):
            return None
        if source == HUB:
            return name if _HUB_NAME.fullmatch(name) else None
        if not _FOLDER_NAME.fullmatch(name):  # above all no slash, and no "..": only a folder in the folder
            return None
        path = os.path.join(source, name)
        return path if os.path.isfile(os.path.join(path, CONFIG_NAME)) else None

    def loaded_on_use(self, name: str) -> None:
        """Note that an adapter was loaded because a request chose it: it may be dropped for another one."""
        self.last_used[name] = time.monotonic()

    def used(self, name: object) -> None:
        """Note that a request chooses an adapter."""
        if isinstance(name, str) and name in self.last_used:
            self.last_used[name] = time.monotonic()

    def least_recently_used(self, running: dict[str, int]) -> str | None:
        """The adapter to drop for a new one: among those that were loaded on first use and that no request uses now.

        Args:
            running: from an adapter's name to how many requests use it.
        """
        free = [name for name in self.last_used if running.get(name, 0) == 0]
        return min(free, key=self.last_used.__getitem__, default=None)
