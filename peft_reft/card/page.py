"""Our parts of a card, put into the card that PEFT, TRL, transformers or a person wrote."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from .example import class_of_base, example
from .names import ADAPTER_PLACEHOLDER, base_in_words, current_destination, hub_name_of_base, is_local
from .words import describe, how_to_ask, size

if TYPE_CHECKING:
    from ..config import LoReftConfig

_START, _END = "<!-- peft_reft: start -->", "<!-- peft_reft: end -->"
"""Our section stands between these two."""
_INSTALL = (
    "> Install `peft-reft` first: `pip install peft-reft`. Without it PEFT raises `KeyError: 'LOREFT'`. Programs "
    "that do not import it run under `peft-reft exec PROGRAM ...`."
)
"""The first line of every card."""
_NEW_CARD = "---\nlibrary_name: peft\n---\n"
_TEMPLATE_MARK = "# Model Card for Model ID"
"""PEFT's template, which is all questions to be answered, has this title."""
_NO_TITLE = "# Model Card for None"
"""TRL's title if `create_model_card()` is not told one."""
_TITLE = "# LoReFT adapter"
_VERSIONS = "### Framework versions"
"""The last section of PEFT's template and of TRL's and transformers' cards."""
_EXAMPLE_OF_TRL = re.compile(r"## Quick start\n\n```python\nfrom transformers import pipeline\n.*?\n```", re.DOTALL)
_NO_BASE = (
    "This model is a fine-tuned version of [None](https://huggingface.co/None)",
    "This model was trained from scratch",
)
"""What TRL and transformers write if the base model is a folder."""


def write_model_card(directory: str, config: LoReftConfig) -> None:
    """Complete `directory/README.md` with our parts, replacing earlier ones.

    The unfilled template of PEFT and the example of TRL's cards, which needs a name on the Hub and our import, give
    way to our section. What a person wrote is kept.
    """
    filename = os.path.join(directory, "README.md")
    card = ModelCard.load(filename) if os.path.isfile(filename) else ModelCard(_NEW_CARD)
    text = _without_template(card.text)
    text = _with_base_named(text, config)
    text = _without_local_datasets(text, card)
    _complete_metadata(card, config)
    before, after = _around_section(text.replace(_INSTALL, ""))
    parts = [_INSTALL, before.strip(), _section(directory, config), after.strip()]
    card.text = "\n\n".join(part for part in parts if part) + "\n"
    with open(filename, "w", encoding="utf-8", newline="") as file:  # not `card.save`, which would come here again
        file.write(str(card))


def _complete_metadata(card: ModelCard, config: LoReftConfig) -> None:
    """Set library, tags and base model. The Hub refuses a card whose base model is a folder."""
    card.data["library_name"] = "peft"
    base = hub_name_of_base(config)
    # PEFT writes a tag for each base, "base_model:adapter:" if it knows none.
    tags = {tag for tag in card.data.get("tags") or [] if not tag.startswith("base_model:")}
    card.data["tags"] = sorted(tags | {"peft", "loreft"} | ({f"base_model:adapter:{base}"} if base else set()))
    if base:
        card.data["base_model"] = base
    elif is_local(str(card.data.get("base_model") or "")):
        card.data.pop("base_model", None)


def _without_template(text: str) -> str:
    """Replace PEFT's unfilled template by a title; the versions at its end stay. TRL's card may lack a title, too."""
    if _TEMPLATE_MARK not in text:
        return text.replace(_NO_TITLE, _TITLE)
    _, heading, versions = text.partition(_VERSIONS)
    return f"{_TITLE}\n\n{heading}{versions}"


def _with_base_named(text: str, config: LoReftConfig) -> str:
    """Name the base model in the first sentence of TRL's and transformers' cards, which do not know it."""
    name = base_in_words(config)
    known = f"This model is a fine-tuned version of `{name}`" if name else "This model was fine-tuned"
    for unknown in _NO_BASE:
        text = text.replace(unknown, known)
    return text


def _without_local_datasets(text: str, card: ModelCard) -> str:
    """Take files of this machine out of the metadata and of the first sentence of TRL's cards."""
    datasets = card.data.get("datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else datasets
    for name in filter(is_local, datasets):
        text = text.replace(f" on the [{name}](https://huggingface.co/datasets/{name}) dataset", "")
    public = [name for name in datasets if not is_local(name)]
    if public != datasets:
        card.data["datasets"] = public
    if not public:
        card.data.pop("datasets", None)
    return text


def _around_section(text: str) -> tuple[str, str]:
    """Split a card where our section belongs.

    That is in place of an earlier one, or of TRL's example, or before the versions, or at the end.
    """
    if _START in text:
        before, _, rest = text.partition(_START)
        return before, rest.partition(_END)[2]
    if found := _EXAMPLE_OF_TRL.search(text):
        return text[: found.start()], text[found.end() :]
    before, heading, versions = text.partition(f"\n{_VERSIONS}")
    return before, f"{heading}{versions}"


def _section(directory: str, config: LoReftConfig) -> str:
    name = base_in_words(config)
    base = f" for `{name}`" if name else ""
    return (
        f"{_START}\n"
        f"A LoReFT adapter (representation finetuning, arXiv 2404.03592){base}.\n\n"
        f"## How to use it\n\n{_how_to_use(directory, config)}\n\n"
        f"## What it does\n\n{describe(config)}{how_to_ask(config)}{size(directory)}\n"
        f"{_END}"
    )


def _how_to_use(directory: str, config: LoReftConfig) -> str:
    code = example(directory, config)
    if code is not None:
        return f"```python\n{code}\n```"
    destination = current_destination()
    adapter = destination.repository if destination else ADAPTER_PLACEHOLDER
    found = class_of_base(directory)
    model = f"a `{found[0]}`" if found else "the model that it was trained in"
    return f'After `import peft_reft` load it into {model}: `PeftModel.from_pretrained(model, "{adapter}")`.'
