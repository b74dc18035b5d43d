"""The model card: the snippet that loads the adapter, its tags, its settings in words, its size.

`push_to_hub` and trainers write a card of their own over the one that `save_pretrained` made. Their card lacks the
import without which nobody can load the adapter. So every card that is saved beside a LoReFT adapter is completed,
whoever saves it (`complete_all_cards`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, RepoCard
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .edits.formulas import INTERVENTIONS
from .patching import wrap
from .positions.spec import Positions

if TYPE_CHECKING:
    from .config import LoReftConfig

_START, _END = "<!-- peft_reft: start -->", "<!-- peft_reft: end -->"
"""Our section stands between these two."""
_NEW_CARD = "---\nlibrary_name: peft\n---\n"
_TEMPLATE_MARK = "# Model Card for Model ID"
"""PEFT's template, which is all questions to be answered, has this title."""
_VERSIONS = "### Framework versions"
"""The last section of PEFT's template and of TRL's cards."""
_PIPELINE = "from transformers import pipeline\n"
_ASKED_IN_CHAT = 'generator([{"role": "user", "content": question}], '
_PIPELINE_OF_HUB_NAME = re.compile(r'pipeline\(.*model="([^"/]+/[^"/]+)"')
"""These three stand in the example of TRL's cards."""
_IMPORT = "import peft_reft  # makes the LOREFT method known to PEFT: pip install peft-reft\n"

_pushed_to: ContextVar[str | None] = ContextVar("_pushed_to", default=None)
"""The repository that the running `push_to_hub` writes to."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def describe(config: LoReftConfig) -> str:
    """Return one paragraph: formula, rank, modules, edited tokens."""
    tokens = f"Edited tokens: {_tokens(config)} (`positions={config.positions!r}`)."
    return f"{_formula(config)}, on {_modules(config)}. {tokens}"


def _formula(config: LoReftConfig) -> str:
    words = f"Formula `{config.intervention}`"
    if config.act_fn:
        words += f" with `act_fn={config.act_fn!r}`"
    if config.gate:
        words += ", gated"
    if INTERVENTIONS[config.intervention].has_rank:
        if isinstance(config.r, dict):
            words += f", rank {', '.join(f'{r} in layers {layers}' for layers, r in config.r.items())}"
        else:
            words += f", rank {config.r}"
    return words


def _modules(config: LoReftConfig) -> str:
    if not config.target_modules:
        layers = "all layers" if config.layers == "all" else f"layers {config.layers}"
        return f"the {config.component} output of {layers}"
    words = f"the output of modules {config.to_dict()['target_modules']}"
    if config.layers_to_transform is not None:
        words += f" in layers {config.layers_to_transform}"
    return words


def _tokens(config: LoReftConfig) -> str:
    if isinstance(config.positions, str):
        return Positions.parse(config.positions).describe()
    specs = [f"layers {layers}: {Positions.parse(spec).describe()}" for layers, spec in config.positions.items()]
    return "; ".join(specs)


def snippet(directory: str, config: LoReftConfig, name: str | None = None) -> str:
    """Return Python code that loads the adapter.

    Args:
        directory: the adapter's folder. Of its path only the last part is written: no path of this machine is
            published.
        config: the adapter's config.
        name: its name on the Hub, if it has one, written in place of the folder. While `push_to_hub` runs, the
            repository that it writes to goes first.
    """
    name = _pushed_to.get() or name or os.path.basename(os.path.abspath(directory))
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoPeftModel")
    return (
        f"{_IMPORT}from peft import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("{name}")  # the folder, or its name on the Hub'
    )


def how_to_ask(config: LoReftConfig) -> str:
    """Say in which form to give prompts, that of the training data; empty if the config does not say it."""
    if config.response_template is None:
        return ""
    if config.response_template:
        return " It was trained on chats: give prompts in the tokenizer's chat template."
    return " It was trained on prompts without a chat template: give them as they are."


def size(directory: str) -> str:
    """Say how many parameters and bytes the weights in `directory` have; empty if there are none."""
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118  # `file` is no dict
    except (OSError, SafetensorError):
        return ""
    parameters = sum(math.prod(shape) for shape in shapes)
    return f" Size: {parameters:,} parameters, {math.ceil(os.path.getsize(path) / 1024):,} KiB."


def write_model_card(directory: str, config: LoReftConfig) -> None:
    """Complete `directory/README.md` with our section, replacing an earlier one.

    The unfilled template of PEFT gives way to our section. A card that somebody wrote is kept.
    """
    filename = os.path.join(directory, "README.md")
    card = ModelCard.load(filename) if os.path.isfile(filename) else ModelCard(_NEW_CARD)
    _complete_metadata(card, config)
    text = _with_working_example(_without_template(card.text), config)
    before, after = _around_section(text)
    of_hub_name = _PIPELINE_OF_HUB_NAME.search(text)
    section = _section(directory, config, hub_name=of_hub_name[1] if of_hub_name else None)
    card.text = f"{before.rstrip()}\n\n{section}\n\n{after.strip()}".strip() + "\n"
    with open(filename, "w", encoding="utf-8", newline="") as file:  # not `card.save`, which would come here again
        file.write(str(card))


def _complete_metadata(card: ModelCard, config: LoReftConfig) -> None:
    card.data["library_name"] = "peft"
    # PEFT writes the tag "base_model:adapter:" if it knows no base.
    tags = {tag for tag in card.data.get("tags") or [] if not tag.endswith(":")}
    card.data["tags"] = sorted(tags | {"peft", "loreft"})
    if config.base_model_name_or_path:
        card.data["base_model"] = config.base_model_name_or_path
    elif not card.data.get("base_model"):
        card.data.pop("base_model", None)


def _without_template(text: str) -> str:
    """Replace PEFT's unfilled template by a title; the versions at its end stay."""
    if _TEMPLATE_MARK not in text:
        return text
    _, heading, versions = text.partition(_VERSIONS)
    return f"# LoReFT adapter\n\n{heading}{versions}"


