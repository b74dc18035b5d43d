"""The adapter that is trained: whether an engine can serve it, and its files as `save_pretrained` writes them."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save
from torch import Tensor

from ...config import LoReftConfig
from ...serving import AdapterFiles
from ...tuner.layer import LoReftLayer
from ...tuner.state_dicts import is_ours
from ..first_forwards import attachment_of
from .base import check_base

_WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Policy:
    """The LoReFT adapter that a trainer of TRL trains."""

    model: PeftModel
    name: str
    """Of the adapter in the model."""

    @staticmethod
    def of(model: Any) -> Policy | None:
        """The policy in a trainer's model; None if the model has no adapter of LoReFT.

        Raises:
            ValueError: an engine would compute something else than the model. The message says why.
        """
        if not any(isinstance(module, LoReftLayer) for module in model.modules()):
            return None
        active = model.active_adapters if isinstance(model, PeftModel) else []
        names = [name for name in active if isinstance(model.peft_config.get(name), LoReftConfig)]
        if not names:
            raise ValueError(
                f"use_vllm=True: the model ({type(model).__name__}) has LoReFT, but no such adapter of its own is "
                "active (allowed: a PeftModel whose active adapter is of LoReFT)."
            )
        if len(model.active_adapters) > 1:
            raise ValueError(
                f"use_vllm=True: the adapters {', '.join(model.active_adapters)} are active, and a request to the "
                "engine names one (allowed: one active adapter)."
            )
        policy = Policy(model, names[0])
        policy.check()
        return policy

    @property
    def config(self) -> LoReftConfig:
        """The adapter's config as it is now: a trainer adds the marks of the chat template after it is made."""
        config: LoReftConfig = self.model.peft_config[self.name]
        return config

    def check(self) -> None:
        """Raise ValueError if an engine that has the base model and this adapter computes something else."""
        for field in ("modules_to_save", "trainable_token_indices"):
            value = getattr(self.config, field)
            if value:
                raise ValueError(
                    f"use_vllm=True: the adapter has {field}={value!r}, and the engine has the base model's own "
                    "weights (allowed: None)."
                )
        if self.config.intervention == "interchange":
            raise ValueError(
                "use_vllm=True: intervention='interchange' needs hidden states of another run, which an engine does "
                "not have."
            )
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoReftLayer | AuxiliaryTrainingWrapper):
                raise ValueError(
                    f"use_vllm=True: {name} belongs to another method of PEFT ({type(module).__name__}), and the "
                    "engine loads the base model without it. Merge it (`merge_and_unload`), save the model, and train "
                    "on what was saved."
                )
        base = self.model.get_base_model()
        check_base(base, base.name_or_path)

    def files(self, generation: Any) -> AdapterFiles:
        """The files that `save_pretrained` would write now.

        Under ZeRO-3 and FSDP all processes must call it, because it gathers the adapter's parameters.

        Args:
            generation: TRL's `VLLMGeneration`, which knows how parameters are sharded.
        """
        tensors = get_peft_model_state_dict(
            self.model,
            state_dict=self._tensors(generation),
            adapter_name=self.name,
            save_embedding_layers=False,
        )
        config = copy.copy(self.config)
        config.inference_mode = True
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
        return AdapterFiles(text.encode(), save(_without_aliases(tensors), metadata={"format": "pt"}))

    def note_rollout(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        """Have the forward that trains check that it finds the ends of these prompts (`positions.rollouts`).

        Without marks a request says where its conversation's first prompt ends, as that forward's labels do (`turns`).

        Args:
            prompts: token ids of each prompt.
            answers: the tokens that were generated behind each.
        """
        attachment = attachment_of(self.model)
        if attachment is None or attachment.rollouts is None or not self.config.response_template:
            return
        layers = [module for module in self.model.modules() if isinstance(module, LoReftLayer)]
        asked = {layer.plans[self.name].wanted for layer in layers if self.name in layer.plans}
        answered = [(prompt, answer[0]) for prompt, answer in zip(prompts, answers) if answer]
        attachment.rollouts.note(
            asked, prompts=[prompt for prompt, _ in answered], following=[token for _, token in answered]
        )

    def _tensors(self, generation: Any) -> dict[str, Tensor]:
        """LoReFT's tensors of all adapters, whole, by the keys of the model's state dict."""
        if generation._dist.fsdp_version == 1:
            # TRL gathers one part of the model at a time.
            parameters = generation._iter_fsdp1_params(self.model)
            return {key: parameter.clone() for key, parameter in parameters if is_ours(key)}
        own = {}
        for key, parameter in self.model.named_parameters(remove_duplicate=False):
            if is_ours(key):
                for wrapper in _WRAPPERS:
                    key = key.replace(wrapper, "")
                own[key] = parameter
        with generation._dist.gather_params(list(own.values())):  # ZeRO-3
            return {key: _whole(parameter, generation.accelerator.device) for key, parameter in own.items()}


def _whole(parameter: Any, device: object) -> Tensor:
    """A copy of a parameter that is in one piece: FSDP2 has a part of it on each process."""
    gather = getattr(parameter, "full_tensor", None)
    tensor: Tensor = parameter.detach().clone() if gather is None else parameter.detach().to(device).full_tensor()
    return tensor


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share their memory with another one, as safetensors wants it."""
    seen: dict[int, int] = defaultdict(int)
    found = {}
    for key, tensor in tensors.items():
        pointer = tensor.data_ptr()
        found[key] = tensor.clone() if seen[pointer] else tensor.contiguous()
        seen[pointer] += 1
    return found
