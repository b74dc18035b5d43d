"""The model card: the snippet that loads the adapter, its tags, and its settings in words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from .positions import Positions

if TYPE_CHECKING:
    from .config import LoreftConfig

_START, _END = "<!-- peft_reft: start -->", "<!-- peft_reft: end -->"

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
    where = f"modules {config.to_dict()['target_modules']}" if config.target_modules else f"layers {config.layers}"
    return (
        f"Formula `{config.intervention}`, rank {config.r}, on the {config.component} output of {where}. "
        f"Edited tokens: {'; '.join(in_words)} (`positions={config.positions!r}`)."
    )


def snippet(directory: str, config: LoreftConfig) -> str:
    """Python that loads the adapter saved in `directory`."""
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoPeftModel")
    return (
        f"import peft_reft  # makes the LOREFT method known to PEFT: pip install peft-reft\n"
        f"from peft import {auto_class}\n\n"
        f"model = {auto_class}.from_pretrained({directory!r})"
    )


def write_model_card(directory: str, config: LoreftConfig) -> None:
    """Complete `directory/README.md` (written by PEFT) with our section, replacing an earlier one."""
    filename = os.path.join(directory, "README.md")
    card = ModelCard.load(filename) if os.path.isfile(filename) else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "peft", "loreft"})
    if config.base_model_name_or_path and not os.path.isdir(config.base_model_name_or_path):
        card.data["base_model"] = config.base_model_name_or_path
    section = (
        f"{_START}\n## How to load this LoReFT adapter\n\n```python\n{snippet(directory, config)}\n```\n\n"
        f"{describe(config)} LoReFT is a representation finetuning method: arXiv 2404.03592.\n{_END}"
    )
    before, _, rest = card.text.partition(_START)
    after = rest.partition(_END)[2]
    card.text = f"{before.rstrip()}\n\n{section}\n{after.lstrip()}".lstrip()
    card.save(filename)