def _with_working_example(text: str, config: LoReftConfig) -> str:
    """Mend the example of TRL's cards: it needs our import, and asks in a chat template that may not be there."""
    before_example, example, _ = text.partition(_PIPELINE)
    if example and _IMPORT not in before_example:
        text = text.replace(_PIPELINE, _IMPORT + _PIPELINE, 1)
    if config.response_template == []:
        text = text.replace(_ASKED_IN_CHAT, "generator(question, ")
    return text


def _around_section(text: str) -> tuple[str, str]:
    """Split a card where our section belongs: in place of an earlier one, or before the versions, or at the end."""
    if _START in text:
        before, _, rest = text.partition(_START)
        return before, rest.partition(_END)[2]
    before, heading, versions = text.partition(f"\n{_VERSIONS}")
    return before, f"{heading}{versions}" if versions else ""


def _section(directory: str, config: LoReftConfig, hub_name: str | None) -> str:
    base = f" for `{config.base_model_name_or_path}`" if config.base_model_name_or_path else ""
    return (
        f"{_START}\n"
        f"A LoReFT adapter (representation finetuning, arXiv 2404.03592){base}.\n\n"
        f"## How to load it\n\n```python\n{snippet(directory, config, hub_name)}\n```\n\n"
        f"## What it does\n\n{describe(config)}{how_to_ask(config)}{size(directory)}\n"
        f"{_END}"
    )


def complete_all_cards() -> None:
    """Put our section into every card that is saved beside a LoReFT adapter. Calling it again is harmless."""
    wrap(RepoCard, "save", _save_and_complete)
    wrap(PeftModel, "push_to_hub", _push_by_name)


def _save_and_complete(save: Callable[..., Any], card: RepoCard, filepath: Any, *args: Any, **kwargs: Any) -> None:
    """Do what `RepoCard.save` does, then complete the card if it lies beside a LoReFT adapter."""
    save(card, filepath, *args, **kwargs)
    directory, filename = os.path.split(filepath)
    try:
        with open(os.path.join(directory, CONFIG_NAME)) as file:
            is_loreft = json.load(file).get("peft_type") == "LOREFT"
    except (OSError, ValueError):
        return
    if filename == "README.md" and is_loreft:
        from .config import LoReftConfig  # here, because `config` imports this module: it writes the card on saving

        write_model_card(directory, LoReftConfig.from_pretrained(directory))


def _push_by_name(push: Callable[..., Any], model: PeftModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Do what `PeftModel.push_to_hub` does, with the repository's name in the snippet of the card."""
    token = _pushed_to.set(repo_id)
    try:
        return push(model, repo_id, *args, **kwargs)
    finally:
        _pushed_to.reset(token)
