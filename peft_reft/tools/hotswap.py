"""Replace the weights of a loaded adapter by those of another, under the same name."""

from __future__ import annotations

from typing import Any

import peft
from peft.utils import load_peft_weights
from torch import Tensor, nn

from ..config import LoReftConfig
from ..files import check_finite
from ..tuner.layer import LoReftLayer
from ..tuner.model import LoReftModel

MAY_DIFFER = (
    "base_model_name_or_path",
    "dropout",
    "exclude_modules",
    "inference_mode",
    "init_weights",
    "layers",
    "layers_pattern",
    "layers_to_transform",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
    "auto_mapping",
)
"""Fields that do not change what weights of the same names and shapes compute."""


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the weights of a loaded adapter by those of another of the same shape, in place.

    A compiled model (`torch.compile`) is not compiled again. If anything does not fit, nothing is changed. PEFT's
    function, `peft.utils.hotswap.hotswap_adapter`, does the same with an adapter of this package.

    Args:
        model: a PEFT model, or `torch.compile` of one.
        model_name_or_path: folder or Hub name of the adapter to put in.
        adapter_name: the loaded adapter. Its name stays.
        torch_device: the device that the file is read to; None: the CPU.
        **kwargs: `subfolder`, `revision`, `token` and the like, for the Hub.

    Raises:
        ValueError: the model has no adapter of that name; it is merged; formula, positions, ties, layers or shapes of
            the two differ; or the file has values that are not finite.

    Examples:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_reft import LoReftConfig, hotswap_adapter
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)), LoReftConfig(r=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     hotswap_adapter(model, folder)
    """
    _loaded(model, adapter_name)  # before anything is read
    config = LoReftConfig.from_pretrained(model_name_or_path, **kwargs)
    weights = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    exchange(model, adapter_name, config, weights, model_name_or_path)


def _loaded(model: Any, adapter_name: str) -> tuple[Any, LoReftConfig]:
    """The PEFT model within `torch.compile`'s wrapper, and the config of its adapter.

    Raises:
        ValueError: the model has no LoReFT adapter of that name, or it is merged.
    """
    peft_model = getattr(model, "_orig_mod", model)
    config = peft_model.peft_config.get(adapter_name)
    if not isinstance(config, LoReftConfig):
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no LoReFT adapter of that name.")
    for module in peft_model.modules():
        if isinstance(module, LoReftLayer) and adapter_name in module.merged_adapters:
            raise ValueError(f"{adapter_name!r} is merged into the weights. Call `unmerge_adapter` first.")
    return peft_model, config


def exchange(
    model: nn.Module, adapter_name: str, config: LoReftConfig, weights: dict[str, Tensor], source: str
) -> None:
    """Put `weights`, under the keys of a file, in the place of a loaded adapter's, after all checks."""
    peft_model, loaded = _loaded(model, adapter_name)
    _check_configs_alike(loaded, config, adapter_name=adapter_name, path_or_name=source)
    check_finite(weights, f"The adapter of {source}")
    placed = LoReftModel._remap_adapter_state_dict_for_load(peft_model, loaded, adapter_name, weights)
    parameters = dict(peft_model.named_parameters())
    _check_shapes_alike(parameters, placed, adapter_name=adapter_name, path_or_name=source)
    peft.set_peft_model_state_dict(peft_model, weights, adapter_name)  # by this name it is wrapped, if PEFT is 0.20


def _check_configs_alike(loaded: LoReftConfig, other: LoReftConfig, adapter_name: str, path_or_name: str) -> None:
    """Raise ValueError if the configs differ in a field that says what the weights compute."""
    loaded_fields, other_fields = loaded.to_dict(), other.to_dict()
    for field, value in loaded_fields.items():
        if field not in MAY_DIFFER and value != other_fields[field]:
            raise ValueError(
                f"The adapters are not alike: {field}={value!r} in {adapter_name!r}, {other_fields[field]!r} in "
                f"{path_or_name}. Use `load_adapter` instead."
            )


def _check_shapes_alike(
    parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], adapter_name: str, path_or_name: str
) -> None:
    """Raise ValueError if a tensor of the file has another shape than the parameter that it would replace."""
    for name, tensor in weights.items():
        if name in parameters and parameters[name].shape != tensor.shape:
            raise ValueError(
                f"The adapters are not alike: {name} is {tuple(parameters[name].shape)} in {adapter_name!r}, "
                f"{tuple(tensor.shape)} in {path_or_name}."
            )
