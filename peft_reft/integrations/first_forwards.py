"""The inputs of the first training forwards: one row is logged, and all are read until one has a mark."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import LoReftConfig
from ..positions.batch import Batch
from ..positions.marks import Marks
from ..tools.chat import loreft_configs
from ..tools.show import marked_row
from ..tuner.forward import ATTRIBUTE, Attachment

logger = logging.getLogger("peft_reft")


class FirstForwards:
    """Called with the inputs of training forwards: logs the first row, and reads on until a row has a mark."""

    def __init__(
        self, attachment: Attachment, tokenizer: Any, config: LoReftConfig, names: list[str], logs: bool
    ) -> None:
        self.attachment = attachment
        self.tokenizer = tokenizer
        self.config = config
        self.marks = Marks.of(config.response_template, config.instruction_template)
        self.names = names
        """Of the adapters whose marks are not the user's own."""
        self.logs = logs
        """Whether this process logs the first row."""
        self.row_seen = False
        self.mark_seen = False

    def __call__(self, given: dict[str, Any]) -> None:
        """Look at the inputs of one forward.

        Args:
            given: the model's inputs by name; `input_ids` has the shape (batch, seq).
        """
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            self.attachment.first_batch = None
            return
        if self.logs and not self.row_seen:
            self._log_first_row({name: value for name, value in given.items() if value is not None})
        self.row_seen = True
        if self.attachment.has_answers and self.marks is not None and self.marks.response:
            # Without the labels: only marks count here.
            inputs = {"input_ids": ids, "attention_mask": given.get("attention_mask")}
            turns = Batch.read(inputs, ids, has_answers=True).turns(self.marks)
            self.mark_seen = self.mark_seen or bool(turns.marked.any())
        if self.mark_seen or not self.attachment.has_answers:
            self.attachment.first_batch = None  # there is nothing more to look for

    def adapters_without_marks(self) -> list[str]:
        """Names of the adapters whose marks stand in no row so far; empty before the first row."""
        return self.names if self.row_seen and not self.mark_seen else []

    def _log_first_row(self, given: dict[str, Any]) -> None:
        try:
            text = marked_row(self.tokenizer, given, self.config)
        except Exception as error:  # a row that cannot be shown must not end a training
            logger.info("The first row cannot be shown: %s", error)
            return
        _make_logs_visible()
        logger.info("LoReFT edits the tokens in brackets. The first row of this run:\n%s", text)


def _make_logs_visible() -> None:
    """Let the row go to standard error if the user has not set up logging."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


@contextmanager
def config_says_what_was_seen(trainer: Any) -> Iterator[None]:
    """Inside, configs say that the data has no chats (`[]`) if no row so far had a mark, as they will after training.

    It is for checkpoints. Outside, the configs keep the marks of the tokenizer's template: a later row may have them.
    The plans, by which training edits, keep them always.
    """
    attachment = attachment_of(trainer.model)
    watched = attachment.first_batch if attachment is not None else None
    names = watched.adapters_without_marks() if isinstance(watched, FirstForwards) else []
    configs = [config for name, config in loreft_configs(trainer.model).items() if name in names]
    kept = [(config.response_template, config.instruction_template) for config in configs]
    for config in configs:
        config.response_template, config.instruction_template = [], []
    try:
        yield
    finally:
        for config, (response_template, instruction_template) in zip(configs, kept):
            config.response_template, config.instruction_template = response_template, instruction_template


def attachment_of(model: nn.Module | None) -> Attachment | None:
    """The attachment of the base model inside `model`; None if no LoReFT adapter was added to it."""
    if model is None:
        return None
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            attachment: Attachment = module.__dict__[ATTRIBUTE]
            return attachment
    return None
