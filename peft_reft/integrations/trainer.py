"""Under an unchanged Trainer: find the marks of the chat template, log the first row, pass on edit norms.

When a Trainer is made, transformers makes an object of each class in its list of default callbacks and hands it the
model and the tokenizer. `add_default_callbacks` puts classes on that list when an adapter is added to a model, which
is before the Trainer is made, or within.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from ..config import LoReftConfig
from ..positions.chat.template import find_marks
from ..positions.rollouts import Rollouts
from ..tools.chat import loreft_configs, set_marks, warn_of_limits
from ..tools.collator import DataCollatorForLoReft
from .cards import CompleteCards
from .first_forwards import FirstForwards, attachment_of
from .not_learning import WarnIfNotLearning
from .trainer_checks import CheckGradients, refuse_merged_rollouts, refuse_packing


class FindMarksAndLogFirstRow(TrainerCallback):
    """Sets the marks of adapters that have none, logs the first row, and notes if no document has a mark."""

    def __init__(self) -> None:
        self.found: list[str] = []
        """Names of the adapters whose marks this callback has set."""
        self.without_template: list[str] = []
        """Names of the adapters without marks whose tokenizer has no chat template."""
        self.first_forwards: FirstForwards | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set the marks of adapters that have none.

        Raises:
            ValueError: rollouts would need a merge that is not possible (`trainer_checks`).
        """
        tokenizer = kwargs.get("processing_class")
        attachment = attachment_of(model)
        if attachment is not None and model is not None:
            refuse_merged_rollouts(args, model, list(loreft_configs(model)))
        if attachment is None or not attachment.has_answers or tokenizer is None:
            return
        unmarked = [name for name, config in loreft_configs(model).items() if config.response_template is None]
        if not unmarked:
            return
        found = find_marks(tokenizer)
        if found is None:
            self.without_template = unmarked
        elif found.problem is not None:
            warnings.warn(
                "LoReFT cannot find the headers of the chat template, so only the labels say where prompts end: "
                f"{found.problem} Give `response_template` and `instruction_template` in the config if you train on "
                "chats.",
                stacklevel=2,
            )
        else:
            warn_of_limits(found)
            self.found = set_marks(model, found.response_template, found.instruction_template, unmarked)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check how rows are packed, hand the marks to the collator, and watch the first forwards."""
        attachment = attachment_of(model)
        tokenizer = kwargs.get("processing_class")
        if attachment is None or tokenizer is None:
            return
        configs = list(loreft_configs(model).values())
        if not configs:
            return
        for config in configs:
            refuse_packing(args, config)
        first = configs[0]
        give_marks_to_collator(kwargs.get("train_dataloader"), first)
        self.first_forwards = FirstForwards(
            attachment,
            getattr(tokenizer, "tokenizer", tokenizer),  # a processor has a tokenizer
            first,
            [*self.found, *self.without_template],
            logs=state.is_world_process_zero,
        )
        attachment.first_batch = self.first_forwards
        rolls_out = hasattr(args, "num_generations")  # GRPO, RLOO and their kin
        attachment.rollouts = Rollouts() if rolls_out and attachment.has_answers else None

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Drop what training kept of shared beginnings. If no document had a mark, say so in the config (`[]`)."""
        attachment = attachment_of(model)
        if attachment is not None:
            attachment.first_batch = attachment.rollouts = None
            attachment.beginnings.clear()
        if self.first_forwards is not None and (names := self.first_forwards.adapters_without_marks()):
            set_marks(model, [], [], names)
        self.first_forwards = None


class AddEditNorms(TrainerCallback):
    """Adds the norms that `edit_norms.LogEditNorms` measured to the logs that have the loss.

    Callbacks of a user come behind those that report to TensorBoard and the like. This one comes before them, as all
    default callbacks do.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        attachment = attachment_of(model)
        if attachment is None or logs is None or "loss" not in logs:
            return
        logs.update(attachment.edit_norms)
        state.log_history[-1].update(attachment.edit_norms)  # the Trainer copied the logs before it called this
        attachment.edit_norms = {}


def give_marks_to_collator(dataloader: Any, config: LoReftConfig) -> None:
    """Write the marks of `config` into the config of a `DataCollatorForLoReft`, if that one has none.

    The collator may have been made with a config of its own, before the marks were found.
    """
    collator = getattr(dataloader, "collate_fn", None)
    while collator is not None and not isinstance(collator, DataCollatorForLoReft):
        collator = getattr(collator, "data_collator", None)  # transformers wraps collators (RemoveColumnsCollator)
    if collator is not None and collator.config.response_template is None:
        collator.config.response_template = config.response_template
        collator.config.instruction_template = config.instruction_template


def add_default_callbacks() -> None:
    """Have every Trainer that is made from now on call the callbacks of this package. A second call does nothing."""
    from transformers import trainer

    # Compared by name, because a reloaded module has new classes.
    names = {callback.__name__ for callback in trainer.DEFAULT_CALLBACKS if isinstance(callback, type)}
    for callback in (FindMarksAndLogFirstRow, CheckGradients, CompleteCards, AddEditNorms, WarnIfNotLearning):
        if callback.__name__ not in names:
            trainer.DEFAULT_CALLBACKS.append(callback)
