"""The commands that train a LoReFT adapter as TRL's scripts train: `train`, `dpo`, `kto`, `reward`, `grpo` ..."""

from __future__ import annotations

import signal
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import get_quantization_config

from ..config import LoReftConfig
from ..integrations.trl import rollouts_in_vllm
from .arguments import check_path
from .data import training_data
from .methods import METHODS, Method
from .rewards import rewards_of
from .rows import Rows
from .train_arguments import parse


def main(command: str, words: list[str]) -> int:
    """Train, save, and push if asked to.

    Args:
        command: one of `METHODS`.
        words: the command line behind `peft-reft COMMAND`.

    Returns:
        The exit code: 0; 130 if the run was interrupted, which leaves a checkpoint.
    """
    method = METHODS[command]
    data, args, model, mixture, config = parse(command, words)
    check_path(model.model_name_or_path)
    more = _more(method, data, args, model)
    train_rows, test_rows = training_data(method, data, mixture, args)
    if getattr(args, "use_vllm", False):
        rollouts_in_vllm()
    stop = SaveOnInterrupt()
    trainer = make_trainer(method, model, args, train_rows, test_rows, config, [stop], **more)
    if getattr(data, "ignore_bias_buffers", False):  # TRL's script for DPO does so
        masks = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = masks
    dropped = _dropped(train_rows, trainer.train_dataset, args, "training")
    dropped += _dropped(test_rows, trainer.eval_dataset, args, "evaluation")
    if trainer.is_world_process_zero():
        print(dropped, end="")
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    if stop.interrupted:
        step = trainer.state.global_step
        print(f"Stopped after step {step}. Go on with the same command and --resume_from_checkpoint true.")
        return 130
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    if trainer.is_world_process_zero():
        print(f"Saved to {args.output_dir}. {_how_to_ask(args.output_dir, trainer.model.peft_config['default'])}")
    return 0


def make_trainer(
    method: Method,
    model: Any,
    args: Any,
    train_rows: Rows,
    test_rows: Rows | None,
    config: LoReftConfig,
    callbacks: list[TrainerCallback],
    **more: Any,
) -> Any:
    """TRL's trainer with a freshly loaded model and a new adapter. The commands that train, and `sweep`, train by it.

    Args:
        method: says which trainer.
        model: the arguments for the model.
        args: the trainer's config; it is changed.
        train_rows: the rows to train on.
        test_rows: those to evaluate on; None: no evaluation.
        config: of the adapter.
        callbacks: more callbacks.
        more: what the trainer of this method takes besides.
    """
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    return getattr(trl, method.trainer)(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        quantization_config=get_quantization_config(model),
        peft_config=config,
        callbacks=callbacks,
        **more,
    )


def _more(method: Method, data: Any, args: Any, model: Any) -> dict[str, Any]:
    """What the trainer of a method takes beside model, rows and arguments.

    Raises:
        ValueError: it is missing, or cannot be found.
    """
    if "reward_funcs" in method.of_script:
        return {"reward_funcs": rewards_of(data)}
    if "teacher_model_name_or_path" in method.needed:
        if args.teacher_model_name_or_path is None:
            raise ValueError("--teacher_model_name_or_path is missing: a folder, or a name on the Hub.")
        check_path(args.teacher_model_name_or_path)
        args.teacher_model_init_kwargs = {
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
            **(args.teacher_model_init_kwargs or {}),
        }
        return {"teacher_model": args.teacher_model_name_or_path}
    return {}


def _dropped(given: Rows | None, kept: Any, args: Any, purpose: str) -> str:
    """A line that counts the rows that TRL has dropped for their length. "" if none was.

    SFT, DPO and KTO drop those whose prompt alone fills `max_length`, a reward model's training those that are longer.
    Rows that are streamed, or packed, cannot be counted.

    Raises:
        ValueError: no row is left.
    """
    if not isinstance(given, Dataset) or not isinstance(kept, Dataset) or getattr(args, "packing", False):
        return ""
    expected = len(given)
    if isinstance(args, trl.KTOConfig) and "chosen" in given.column_names:
        expected *= 2  # TRL makes two rows of a pair
    if expected == len(kept):
        return ""
    reason = f"nothing of their answers is within the first {args.max_length} tokens"
    if isinstance(args, trl.RewardConfig):
        reason = f"they are longer than {args.max_length} tokens"
    line = f"Dropped {expected - len(kept)} of {expected} rows for {purpose}: {reason} (--max_length)."
    if not len(kept):
        raise ValueError(f"{line} None is left. Give a higher --max_length.")
    return f"{line}\n"


def _checkpoint(args: Any) -> Any:
    """What `Trainer.train` takes for `--resume_from_checkpoint`: True is the newest checkpoint, a text is a folder."""
    value = args.resume_from_checkpoint
    word = str(value).lower()
    return word == "true" if word in ("true", "false") else value


def _how_to_ask(folder: str, config: LoReftConfig) -> str:
    """The command that asks the trained adapter, and in which form it asks."""
    if config.task_type == "SEQ_CLS":
        return f"Use it: peft-reft grpo --reward_model_name_or_path {folder} ..."
    command = f"Ask it: peft-reft generate {folder} 'A prompt'"
    if config.response_template is None:
        return command
    form = "in the chat template" if config.response_template else "with the prompt as it is, without a chat template"
    return f"{command}\n(`generate` asks as the training data did: {form}.)"


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C lets the current step end, saves a checkpoint and stops the run. A second Ctrl-C stops it at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous_handler: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous_handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nSaving a checkpoint after this step; once more to stop at once.", flush=True)
