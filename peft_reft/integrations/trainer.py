"""Under an unchanged Trainer: the marks of the chat template are found, and one row is shown before hours are spent.

transformers makes an object of each class in its list of default callbacks whenever a Trainer is made, and hands it
the model and the tokenizer. So a class that is put there when an adapter is added to a model is in time for all.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..config import LoReftConfig
from ..positions.batch import Batch
from ..positions.chat.template import find_marks
from ..positions.marks import Marks
from ..tools.chat import loreft_configs, set_marks, warn_of_limits
from ..tools.collator import DataCollatorForLoReft
from ..tools.show import marked_row
from ..tuner.forward import ATTRIBUTE, Attachment
from .trainer_checks import TrainingChecks

logger = logging.getLogger("peft_reft")


class LoReftTraining(TrainerCallback):
    """Finds the marks, shows the first row of a run, and notes at its end if no document had a mark."""

    def __init__(self) -> None:
        self.found: list[str] = []
        """Adapters whose marks were set here."""
        self.unmarked: list[str] = []
        """Adapters that could have none: the tokenizer has no chat template."""
        self.watch: FirstRows | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set the marks of adapters that have none."""
        tokenizer = kwargs.get("processing_class")
        attachment = attachment_of(model)
        if attachment is None or not attachment.has_answers or tokenizer is None:
            return
        unknown = [name for name, config in loreft_configs(model).items() if config.response_template is None]
        if not unknown:
            return
        found = find_marks(tokenizer)
        if found is None:
            self.unmarked = unknown
        elif found.problem is not None:
            warnings.warn(
                "LoReFT cannot find the headers of the chat template, so it takes prompts from the labels alone: "
                f"{found.problem} Give `response_template` and `instruction_template` in the config if you train on "
                "chats.",
                stacklevel=2,
            )
        else:
            warn_of_limits(found)
            self.found = set_marks(model, found.response_template, found.instruction_template, unknown)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the first forwards."""
        attachment, tokenizer = attachment_of(model), kwargs.get("processing_class")
        configs = loreft_configs(model) if attachment is not None else {}
        if attachment is None or tokenizer is None or not configs:
            return
        for config in configs.values():
            refuse_packing(args, config)
        name = next(iter(configs))
        hand_marks_on(kwargs.get("train_dataloader"), configs[name])
        self.watch = FirstRows(
            attachment, getattr(tokenizer, "tokenizer", tokenizer), configs[name], state.is_world_process_zero
        )
        attachment.first_batch = self.watch

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """If no document of the run had a mark, say so in the config: each document is one prompt and one answer."""
        attachment = attachment_of(model)
        if attachment is not None:
            attachment.first_batch = None
        if self.watch is not None and self.watch.seen and not self.watch.marked:
            set_marks(model, [], [], [*self.found, *self.unmarked])
        self.watch = None


def hand_marks_on(dataloader: Any, config: LoReftConfig) -> None:
    """Let a collator of ours, which may hold a config of its own, read batches by the marks that were found."""
    collator = getattr(dataloader, "collate_fn", None)
    while collator is not None and not isinstance(collator, DataCollatorForLoReft):
        collator = getattr(collator, "data_collator", None)  # transformers' RemoveColumnsCollator
    if collator is not None and collator.config.response_template is None:
        collator.config.response_template = config.response_template
        collator.config.instruction_template = config.instruction_template


def refuse_packing(args: Any, config: LoReftConfig) -> None:
    """Refuse TRL's ways of packing that cut documents, for specs that count from a document's beginning.

    Raises:
        ValueError: names the setting, the spec, and what to use. Cut beginnings (`keep_end`), which do no harm where
            no row is that long, are warned of.
    """
    strategy = getattr(args, "packing_strategy", None) if getattr(args, "packing", False) else None
    groups = [group for group in config.layout if group.counts_from_beginning]
    if strategy in ("wrapped", "bfd_split") and groups and not config.edits_everything:
        raise ValueError(
            f"packing_strategy={strategy!r} cuts documents, so a row starts in the middle of a document, where "
            f"{'+'.join(map(str, groups))} of positions={config.positions!r} would edit other tokens than `generate` "
            "does. Keep documents whole: packing_strategy='bfd'."
        )
    if getattr(args, "truncation_mode", None) == "keep_end" and getattr(args, "max_length", None) and groups:
        warnings.warn(
            f"LoReFT: truncation_mode='keep_end' cuts the beginning of documents longer than max_length="
            f"{args.max_length}, and {'+'.join(map(str, groups))} of positions={config.positions!r} then edits other "
            "tokens than `generate` does, which nothing in such a row shows. Use truncation_mode='keep_start', or "
            "leave long rows out.",
            stacklevel=2,
        )


class FirstRows:
    """Called with the inputs of training forwards: logs the first row, and looks for marks until one is found."""

    def __init__(self, attachment: Attachment, tokenizer: Any, config: LoReftConfig, shows: bool) -> None:
        self.attachment = attachment
        self.tokenizer = tokenizer
        self.config = config
        self.shows = shows
        self.seen = self.marked = False

    def __call__(self, given: dict[str, Any]) -> None:
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            self.attachment.first_batch = None
            return
        if self.shows and not self.seen:
            self._show({name: value for name, value in given.items() if value is not None})
        self.seen = True
        marks = Marks.of(self.config.response_template, self.config.instruction_template)
        if self.attachment.has_answers and marks is not None and marks.response:
            read = Batch.read({"input_ids": ids, "attention_mask": given.get("attention_mask")}, ids, True)
            self.marked = self.marked or bool(read.turns(marks).marked.any())
        if self.marked or not self.attachment.has_answers:
            self.attachment.first_batch = None

    def _show(self, given: dict[str, Any]) -> None:
        try:
            text = marked_row(self.tokenizer, given, self.config)
        except Exception as error:  # nobody's training ends because a row cannot be shown
            logger.info("The first row cannot be shown: %s", error)
            return
        _make_visible()
        logger.info("LoReFT edits the tokens in brackets. The first row of this run:\n%s", text)


def _make_visible() -> None:
    """Let the row be seen where nobody has said where logs go."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def attachment_of(model: nn.Module | None) -> Attachment | None:
    """The attachment of the base model inside `model`, or None."""
    modules = [] if model is None else model.modules()
    return next((module.__dict__[ATTRIBUTE] for module in modules if ATTRIBUTE in module.__dict__), None)


def add_default_callbacks() -> None:
    """Have every Trainer that is made from now on call the callbacks of this package. Calling it again is harmless."""
    from transformers import trainer

    for callback in (LoReftTraining, TrainingChecks):
        if all(each.__name__ != callback.__name__ for each in trainer.DEFAULT_CALLBACKS if isinstance(each, type)):
            trainer.DEFAULT_CALLBACKS.append(callback)
