"""The model cards that trainers write. transformers has no hook for them: `patching.py` lists what is wrapped."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from ..card import complete_cards_of_trainers
from .first_forwards import config_says_what_was_seen


class CompleteCards(TrainerCallback):
    """Has the cards of trainers completed, once a Trainer is made: before, TRL may not have been imported."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the methods that write cards."""
        complete_cards_of_trainers(Trainer, config_says_what_was_seen)
