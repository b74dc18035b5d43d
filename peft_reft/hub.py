"""The model card: the snippet that loads the adapter, its tags, and its settings in words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from .interventions import INTERVENTIONS
from .positions import Positions

if TYPE_CHECKING:
    from .config import LoreftConfig

_START, _END = "<!-- peft_reft: start -->", "<!-- peft_reft: end -->"
_TEMPLATE_MARK = "# Model Card for Model ID"
_VERSIONS = "### Framework versions"

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def describe(config: LoreftConfig) -> str:
    """One paragraph: formula, rank, layers, positions."""
    specs = config.positions if isinstance(config.positions, dict) else {"": config.positions}
    in_words = [
        f"{f'layers {layers}: ' if layers else ''}{Positions.parse(spec).describe()}" for layers, spec in specs.items()
    ]
    if config.target_modules:
        where = f"the output of modules {config.to_dict()['target_modules']}"
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


def snippet(directory: str, config: LoreftConfig) -> str:
    """Python that loads the adapter from beside its folder; no path of the machine it was made on gets published."""
    name = os.path.basename(os.path.abspath(directory))
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoPeftModel")
    return (
        f"import peft_reft  # makes the LOREFT method known to PEFT: pip install peft-reft\n"
        f"from peft import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("{name}")  # the folder, or its name on the Hub'
    )


def write_model_card(directory: str, config: LoreftConfig) -> None:
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
    before, _, rest = text.partition(_START) if _START in text else text.partition(f"\n{_VERSIONS}")
    after = rest.partition(_END)[2] if _START in text else f"{_VERSIONS}{rest}" if rest else ""
    section = (
        f"{_START}\nA LoReFT adapter (representation finetuning, arXiv 2404.03592)"
        + (f" for `{config.base_model_name_or_path}`" if config.base_model_name_or_path else "")
        + f".\n\n## How to load it\n\n```python\n{snippet(directory, config)}\n```\n\n## What it does\n\n"
        + f"{describe(config)}\n{_END}"
    )
    card.text = f"{before.rstrip()}\n\n{section}\n\n{after.strip()}".strip() + "\n"
    card.save(filename)
