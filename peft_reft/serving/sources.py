"""Where an adapter comes from: a folder, a name on the Hub; or its two files, sent by somebody (`AdapterFiles`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..config import LoReftConfig
from ..convert.ours import local_folder
from .chosen import Facts

_FILES = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]

SENT = "sent at run time"
"""What stands for the folder of an adapter that was sent."""


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of an adapter, which need not be in a folder that the engine can read.

    Args:
        config: what is in `adapter_config.json`.
        weights: what is in `adapter_model.safetensors`.
        where: the folder, or the name on the Hub, for messages; "" if there is none.

    Raises:
        ValueError: one of the two is no `bytes`.
    """

    config: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    where: str = field(default="", compare=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("config", "weights"):
            value = getattr(self, name)
            if not isinstance(value, bytes):
                raise ValueError(f"{name} is of type {type(value).__name__}: expected what is in the file, as bytes.")

    @staticmethod
    def read(path_or_name: str) -> AdapterFiles:
        """Read the files that `save_pretrained` wrote.

        Args:
            path_or_name: a folder, or a name on the Hub.

        Raises:
            ValueError: one of them is missing.
        """
        folder = fetch(path_or_name)
        config, weights = (_content(folder, name) for name in _FILES)
        return AdapterFiles(config, weights, where=path_or_name)

    def write(self, folder: str) -> None:
        """Write them into a folder."""
        for name, content in zip(_FILES, (self.config, self.weights)):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)

    @property
    def named(self) -> str:
        """What messages call the adapter."""
        return self.where or "The adapter that was sent"

    @property
    def weights_file(self) -> str:
        """What messages call its weights."""
        return os.path.join(self.where, SAFETENSORS_WEIGHTS_NAME)

    @property
    def fingerprint(self) -> str:
        """A digest of both files: equal files have the same in every folder and process, and if they are sent."""
        digest = hashlib.sha256(self.config)
        digest.update(self.weights)
        return digest.hexdigest()[:32]

    def parsed_config(self) -> LoReftConfig:
        """Read the config.

        Raises:
            ValueError: it is damaged, of another method, or has fields that cannot be used.
        """
        try:
            fields = json.loads(self.config)
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object, found {type(fields).__name__}")
        except ValueError as error:
            raise ValueError(f"{os.path.join(self.where, CONFIG_NAME)} cannot be used: {error}") from error
        if fields.get("peft_type") != "LOREFT":
            raise ValueError(f"{self.named} holds an adapter of type {fields.get('peft_type')}, not of LoReFT.")
        fields.pop("runtime_config", None)  # how another machine runs it
        try:
            config: LoReftConfig = LoReftConfig.from_peft_type(**fields)
        except (ValueError, TypeError, KeyError) as error:  # of PEFT, or of a field
            raise ValueError(f"{os.path.join(self.where, CONFIG_NAME)} cannot be used: {error}") from error
        return config

    def parsed_weights(self) -> dict[str, Tensor]:
        """Read the tensors.

        Raises:
            ValueError: they are damaged, or no safetensors. Nothing is unpickled.
        """
        try:
            return load(self.weights)
        except SafetensorError as error:  # the reader's own error names no file
            raise ValueError(f"{self.weights_file} is damaged or cut short ({error}). Copy it again.") from error


Source = str | AdapterFiles
"""Where an adapter comes from: a folder or a name on the Hub; or its files themselves."""

Message = str | Sequence[bytes]
"""A source on its way between processes."""


def to_message(source: Source) -> Message:
    """Prepare a source for its way to another process."""
    return source if isinstance(source, str) else [source.config, source.weights]


def from_message(message: Message) -> Source:
    """The inverse of `to_message`."""
    return message if isinstance(message, str) else AdapterFiles(*message)


def path_of(source: Source) -> str:
    """The folder or the name on the Hub; `SENT` for files that were sent."""
    return source if isinstance(source, str) else SENT


def is_loreft(path_or_name: str) -> bool:
    """Whether this is a LoReFT adapter: a folder, or a name on the Hub, whose config says so."""
    try:
        folder = local_folder(path_or_name, [CONFIG_NAME])
        with open(os.path.join(folder, CONFIG_NAME), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):  # the errors of the Hub are OSErrors; whoever loads it will say what is wrong
        return False
    return isinstance(config, dict) and config.get("peft_type") == "LOREFT"


def read_facts(path_or_name: str) -> Facts:
    """What must be known of an adapter without its weights.

    Raises:
        ValueError: this is no LoReFT adapter.
    """
    files = AdapterFiles.read(path_or_name)
    return Facts.of(files.parsed_config(), files.fingerprint)


def fetch(path_or_name: str) -> str:
    """The local folder of an adapter. Raises ValueError if a file is missing, and names that file."""
    folder = local_folder(path_or_name, _FILES)
    for name in _FILES:
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{path_or_name} has no {name}: it is no adapter that `save_pretrained` wrote.")
    return folder


def fetch_early(source: Source) -> None:
    """Download an adapter from the Hub before a worker loads it: while one loads, no request goes on."""
    if isinstance(source, str):
        with suppress(Exception):  # the worker will say what is wrong
            fetch(source)


def fingerprint(folder: str) -> str:
    """The fingerprint of the adapter in a folder (`AdapterFiles.fingerprint`)."""
    return AdapterFiles.read(folder).fingerprint


def _content(folder: str, name: str) -> bytes:
    with open(os.path.join(folder, name), "rb") as file:
        return file.read()
