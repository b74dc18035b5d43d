"""Which adapter files are accepted: safetensors only, whole, every value finite. A refusal names the file.

PEFT and transformers read and write the files. Two of their methods are wrapped, because nothing else sees what they
do: `PeftModel.save_pretrained`, which can write a pickle, and transformers' `load_adapter`, which shows no tuner the
tensors that it reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from glob import escape, glob
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from .patching import wrap

_SHARDS = SAFETENSORS_WEIGHTS_NAME.replace(".", "-*-of-*.")
"""Names of the parts, if the weights were saved in several: `adapter_model-00001-of-00002.safetensors`."""

_WEIGHTS = "loreft_weights"
"""What our layers call their weights. `tuner.layer` has the class; it stands above this room."""


def check_weights_file(folder: str) -> None:
    """Check the weights in `folder`. Without weights there, as for a name on the Hub, nothing is done.

    Raises:
        ValueError: the file is damaged or cut short, a pickle, or in shards; the message names it.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(path):
        try:  # the reader's own error names no file
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}). Copy it again.") from error
        return
    shards = glob(os.path.join(escape(folder), _SHARDS))
    if shards:
        raise ValueError(
            f"{min(shards)} is a part of an adapter, and PEFT and transformers read {SAFETENSORS_WEIGHTS_NAME} alone. "
            "Save it again with a larger max_shard_size."
        )
    pickled = os.path.join(folder, WEIGHTS_NAME)
    if os.path.isfile(pickled):
        raise ValueError(
            f"{pickled} is a pickle, which can run code when it is read: LoReFT adapters are saved and read as "
            f"{SAFETENSORS_WEIGHTS_NAME} only. Load it where it was made, and save it again."
        )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that all values of `tensors` are finite.

    An adapter with other values answers with nonsense, which reaches the rows of other adapters in the same batch.

    Raises:
        ValueError: a value is infinite or not a number; the message names `where` and the tensors.
    """
    spoilt = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if spoilt:
        more = f" and {len(spoilt) - 3} more" if len(spoilt) > 3 else ""
        raise ValueError(
            f"{where} has values that are infinite or not a number in {', '.join(spoilt[:3])}{more}. "
            "Its training diverged, or the file is damaged."
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    values = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no `isfinite` for 8 bits
    return bool(torch.isfinite(values).all())


def guard_files() -> None:
    """Wrap the two methods that this module's docstring names. Calling it again is harmless."""
    wrap(PeftModel, "save_pretrained", _save_as_safetensors)
    wrap(PeftAdapterMixin, "load_adapter", _load_and_check)


def _is_loreft(config: Any) -> bool:
    return getattr(getattr(config, "peft_type", None), "value", None) == "LOREFT"


