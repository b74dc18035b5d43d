"""The moments at which a card is saved beside a LoReFT adapter, or by a Trainer that trains one.

`push_to_hub` and trainers write a card of their own over the one that `save_pretrained` made. So every such card is
completed, whoever saves it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from huggingface_hub import RepoCard, get_full_repo_name
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from ..patching import wrap
from .names import Destination, pushing_to
from .page import write_model_card

if TYPE_CHECKING:
    from ..config import LoReftConfig

WhileSaving = Callable[[Any], AbstractContextManager[None]]
"""Takes a trainer, and returns a context."""


def complete_all_cards() -> None:
    """Put our parts into every card that is saved beside a LoReFT adapter. Calling it again is harmless."""
    wrap(RepoCard, "save", _save_card)
    wrap(PeftModel, "push_to_hub", _push)
    wrap(PreTrainedModel, "push_to_hub", _push)


def complete_cards_of_trainers(trainer_class: type, while_saving: WhileSaving) -> None:
    """Put our parts into the cards that trainers of LoReFT adapters write. Calling it again is harmless.

    Args:
        trainer_class: transformers' Trainer. Its subclasses are included: TRL's trainers write cards of their own.
        while_saving: takes a trainer; the adapter and its card are saved inside the context that it returns.
    """
    wrappers: dict[str, Callable[..., None]] = {"create_model_card": _create_card, "save_model": _save_model}
    for owner in _with_subclasses(trainer_class):
        for name in wrappers.keys() & vars(owner).keys():
            wrap(owner, name, partial(wrappers[name], while_saving))


def _with_subclasses(owner: type[Any]) -> Iterator[type[Any]]:
    yield owner
    for subclass in owner.__subclasses__():
        yield from _with_subclasses(subclass)


def _save_card(save: Callable[..., Any], card: RepoCard, filepath: Any, *args: Any, **kwargs: Any) -> None:
    """Do what `RepoCard.save` does, then complete the card if it lies beside a LoReFT adapter."""
    save(card, filepath, *args, **kwargs)
    directory, filename = os.path.split(filepath)
    if filename == "README.md" and _has_loreft(directory):
        from ..config import LoReftConfig  # here, because `config` imports this room: it writes the card on saving

        write_model_card(directory, LoReftConfig.from_pretrained(directory))


def _has_loreft(directory: str) -> bool:
    try:
        with open(os.path.join(directory, CONFIG_NAME)) as file:
            return bool(json.load(file).get("peft_type") == "LOREFT")
    except (OSError, ValueError):
        return False


def _push(push: Callable[..., Any], model: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Do what `push_to_hub` does, with the repository's name in the card."""
    if not _loreft_configs(model):
        return push(model, repo_id, *args, **kwargs)
    repository = repo_id if "/" in repo_id else get_full_repo_name(repo_id, token=kwargs.get("token"))
    subfolders = tuple(name for name in model.peft_config if name != "default") if isinstance(model, PeftModel) else ()
    with pushing_to(Destination(repository, kwargs.get("revision"), subfolders)):
        return push(model, repo_id, *args, **kwargs)


def _create_card(
    while_saving: WhileSaving, create: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any
) -> None:
    """Do what `Trainer.create_model_card` does, then complete the card if the model has a LoReFT adapter."""
    with while_saving(trainer), pushing_to(_destination_of(trainer)):
        create(trainer, *args, **kwargs)
        _complete(trainer, trainer.args.output_dir)


def _save_model(
    while_saving: WhileSaving,
    save: Callable[..., Any],
    trainer: Any,
    output_dir: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Do what `Trainer.save_model` does, then complete the card: the tokenizer is saved later than the adapter."""
    with while_saving(trainer), pushing_to(_destination_of(trainer)):
        save(trainer, output_dir, *args, **kwargs)
        _complete(trainer, output_dir or trainer.args.output_dir)


def _destination_of(trainer: Any) -> Destination | None:
    return Destination(trainer.hub_model_id) if trainer.hub_model_id else None


def _complete(trainer: Any, directory: str) -> None:
    """Complete the card in `directory`, if there is one and the trainer's model has a LoReFT adapter."""
    configs = _loreft_configs(trainer.accelerator.unwrap_model(trainer.model))
    if configs and trainer.args.should_save and os.path.isfile(os.path.join(directory, "README.md")):
        write_model_card(directory, configs[0])


def _loreft_configs(model: Any) -> list[LoReftConfig]:
    """The configs of a model's LoReFT adapters; empty for a model without adapters."""
    return [config for config in getattr(model, "peft_config", {}).values() if config.peft_type == "LOREFT"]
