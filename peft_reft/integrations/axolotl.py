"""LoReFT as an adapter of axolotl, by its plugin interface alone.

    plugins: [peft_reft.integrations.axolotl.LoReftPlugin]
    adapter: loreft
    loreft: {r: 4, positions: f7+l7}

axolotl makes the trainer, so all that `trainer` does under a Trainer happens there, too. This module adds the adapter,
and refuses the settings of axolotl that would be ignored, or would train something else. docs/axolotl.md is its page.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.chat_templates import get_chat_template_from_config
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator
from transformers import set_seed

from ..config import LoReftConfig
from ..positions.chat.template import find_marks
from ..runtime_config import LoReftRuntimeConfig
from ..tools.chat import loreft_configs, set_marks, warn_of_limits
from ..tuner.merging import why_not_merge

ADAPTER = "loreft"
"""What `adapter:` says, and the name of our section."""

FIELDS = {field.name for field in fields(LoReftConfig)} - {field.name for field in fields(PeftConfig)}
FIELDS -= {"target_parameters"}  # it is there for PEFT alone
"""What may stand in the section."""

SHARED = {"lora_modules_to_save": "modules_to_save", "peft_trainable_token_indices": "trainable_token_indices"}
"""Settings of axolotl that it reads itself, for any adapter, and the fields that they set."""

OF_LORA = ("lora_", "peft_", "loraplus_", "relora", "mixlora_", "qlora_")
"""How settings begin that other adapters read."""

NOT_OF_LORA = {*SHARED, "lora_model_dir", "peft_autocast_adapter_dtype"}
"""Settings of such names that are for any adapter."""

_QUANTISED = (
    "axolotl quantises the base for its own adapters only, and would load it whole. Ask transformers for it: "
    "`overrides_of_model_kwargs: {quantization_config: {...}}` (docs/axolotl.md)"
)
_SPLIT = "it splits rows or weights over processes, and no process then sees whole prompts. Allowed: 1"

REFUSED = {
    "peft": "its `loftq_config` is for LoRA",
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "unfrozen_parameters": (
        "it freezes all else, the edits too. Whole modules are trained by `loreft: {modules_to_save: [...]}`"
    ),
    "lisa_n_layers": "LISA trains layers of the base",
}
"""Settings that cannot be combined with the adapter if they are set, and why."""

ONE = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size", "expert_parallel_size")
"""Settings that may not be above 1."""


def config_of(cfg: Mapping[str, Any]) -> LoReftConfig:
    """Make the adapter's config from axolotl's. Raise ValueError if a field is unknown, or its value not allowed."""
    section = cfg.get(ADAPTER) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{ADAPTER}={section!r}: expected fields, such as `{ADAPTER}: {{r: 4, positions: f7+l7}}`.")
    given = {name: value for name, value in section.items() if value is not None}
    unknown = sorted(given.keys() - FIELDS)
    if unknown:
        raise ValueError(f"{ADAPTER} has {', '.join(unknown)}, which it does not know. Allowed: {sorted(FIELDS)}.")
    for theirs, ours in SHARED.items():
        value = cfg.get(theirs)
        if value and given.setdefault(ours, value) != value:
            raise ValueError(f"{ADAPTER}.{ours}={given[ours]!r} and {theirs}={value!r} differ. Give one of them.")
    try:
        if isinstance(given.get("runtime_config"), Mapping):
            given["runtime_config"] = LoReftRuntimeConfig(**given["runtime_config"])
        return LoReftConfig(task_type=_task_type(cfg), revision=cfg.get("revision_of_model"), **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{ADAPTER}: {error}") from error


def _task_type(cfg: Mapping[str, Any]) -> str:
    if cfg.get("reward_model"):
        return "SEQ_CLS"
    return "TOKEN_CLS" if cfg.get("process_reward_model") else "CAUSAL_LM"


def refuse(cfg: Mapping[str, Any], config: LoReftConfig, defaults: Mapping[str, Any]) -> None:
    """Raise ValueError at settings of axolotl that would be ignored, or would do something else than they say.

    Args:
        cfg: axolotl's config.
        config: the adapter's.
        defaults: of axolotl's settings. A config that was read before has them all.
    """
    for name, value in cfg.items():
        if not value or value == defaults.get(name):
            continue
        reason = REFUSED.get(name)
        if name.startswith(OF_LORA) and name not in NOT_OF_LORA:
            reason = f"it is for other adapters. The fields of this one stand in `{ADAPTER}:`"
        elif name in ONE:
            reason = _SPLIT if value > 1 else None
        if reason is not None:
            raise ValueError(f"{name}={value!r} cannot be combined with adapter={ADAPTER!r}: {reason}.")
    trl, rl = cfg.get("trl") or {}, cfg.get("rl")
    if trl.get("use_vllm"):
        raise ValueError(
            f"trl.use_vllm=True cannot be combined with adapter={ADAPTER!r}: axolotl would merge the edits into the "
            "weights that it sends to vLLM. Allowed: false; rollouts then come from `generate`."
        )
    if rl == "ebft":
        raise ValueError(f"rl='ebft' cannot be combined with adapter={ADAPTER!r}: its rows hold pieces of texts.")
    if cfg.get("pretraining_dataset") and not config.edits_everything:
        raise ValueError(
            f"pretraining_dataset: its texts have no prompts, so positions={config.positions!r} has nothing to edit, "
            f"or edits other tokens than `generate`. Allowed with it: `{ADAPTER}: {{positions: all}}`."
        )
    if cfg.get("merge_lora") and cfg.get("merge_method") != "legacy":
        raise ValueError(
            f"merge_method={cfg.get('merge_method')!r} cannot be combined with adapter={ADAPTER!r}: it folds LoRA's "
            "factors into the weights, and there are none. Allowed: 'legacy'; docs/merging.md says which edits merge."
        )
    if cfg.get("inference") and not cfg.get("lora_model_dir"):
        raise ValueError(
            "inference: give the trained adapter, `--lora-model-dir FOLDER`. Without it the base answers."
        )


class LoReftArgs(BaseModel):
    """What axolotl's YAML gains: the section `loreft:`, with the fields of `LoReftConfig`."""

    loreft: dict[str, Any] | None = Field(default=None, description="Fields of peft_reft.LoReftConfig.")

    @model_validator(mode="before")  # type: ignore[untyped-decorator]  # mypy skips pydantic here
    @classmethod
    def check_loreft(cls, data: Any) -> Any:
        """Check the section, and what stands beside it, when axolotl reads the YAML."""
        if data.get("adapter") == ADAPTER:
            defaults = {name: field.default for name, field in cls.model_fields.items()}
            refuse(data, config_of(data), defaults)
        elif data.get(ADAPTER):
            raise ValueError(f"{ADAPTER}={data[ADAPTER]!r} needs adapter={ADAPTER!r}; it is {data.get('adapter')!r}.")
        return data