def _save_as_safetensors(
    save: Callable[..., Any],
    model: PeftModel,
    save_directory: str,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Do what `PeftModel.save_pretrained` does, but refuse a pickle of LoReFT, and a name that two adapters have."""
    _check_names(model, selected_adapters)
    configs = model.peft_config
    ours = [name for name in selected_adapters or configs if _is_loreft(configs.get(name))]
    if ours and not safe_serialization:
        raise ValueError(
            f"safe_serialization=False: {', '.join(map(repr, ours))} would be written as a pickle. LoReFT adapters "
            "are written and read as safetensors only. Leave safe_serialization=True."
        )
    return save(model, save_directory, safe_serialization, selected_adapters, *args, **kwargs)


def _check_names(model: nn.Module, selected: list[str] | None) -> None:
    """Refuse to save an adapter whose name an adapter of another method has too, which is loaded on the model within.

    PEFT keeps one config for both. So it would write the tensors of one, or none, beside the config of the other.

    Raises:
        ValueError: LoReFT and another method have an adapter of that name.
    """
    ours: set[str] = set()
    others: set[str] = set()
    for layer in model.modules():
        # Trainable tokens are a part of our adapter, or of the other.
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer):
            names = ours if _WEIGHTS in layer.adapter_layer_names else others
            names |= layer._get_available_adapters()
    clashing = ours & others
    if selected is not None:
        clashing &= set(selected)
    if clashing:
        raise ValueError(
            f"{min(clashing)!r} is the name of two adapters in this model, one of LoReFT and one of another method. "
            "PEFT has one config for both, so what is saved would be wrong. Load or create one of the two under "
            "another name: `adapter_name=...`."
        )


def _load_and_check(load: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Do what transformers' `load_adapter` does, and check the tensors. A refusal leaves the model as it was."""
    before = set(getattr(model, "peft_config", {}))
    active = model.active_adapters() if getattr(model, "_hf_peft_config_loaded", False) else []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    folder = _folder_to_load(*args, **kwargs)
    where = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME) if folder else "adapter_state_dict"
    try:
        info = load(model, *args, **kwargs)
        for name in _new_of_ours(model, before):
            if folder:
                check_weights_file(folder)  # without safetensors, transformers looks for a pickle
            _check_loaded(model, name, where, info)
    except Exception as error:
        new = _new_of_ours(model, before)
        if new:
            _take_out(model, new, active=active, trained=trained)
            if isinstance(error, SafetensorError):
                raise ValueError(f"{where} is damaged or cut short ({error}). Copy it again.") from error
            if isinstance(error, OSError) and folder:
                check_weights_file(folder)  # says more than that the file is not there
        raise
    return info


def _folder_to_load(*args: Any, **kwargs: Any) -> str | None:
    """Return the folder or Hub name in the arguments of `load_adapter`; None if they hold the tensors themselves."""
    load_config = kwargs.get("load_config")
    path_or_name = args[0] if args else kwargs.get("peft_model_id")
    path_or_name = path_or_name or getattr(load_config, "pretrained_model_name_or_path", None)
    if not path_or_name:
        return None
    options = {**(getattr(load_config, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {})}
    return os.path.join(path_or_name, options.get("subfolder") or "")


def _take_out(model: Any, names: list[str], active: list[str], trained: list[nn.Parameter]) -> None:
    """Undo the loading of adapters: make active again what was active, and trainable what was trainable."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and active:
            module.set_adapter(active)  # before the new ones are deleted: otherwise PEFT chooses for us, and warns
    for name in names:
        model.delete_adapter(name)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def _new_of_ours(model: Any, before: set[str]) -> list[str]:
    """Return the names of the LoReFT adapters of `model` that are not in `before`."""
    configs = getattr(model, "peft_config", {})
    return [name for name in configs if name not in before and _is_loreft(configs[name])]


def _check_loaded(model: Any, name: str, where: str, info: Any) -> None:
    """Raise ValueError if the file lacked a tensor of adapter `name`, had one too many, or one that is not finite."""
    marks = tuple(f".{holder}.{name}." for holder in ("loreft_weights", "modules_to_save"))
    own: dict[str, nn.Parameter] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if any(mark in key for mark in marks):
            own[key] = parameter
    if info is not None:  # older versions of transformers do not say what they found
        # With `tie="model"` the file has each tensor once. Under the names of the other layers it counts as missing.
        read = {id(parameter) for key, parameter in own.items() if key not in info.missing_keys}
        missing = sorted(key for key, parameter in own.items() if id(parameter) not in read)
        unknown = sorted(key for key in info.unexpected_keys if any(mark in key for mark in marks))
        if missing or unknown:
            raise ValueError(does_not_fit(where, missing, unknown))
    check_finite(own, where)


def does_not_fit(where: str, missing: Iterable[str], unknown: Iterable[str]) -> str:
    """Return the message about a file whose tensors are not those of its config and the model."""
    message = f"{where} does not fit its config and this model."
    missing_names, unknown_names = ", ".join(missing), ", ".join(unknown)
    if missing_names:
        message += f" Missing: {missing_names}."
    if unknown_names:
        message += f" In the file, but with no place in the model: {unknown_names}."
    return message
