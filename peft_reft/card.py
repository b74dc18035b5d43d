"""The model card: the snippet that loads the adapter, its tags, its settings in words, its size.

`push_to_hub` and trainers write a card of their own over the one that `save_pretrained` made, and what they write
lacks the import without which nobody can load the adapter. So a card that is saved beside a LoReFT adapter is
completed, whoever saves it (`complete_all_cards`).
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
_TEMPLATE_MARK = "# Model Card for Model ID"
_VERSIONS = "### Framework versions"
_PIPELINE = "from transformers import pipeline\n"
_ASKED_IN_CHAT = 'generator([{"role": "user", "content": question}], '
_IMPORT = "import peft_reft  # makes the LOREFT method known to PEFT: pip install peft-reft\n"

_pushed_to: ContextVar[str | None] = ContextVar("_pushed_to", default=None)
"""The repository that `push_to_hub` is at work on."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def describe(config: LoReftConfig) -> str:
    """One paragraph: formula, rank, layers, positions."""
    specs = config.positions if isinstance(config.positions, dict) else {"": config.positions}
    in_words = [
        f"{f'layers {layers}: ' if layers else ''}{Positions.parse(spec).describe()}" for layers, spec in specs.items()
    ]
    if config.target_modules:
        where = f"the output of modules {config.to_dict()['target_modules']}"
        if config.layers_to_transform is not None:
            where += f" in layers {config.layers_to_transform}"
    else:
        layers = "all layers" if config.layers == "all" else f"layers {config.layers}"
        where = f"the {config.component} output of {layers}"
    ranks = [f"{r} in layers {layers}" for layers, r in config.r.items()] if isinstance(config.r, dict) else [config.r]
    formula = f"Formula `{config.intervention}`"
    if config.act_fn:
        formula += f" with `act_fn={config.act_fn!r}`"
    if config.gate:
        formula += ", gated"
    if INTERVENTIONS[config.intervention].has_rank:
        formula += f", rank {', '.join(map(str, ranks))}"
    return f"{formula}, on {where}. Edited tokens: {'; '.join(in_words)} (`positions={config.positions!r}`)."


def snippet(directory: str, config: LoReftConfig, name: str | None = None) -> str:
    """Python that loads the adapter, from the Hub if it goes by `name` there, else from beside its folder.

    No path of the machine it was made on gets published.
    """
    name = _pushed_to.get() or name or os.path.basename(os.path.abspath(directory))
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoPeftModel")
    return (
        f"{_IMPORT}from peft import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("{name}")  # the folder, or its name on the Hub'
    )


def how_to_ask(config: LoReftConfig) -> str:
    """The form in which the training data gave prompts, in words; empty if the config does not say it."""
    if config.response_template is None:
        return ""
    if config.response_template:
        return " It was trained on chats: give prompts in the tokenizer's chat template."
    return " It was trained on prompts without a chat template: give them as they are."


def size(directory: str) -> str:
    """Parameters and bytes of the weights in `directory`, in words; empty without them."""
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            parameters = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return ""
    return f" Size: {parameters:,} parameters, {math.ceil(os.path.getsize(path) / 1024):,} KiB."


def write_model_card(directory: str, config: LoReftConfig) -> None:
    """Complete `directory/README.md` with our section, replacing an earlier one.

    PEFT's template, which is all questions to be answered, gives way to it; a card that somebody wrote is kept.
    """
    filename = os.path.join(directory, "README.md")
    card = ModelCard.load(filename) if os.path.isfile(filename) else ModelCard("---\nlibrary_name: peft\n---\n")
    card.data["library_name"] = "peft"
    tags = {tag for tag in card.data.get("tags") or [] if not tag.endswith(":")}  # "base_model:adapter:" of nothing
    card.data["tags"] = sorted(tags | {"peft", "loreft"})
    if config.base_model_name_or_path:
        card.data["base_model"] = config.base_model_name_or_path
    elif not card.data.get("base_model"):
        card.data.pop("base_model", None)
    text = card.text
    if _TEMPLATE_MARK in text:
        text = f"# LoReFT adapter\n\n{text[text.index(_VERSIONS) :] if _VERSIONS in text else ''}"
    if _PIPELINE in text and _IMPORT not in text.partition(_PIPELINE)[0]:
        text = text.replace(_PIPELINE, _IMPORT + _PIPELINE, 1)
    if config.response_template == []:  # TRL's example asks in the chat template
        text = text.replace(_ASKED_IN_CHAT, "generator(question, ")
    hub_name = re.search(r'pipeline\(.*model="([^"/]+/[^"/]+)"', text)  # TRL's example has it
    before, _, rest = text.partition(_START) if _START in text else text.partition(f"\n{_VERSIONS}")
    after = rest.partition(_END)[2] if _START in text else f"{_VERSIONS}{rest}" if rest else ""
    code = snippet(directory, config, hub_name and hub_name[1])
    section = (
        f"{_START}\nA LoReFT adapter (representation finetuning, arXiv 2404.03592)"
        + (f" for `{config.base_model_name_or_path}`" if config.base_model_name_or_path else "")
        + f".\n\n## How to load it\n\n```python\n{code}\n```\n\n## What it does\n\n"
        + f"{describe(config)}{how_to_ask(config)}{size(directory)}\n{_END}"
    )
    card.text = f"{before.rstrip()}\n\n{section}\n\n{after.strip()}".strip() + "\n"
    with open(filename, "w", encoding="utf-8", newline="") as file:  # not `save`, which would come here again
        file.write(str(card))


def complete_all_cards() -> None:
    """Have our section in every card that is saved beside a LoReFT adapter. Calling it again is harmless."""
    wrap(RepoCard, "save", _save_and_complete)
    wrap(PeftModel, "push_to_hub", _push_by_name)


def _save_and_complete(save: Callable[..., Any], card: RepoCard, filepath: Any, *args: Any, **kwargs: Any) -> None:
    save(card, filepath, *args, **kwargs)
    directory, name = os.path.split(filepath)
    try:
        with open(os.path.join(directory, CONFIG_NAME)) as file:
            of_loreft = json.load(file).get("peft_type") == "LOREFT"
    except (OSError, ValueError):
        return
    if name == "README.md" and of_loreft:
        from .config import LoReftConfig  # which imports this module

        write_model_card(directory, LoReftConfig.from_pretrained(directory))


def _push_by_name(push: Callable[..., Any], model: PeftModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    token = _pushed_to.set(repo_id)
    try:
        return push(model, repo_id, *args, **kwargs)
    finally:
        _pushed_to.reset(token)
