"""Python code for the card: it loads base model, tokenizer and adapter, asks a question and prints the answer."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from peft.utils import CONFIG_NAME

from .names import ADAPTER_PLACEHOLDER, base_in_words, current_destination, hub_name_of_base
from .words import shapes_of_weights

if TYPE_CHECKING:
    from ..config import LoReftConfig

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_REPLACE_ME = "  # put its Hub name or its folder here"

_CHAT = """\
chat = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
"""
_PROMPT = 'inputs = tokenizer("What is the capital of France?", return_tensors="pt")\n'
_UNKNOWN_FORM = "# Ask in the form of the training data: a chat template, or as here without one.\n"
_SENTENCE = 'inputs = tokenizer("What a fine day!", return_tensors="pt")\n'

_GENERATE = """\
output = model.generate(**inputs.to(model.device), max_new_tokens=100)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
_GENERATE_SEQ_2_SEQ = """\
output = model.generate(**inputs.to(model.device), max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_ASK_OTHERS = {
    "SEQ_CLS": _SENTENCE + "print(model(**inputs.to(model.device)).logits.argmax(-1).item())  # the label\n",
    "TOKEN_CLS": _SENTENCE + "print(model(**inputs.to(model.device)).logits.argmax(-1)[0].tolist())  # labels\n",
    "QUESTION_ANS": """\
inputs = tokenizer("Where is Rome?", "Rome is in Italy.", return_tensors="pt")
output = model(**inputs.to(model.device))
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))
""",
    "FEATURE_EXTRACTION": _SENTENCE + "print(model(**inputs.to(model.device)).last_hidden_state.shape)\n",
}


def example(directory: str, config: LoReftConfig) -> str | None:
    """Return the code; None if the adapter is for a class that is not transformers' own.

    Args:
        directory: the adapter's folder. If it has a tokenizer, the code loads that one, else the base model's.
        config: the adapter's config.
    """
    model_class = _model_class(directory, config)
    if model_class is None:
        return None
    destination = current_destination()
    adapter = f'"{destination.repository}"' if destination else f'"{ADAPTER_PLACEHOLDER}"{_REPLACE_ME}'
    base = hub_name_of_base(config)
    base = f'"{base}"' if base else f'"owner/{base_in_words(config) or "base-model"}"{_REPLACE_ME}'
    has_tokenizer = os.path.isfile(os.path.join(directory, "tokenizer_config.json"))
    return (
        "import peft_reft  # without it: KeyError: 'LOREFT'\n"
        "from peft import PeftModel\n"
        f"from transformers import {', '.join(sorted([model_class, 'AutoTokenizer']))}\n"
        "\n"
        f"base = {base}\n"
        f"adapter = {adapter}\n"
        "\n"
        f"tokenizer = AutoTokenizer.from_pretrained({'adapter' if has_tokenizer else 'base'})\n"
        f"model = {model_class}.from_pretrained(base{_arguments_of_base(directory, config)})\n"
        f"model = PeftModel.from_pretrained(model, adapter{_arguments_of_adapter(directory)}).eval()\n"
        f"\n{_ask(config)}"
    ).rstrip()


def _task(config: LoReftConfig) -> str:
    return str(getattr(config.task_type, "value", config.task_type))


def _model_class(directory: str, config: LoReftConfig) -> str | None:
    """The class of transformers that loads the base model; None if it is of another library."""
    if _task(config) in _AUTO_CLASSES:
        return _AUTO_CLASSES[_task(config)]
    class_and_module = class_of_base(directory)
    if class_and_module is not None and class_and_module[1].startswith("transformers."):
        return class_and_module[0]
    return None


def class_of_base(directory: str) -> tuple[str, str] | None:
    """Name and module of the base model's class, which PEFT saves if the config has no task type; else None."""
    try:
        with open(os.path.join(directory, CONFIG_NAME)) as file:
            found = json.load(file).get("auto_mapping")
    except FileNotFoundError:  # the card of a trainer that has saved no adapter yet
        return None
    return (found["base_model_class"], found["parent_library"]) if found else None


def _arguments_of_base(directory: str, config: LoReftConfig) -> str:
    """The base model's revision, and the number of labels that a saved head of a classifier has."""
    words = ""
    if config.revision:
        words += f', revision="{config.revision}"'
    labels = _number_of_labels(directory, config)
    if labels is not None:
        words += f", num_labels={labels}"
    return words


def _number_of_labels(directory: str, config: LoReftConfig) -> int | None:
    """Rows of the last matrix of the saved head: the one with the fewest. None if there is no such head."""
    if _task(config) not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = set(config.modules_to_save or ())
    shapes = shapes_of_weights(directory)
    rows = [shape[0] for name, shape in shapes.items() if len(shape) == 2 and heads & set(name.split("."))]
    return min(rows, default=None)


def _arguments_of_adapter(directory: str) -> str:
    """The branch that the adapter is pushed to, and its folder in the repository, if they are not the usual ones."""
    destination = current_destination()
    if destination is None:
        return ""
    words = ""
    if destination.revision:
        words += f', revision="{destination.revision}"'
    folder = os.path.basename(os.path.abspath(directory))
    if folder in destination.subfolders:
        words += f', subfolder="{folder}"'
    return words


def _ask(config: LoReftConfig) -> str:
    """The question, in the form of the training data, and the answer; empty if the config does not say the task."""
    task = _task(config)
    if task == "CAUSAL_LM":
        if config.response_template is None:
            return _UNKNOWN_FORM + _PROMPT + _GENERATE
        return (_CHAT if config.response_template else _PROMPT) + _GENERATE
    if task == "SEQ_2_SEQ_LM":
        return _PROMPT + _GENERATE_SEQ_2_SEQ
    return _ASK_OTHERS.get(task, "")
