"""`DataCollatorForLoReft`: wraps any collator and adds `intervention_positions` to its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft import TaskType
from torch import Tensor

from ..config import LoReftConfig
from ..positions.batch import POSITIONS, SUBSPACES, Batch
from ..positions.marks import Marks
from ..positions.sources import FromBatch, check_subspaces
from ..positions.wanted import Wanted


class DataCollatorForLoReft:
    """Adds the positions that LoReFT edits to the batches of another collator.

    It is optional if the model's forward sees the labels, because the forward then derives the same positions itself.
    It is needed if labels do not reach the forward (label smoothing, `compute_loss_func`). It also spares an
    accelerator one wait a step, and finds wrong data before the data reach the model.

    Calling it returns the batch of `base_collator` with one or two tensors more:

    - `intervention_positions`: int64 (batch, n), the columns of the tokens to edit, -1 in an empty slot. The slots
      stand in the order of the groups of `config.layout`. A row with several answers (packed documents, chats) has
      these slots once for each answer, one answer after the other. Each open-ended group (`p`, `g`) follows with one
      slot for each column.
    - `subspaces`, if the examples have them: int64 (batch, m), row indices of R, -1 if a row has fewer. An example
      gives them as a list. Its edits, and their gradients, stay within those rows of R.

    All other attributes are those of `base_collator`, to read and to set: trainers read and set options such as
    `padding_free`.

    Args:
        base_collator: any collator that returns a mapping with `input_ids` (batch, seq). `labels` or TRL's
            `completion_mask`, `attention_mask` and `position_ids` are used if they are there.
        config: the adapter's config.

    Raises:
        ValueError: when called, if no row has a token to edit, if a packed row starts in the middle of a document, or
            if the config does not say whether rows have answers.

    Examples:
        >>> import torch
        >>> from peft_reft import DataCollatorForLoReft, LoReftConfig
        >>> def collate(rows):
        ...     return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        >>> config = LoReftConfig(task_type="CAUSAL_LM", positions="f2+l2")
        >>> collator = DataCollatorForLoReft(collate, config)
        >>> row = {"input_ids": [5, 6, 7, 8, 9, 3], "labels": [-100, -100, -100, -100, -100, 3]}
        >>> collator([row])["intervention_positions"]
        tensor([[0, 1, 3, 4]])
    """

    def __init__(self, base_collator: Callable[..., Any], config: LoReftConfig) -> None:
        self.base_collator = base_collator
        self.config = config

    def __call__(self, examples: Any, *args: Any, **kwargs: Any) -> Any:
        examples, subspaces = _without_subspaces(examples)
        batch = self.base_collator(examples, *args, **kwargs)
        batch[POSITIONS] = self._positions(batch)
        if subspaces is not None:
            batch[SUBSPACES] = subspaces
        return batch

    def _positions(self, batch: Any) -> Tensor:
        """Return the slots of a batch, (batch, n) int64."""
        has_answers = self._has_answers()
        marks = Marks.of(self.config.response_template, self.config.instruction_template)
        read = Batch.read(batch, batch["input_ids"], has_answers)
        source = FromBatch(read, has_answers, training=read.labels is not None)
        return source.slots(Wanted(self.config.layout, marks, self.config.edits_everything))

    def _has_answers(self) -> bool:
        """Return whether rows hold prompt and answer. Labels do not say it: token classification has them, too."""
        if self.config.task_type is not None:
            return bool(self.config.task_type == TaskType.CAUSAL_LM)
        if self.config.has_answers is None:
            raise ValueError(
                "task_type=None: the collator cannot tell whether labels mark answers (causal language models) or are "
                "classes of tokens. Set task_type in the config, such as 'CAUSAL_LM', or add the adapter to its model "
                "before the first batch is made."
            )
        return self.config.has_answers

    def __getattr__(self, name: str) -> Any:
        """Read an attribute of the wrapped collator. Python asks here only for names that this object lacks."""
        if name == "base_collator" or name.startswith("__"):  # copy and unpickle ask before `base_collator` is set
            raise AttributeError(name)
        return getattr(self.base_collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the wrapped collator, but for the two that this object has itself."""
        if name in ("base_collator", "config"):
            super().__setattr__(name, value)
        else:
            setattr(self.base_collator, name, value)


def _without_subspaces(examples: Any) -> tuple[Any, Tensor | None]:
    """Take `subspaces` out of the examples, as a tensor (batch, m); None if no example has them."""
    rows = examples if isinstance(examples, list | tuple) else []
    if not any(isinstance(row, Mapping) and SUBSPACES in row for row in rows):
        return examples, None
    subspaces = check_subspaces([list(row[SUBSPACES]) for row in rows])
    others = []
    for row in rows:
        others.append({name: value for name, value in row.items() if name != SUBSPACES})
    return others, subspaces
