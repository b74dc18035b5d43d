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

    Optional where the model's forward sees the labels: it then derives the very same positions itself. Needed where
    labels do not reach it (label smoothing, `compute_loss_func`). It also spares an accelerator one wait a step, and
    shows wrong data before it reaches the model.

    Args:
        base_collator: any collator that returns a mapping with `input_ids` (batch, seq); `labels` or TRL's
            `completion_mask`, `attention_mask` and `position_ids` are used where present.
        config: the adapter's config.

    Returns (when called):
        The batch with `intervention_positions`: int64 (batch, n), columns of the tokens to edit, -1 where a slot is
        empty. Slots stand in the order of the groups of `config.layout`; of a row with several answers (packed
        documents, multi-turn chats) one answer after the other; each open-ended group (`p`, `g`) follows with one slot
        a column. Where examples have `subspaces`, a list of row indices of R each, also these: int64 (batch, m), -1
        where a row has fewer. An example's edits, and their gradients, then stay within those rows of R.

    Raises:
        ValueError: no row has a token to edit, or a packed row starts in the middle of a document.

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
        subspaces = None
        rows = examples if isinstance(examples, list | tuple) else []
        if any(isinstance(row, Mapping) and SUBSPACES in row for row in rows):
            subspaces = check_subspaces([list(row[SUBSPACES]) for row in rows])
            examples = [{name: v for name, v in row.items() if name != SUBSPACES} for row in rows]
        batch = self.base_collator(examples, *args, **kwargs)
        batch[POSITIONS] = self._positions(batch)
        if subspaces is not None:
            batch[SUBSPACES] = subspaces
        return batch

    def _positions(self, batch: Any) -> Tensor:
        has_answers = self._has_answers()
        marks = Marks.of(self.config.response_template, self.config.instruction_template)
        read = Batch.read(batch, batch["input_ids"], has_answers)
        source = FromBatch(read, has_answers, training=read.labels is not None)
        return source.slots(Wanted(self.config.layout, marks, self.config.edits_everything))

    def _has_answers(self) -> bool:
        """Whether rows hold prompt and answer. A label of token classification is one a token, too."""
        if self.config.task_type is not None:
            return self.config.task_type == TaskType.CAUSAL_LM
        if self.config.has_answers is None:
            raise ValueError(
                "task_type=None: the collator cannot tell whether labels mark answers (causal language models) or are "
                "classes of tokens. Set task_type in the config, such as 'CAUSAL_LM', or add the adapter to its model "
                "before the first batch is made."
            )
        return self.config.has_answers

    def __getattr__(self, name: str) -> Any:
        """Anything else is the wrapped collator's: trainers read options such as `padding_free` on it ..."""
        if name == "base_collator" or name.startswith("__"):  # copying and unpickling ask before it is there
            raise AttributeError(name)
        return getattr(self.base_collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """... and set them."""
        if name in ("base_collator", "config"):
            super().__setattr__(name, value)
        else:
            setattr(self.base_collator, name, value)