class LoReftPlugin(BasePlugin):
    """Makes `adapter: loreft` one of axolotl's adapters."""

    def get_input_args(self) -> str:
        """The class whose fields the YAML gains."""
        return f"{LoReftArgs.__module__}.{LoReftArgs.__qualname__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter's name. It is not like LoRA: axolotl's code for LoRA's factors must leave it alone."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig] | None:
        """Add the adapter to the base, or load it from `lora_model_dir`; None if another adapter is wanted.

        With `config_only` TRL will add it (DPO, IPO, KTO), and no model is returned.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = config_of(cfg)
        if config_only:
            if cfg.lora_model_dir:
                raise ValueError(
                    f"lora_model_dir={cfg.lora_model_dir!r} cannot be combined with rl={cfg.rl!r}: the trainer makes "
                    "an adapter of its own. Leave it out."
                )
            return None, config
        settings = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            settings["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            config = _saved_config(cfg, config)
            model = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, config=config, **settings
            )
        else:
            if cfg.seed is not None:
                set_seed(cfg.seed)  # as axolotl does for LoRA
            model = get_peft_model(model, config, **settings)
        reason = why_not_merge(model, [model.active_adapter]) if cfg.merge_lora else None
        if reason is not None:
            raise ValueError(
                f"merge-lora: {reason}. docs/merging.md says which edits merge, docs/deploying.md the rest."
            )
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            model.print_trainable_parameters()
        return model, config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set the marks of the chat templates that datasets name, if these are not the tokenizer's own.

        Those of the tokenizer's template were set when the trainer was made (`trainer.FindMarksAndLogFirstRow`).
        """
        if cfg.adapter != ADAPTER or cfg.lora_model_dir or config_of(cfg).response_template is not None:
            return
        tokenizer = trainer.processing_class
        templates = {
            get_chat_template_from_config(cfg, ds_cfg=dataset, tokenizer=tokenizer)
            for dataset in [*(cfg.datasets or []), *(cfg.test_datasets or [])]
            if str(dataset.type).startswith(("chat_template", "orpo.chat_template"))
        }
        if templates <= {tokenizer.chat_template}:
            return
        answers, ends = [], []
        for template in sorted(templates):
            of_dataset = copy.copy(tokenizer)
            of_dataset.chat_template = template
            found = find_marks(of_dataset)
            if found is None or found.problem is not None:
                problem = "there is none." if found is None else found.problem
                warnings.warn(
                    f"LoReFT cannot find the headers of a dataset's chat template: {problem} Give `{ADAPTER}: "
                    "{response_template: ..., instruction_template: ...}` if its chats have several turns.",
                    stacklevel=2,
                )
                continue
            warn_of_limits(found)
            answers += [header for header in found.response_template if header not in answers]
            ends += [header for header in found.instruction_template if header not in ends]
        set_marks(trainer.model, answers, ends, list(loreft_configs(trainer.model)))


def _saved_config(cfg: Any, given: LoReftConfig) -> LoReftConfig:
    """The config of the adapter in `lora_model_dir`, which counts. What the YAML says besides must not differ."""
    saved = PeftConfig.from_pretrained(cfg.lora_model_dir)
    if not isinstance(saved, LoReftConfig):
        raise ValueError(f"lora_model_dir={cfg.lora_model_dir!r} has an adapter of {saved.peft_type}, not of LoReFT.")
    for name in sorted((cfg.loreft or {}).keys() - {"runtime_config"}):
        if getattr(saved, name) != getattr(given, name):
            raise ValueError(
                f"{ADAPTER}.{name}={getattr(given, name)!r}, but the adapter in lora_model_dir={cfg.lora_model_dir!r} "
                f"has {getattr(saved, name)!r}, which cannot be changed. Leave the field out."
            )
    saved.runtime_config = given.runtime_config
    return saved
