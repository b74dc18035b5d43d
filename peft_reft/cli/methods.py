"""The commands that train: which trainer of TRL each of them runs, and what its rows must have."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Method:
    """A command that trains as one of TRL's scripts does."""

    script: str
    """The script in `trl.scripts`. Its parser says which dataclasses hold its arguments."""
    trainer: str
    """The class in `trl` that trains."""
    columns: tuple[tuple[str, ...], ...] = ()
    """Sets of columns: rows must have all columns of one of them. (): `rows.check_columns` knows better."""
    of_script: tuple[str, ...] = ()
    """The arguments of this script alone that are used here."""
    needed: dict[str, str] = field(default_factory=dict)
    """Arguments that people need beside those that all commands have, and what the help says of them."""
    task_type: str = "CAUSAL_LM"

    def dataclasses(self) -> tuple[Any, Any, Any, Any]:
        """TRL's classes of arguments: of the script, the trainer, the model, and mixtures of data sets."""
        script: Any = import_module(f"trl.scripts.{self.script}")
        of_script, of_trainer, of_model, of_mixture = script.make_parser().dataclass_types
        return of_script, of_trainer, of_model, of_mixture

    @property
    def has_completions(self) -> bool:
        """Whether a row may have a column of answers."""
        return not self.columns or any("completion" in each for each in self.columns)


_PAIRS = ("chosen", "rejected")
_REWARDS = ("reward_funcs", "reward_model_name_or_path")
_OF_REWARDS = {
    "reward_funcs": (
        "What gives rewards: names of functions. TRL's accuracy_reward, reasoning_accuracy_reward, "
        "think_format_reward, get_soft_overlong_punishment, or your own: my_file.my_function."
    ),
    "reward_model_name_or_path": "A reward model beside them, or instead: a folder or a name, also of an adapter.",
}

METHODS = {
    "train": Method("sft", "SFTTrainer"),
    "dpo": Method("dpo", "DPOTrainer", columns=(_PAIRS,), of_script=("ignore_bias_buffers",)),
    "kto": Method("kto", "KTOTrainer", columns=(("prompt", "completion", "label"), _PAIRS)),
    "reward": Method("reward", "RewardTrainer", columns=(_PAIRS,), task_type="SEQ_CLS"),
    "grpo": Method("grpo", "GRPOTrainer", columns=(("prompt",),), of_script=_REWARDS, needed=_OF_REWARDS),
    "rloo": Method("rloo", "RLOOTrainer", columns=(("prompt",),), of_script=_REWARDS, needed=_OF_REWARDS),
    "distillation": Method(
        "distillation",
        "DistillationTrainer",
        columns=(("prompt",),),
        needed={"teacher_model_name_or_path": "The model whose distribution is learnt: a folder, or a name."},
    ),
}
"""The commands by name."""
