"""Under an unchanged Trainer: warn if the run does not learn, and say what to change."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from ..tools.looking import without_edits
from ..tuner.layer import LoReftLayer
from .first_forwards import attachment_of
from .learning import Verdict, judge, judge_classes, judge_finite
from .trainer_checks import WITHOUT_GRAD

_READ_EVERY = 64
"""Steps whose losses are read from the device at once: reading each would make the device wait."""
_KEPT = 4
"""Forwards whose inputs are kept, to run them once more without the edits."""
_LARGEST = 2**20
"""Most elements of a tensor that is kept."""
_GAIN = 0.02
"""Edits that lower the loss of these forwards by this share have learned something, whatever the losses say."""
_SAME = 0.1
"""The Trainer's mean loss may differ from what was seen by this share: other processes have other rows."""


class WarnIfNotLearning(TrainerCallback):
    """Watches the losses that the model itself computes from labels, and warns at the end of a run that did not learn.

    It warns in the middle only of a loss that is not finite any more. It says nothing of

    - a run that goes on from a checkpoint, or with an adapter that edits already: what was learnt before is not known;
    - a trainer that computes its own loss (preferences, rewards): the model is given no labels, or the Trainer logs
      another loss than the model's;
    - a compiled model, and one in `nn.DataParallel`, into which no hook can look; a model whose weights are spread
      over processes (FSDP, DeepSpeed), which one process cannot run alone.

    `learning.judge` says what counts as learning. Where it finds none, the last training forwards are run once more,
    with the edits and without. If they lower the loss, the run did learn, whatever its losses look like.
    """

    def __init__(self) -> None:
        self.starts_fresh = False
        self.handle: RemovableHandle | None = None
        self._reset()

    def _reset(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        self.pending: list[Tensor] = []
        """Losses of the forwards since the last optimizer step; scalars on the device."""
        self.steps: list[Tensor] = []
        """Losses of the steps that were not read yet."""
        self.losses: list[float] = []
        self.classes: list[tuple[Tensor, Tensor]] = []
        """Classes that rows have and got, (batch,) each, which were not read yet."""
        self.kept: list[dict[str, Any]] = []
        """Inputs of the last forwards."""
        self.given: Counter[int] = Counter()
        self.guessed: Counter[int] = Counter()
        self.counts_classes = False
        self.warned = False

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See whether the adapter edits already. It is seen here, before the weights may be spread over processes."""
        self.starts_fresh = attachment_of(model) is not None and not _edits(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the forwards of a run that begins at its beginning."""
        self._reset()
        watches = self.starts_fresh and state.is_world_process_zero and state.global_step == 0
        self.starts_fresh = False  # a second run goes on from this one
        is_spread = any(os.environ.get(name, "false").lower() == "true" for name in WITHOUT_GRAD)
        if watches and not args.torch_compile and args.n_gpu <= 1 and not is_spread:
            self.handle = model.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, by_place: tuple[Any, ...], given: dict[str, Any], outputs: Any) -> None:
        if torch.compiler.is_compiling() or by_place or not module.training or not torch.is_grad_enabled():
            return
        loss = getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        self.pending.append(loss.detach().float().reshape(()))
        self.kept = [*self.kept[1 - _KEPT :], given]
        logits: Any = getattr(outputs, "logits", None)
        labels: Any = given.get("labels")
        if self.counts_classes and _are_of_a_classifier(logits, labels):
            self.classes.append((labels, logits.detach().argmax(-1)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the loss of the step; now and then read those that were noted."""
        if self.handle is None:
            return
        if self.pending:
            self.steps.append(torch.stack(self.pending).sum())
            self.pending = []
        warmup = args.get_warmup_steps(state.max_steps)
        self.counts_classes = state.global_step >= warmup + 0.75 * (state.max_steps - warmup)
        if len(self.steps) < _READ_EVERY:
            return
        self._read()
        broken = judge_finite(self.losses)
        if broken is not None and not self.warned:
            self.warned = True
            _warn(broken, args.learning_rate)

    def _read(self) -> None:
        if self.steps:
            self.losses += torch.stack(self.steps).tolist()
        for labels, guesses in self.classes:
            self.given.update(labels.tolist())
            self.guessed.update(guesses.tolist())
        self.steps, self.classes = [], []

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Judge the run, and warn of it if it did not learn."""
        if self.handle is None:
            return
        self.handle.remove()
        self._read()
        verdict = self._judge(args, state)
        if verdict is not None and (not verdict.needs_a_look or self._edits_gain_nothing(model)):
            _warn(verdict, args.learning_rate)
        self._reset()

    def _judge(self, args: Any, state: Any) -> Verdict | None:
        broken = judge_finite(self.losses)
        if broken is not None:
            return None if self.warned else broken
        scale = self._scale(args, state)
        if scale is None:
            return None
        losses = [loss * scale for loss in self.losses]
        warmup = args.get_warmup_steps(state.max_steps)
        return judge(losses, warmup) or judge_classes(losses, warmup, self.given, self.guessed)

    def _edits_gain_nothing(self, model: nn.Module) -> bool:
        """Whether the last forwards have the same loss without the edits; False if that cannot be seen."""
        if any(isinstance(each, Tensor) and each.numel() > _LARGEST for given in self.kept for each in given.values()):
            return False
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                after = sum(float(model(**given).loss) for given in self.kept)
                with without_edits(model):
                    before = sum(float(model(**given).loss) for given in self.kept)
        except Exception:  # the run has ended and is perhaps not saved yet: a look at it must not break it
            return False
        finally:
            model.train(was_training)
        return before - after < _GAIN * abs(before)

    def _scale(self, args: Any, state: Any) -> float | None:
        """What makes the mean loss of the Trainer of what was seen; None if the Trainer trained on another loss.

        Some models are told how many tokens the step has, so that the losses of its forwards add up to the mean. Those
        of others have to be divided by the number of forwards.
        """
        logged = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
        if not logged or not self.losses:
            return None
        mean = sum(self.losses) / len(self.losses)
        one = 1 / args.gradient_accumulation_steps
        for scale in (1.0, one, args.world_size, args.world_size * one):
            if abs(mean * scale - logged[-1]) <= _SAME * abs(logged[-1]):
                return scale
        return None


def _warn(verdict: Verdict, rate: float) -> None:
    if verdict.rate_is_too_high:
        advice = f"Lower the learning rate, {rate:.2g}, to a third: {rate / 3:.2g}."
    else:
        advice = f"Raise the learning rate, {rate:.2g}, about threefold: {3 * rate:.2g}."
    warnings.warn(f"LoReFT: this run does not learn: {verdict.why}. {advice}", stacklevel=2)


def _edits(model: nn.Module) -> bool:
    """Whether an edit is not 0, as after training. What a vector b adds is 0 in an adapter that starts as the base."""
    sums = []
    for module in model.modules():
        if isinstance(module, LoReftLayer):
            for name, parameter in module.named_parameters():
                if name.endswith(".b") and not parameter.is_meta:
                    sums.append(parameter.detach().abs().sum().float().cpu())
    return bool(sums) and bool(torch.stack(sums).sum() != 0)


def _are_of_a_classifier(logits: Any, labels: Any) -> bool:
    """Whether these are scores (batch, classes) and one class for each row."""
    return (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.ndim == 2
        and logits.shape[-1] > 1
        and labels.ndim == 1
        and not labels.is_floating_point()
        and len(labels) == len(logits)
    )
