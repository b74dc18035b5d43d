"""Under a Trainer: log how much each edited module changes its hidden states, beside the loss."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import DefaultFlowCallback

from ..tools.norms import watch_norms
from ..tuner.forward import current
from ..tuner.layer import CHILD, LoReftLayer
from .first_forwards import attachment_of


class LogEditNorms(TrainerCallback):
    """Logs ‖Φ(h) − h‖ / ‖h‖ of each edited module beside the loss, to whatever the Trainer reports to.

    The number of a module is the mean over all tokens that it edited in the training forwards of one step: the step at
    which the Trainer logs, with all its micro-batches. Dropout of edits is in it. The key is `edit_norm/` and the
    module's name; TensorBoard and W&B show it as `train/edit_norm/model.layers.0`. A module that edited no token of
    the step has no number.

    The forwards are watched at these steps alone, and give the same weights as without this callback. Only with
    `logging_strategy="epoch"` every step is watched. In a run of several processes the numbers are those of the main
    process.

    Raises:
        ValueError: the model has no LoReFT adapter, or `torch_compile=True`, when training begins.

    Examples:
        >>> from peft_reft.integrations.edit_norms import LogEditNorms
        >>> trainer = SFTTrainer(..., callbacks=[LogEditNorms()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        """Of the hooks, while a step is watched."""
        self.sums: dict[str, Tensor] = {}
        """By module: the sum of the norms of its edited tokens. A scalar, on the module's device."""
        self.counts: dict[str, Tensor] = {}
        """By module: how many tokens it edited."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot be watched."""
        self._stop()
        if attachment_of(model) is None:
            raise ValueError(f"LogEditNorms: {type(model).__name__} has no LoReFT adapter. Leave the callback out.")
        if args.torch_compile:
            raise ValueError(
                "LogEditNorms cannot look into a compiled forward: torch_compile=True. Leave one of the two out."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the step if it will be logged."""
        self._stop()
        if not _will_be_logged(args, state):
            return
        names = _names_of_layers(model)

        def take(layer: LoReftLayer, norms: Tensor) -> None:
            forward = current(layer.attachment)
            if forward is not None and forward.in_training:
                self._add(names[layer], norms)

        self.handles = watch_norms(list(names), take)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hand the means to `trainer.AddEditNorms`, which adds them to the logs."""
        if not self.handles:
            return
        attachment = attachment_of(model)
        assert attachment is not None
        norms: dict[str, float] = {}
        for name, total in self.sums.items():
            if self.counts[name] > 0:
                norms[f"edit_norm/{name}"] = (total / self.counts[name]).item()
        attachment.edit_norms = norms
        if not norms:
            warnings.warn(
                f"LogEditNorms has nothing to log: no layer was seen to edit a token in step {state.global_step}.",
                stacklevel=2,
            )
        self._stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks out if the last step was interrupted."""
        self._stop()

    def _add(self, name: str, norms: Tensor) -> None:
        """Count the tokens of one forward. With activation checkpointing each counts twice, which leaves the mean.

        Args:
            name: of the module.
            norms: (batch, seq), NaN at a token that is not edited.
        """
        edited = ~norms.isnan()  # (batch, seq)
        self.sums[name] = self.sums.get(name, 0) + norms.nansum()
        self.counts[name] = self.counts.get(name, 0) + edited.sum()

    def _stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.sums, self.counts = [], {}, {}


def _will_be_logged(args: Any, state: Any) -> bool:
    """Whether the Trainer will log the step that begins. By epoch nobody knows, so the answer is yes."""
    if args.logging_strategy == "epoch":
        return True
    after = copy.copy(state)
    after.global_step += 1
    control: TrainerControl = DefaultFlowCallback().on_step_end(args, after, TrainerControl())
    return bool(control.should_log)


def _names_of_layers(model: nn.Module) -> dict[LoReftLayer, str]:
    """The LoReFT layers of a model, each with the name that its module has in the base model."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, LoReftLayer):
            names[module] = name.removeprefix("base_model.model.").removesuffix(f".{CHILD}")
    return names
