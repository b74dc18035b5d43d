"""The tensors of one adapter in a state dict: picked out to be saved, and named as in the model to be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import CHILD, PREFIX


def is_ours(key: str) -> bool:
    """Whether a key is one of LoReFT's tensors, not of another method's."""
    return f".{CHILD}.{PREFIX}" in f".{key}"


def parameter_name(key: str) -> str:
    """`"R"` of the key `"model.layers.3.loreft.loreft_weights.default.R"`."""
    return key.rpartition(".")[2]


def without_adapter_name(key: str, adapter_name: str) -> str:
    """The key of a file for a key of the model: the same without the adapter's name."""
    before, holder, after = key.rpartition(f"{CHILD}.{PREFIX}weights.")
    return f"{before}{holder}{after.removeprefix(f'{adapter_name}.')}" if holder else key


def key_prefixes(model: nn.Module, adapter_name: str) -> set[str]:
    """What the keys of an adapter's tensors begin with, LoReFT's and those of other methods.

    State dicts leave out the names of torch's wrappers of checkpointed and of sharded modules.
    """
    prefixes: set[str] = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    for wrapper in ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        prefixes = {prefix.replace(wrapper, "") for prefix in prefixes}
    return prefixes


def own_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoReFT's tensors of an adapter."""
    prefixes = {prefix for prefix in key_prefixes(model, adapter_name) if is_ours(prefix)}
    found: dict[str, Tensor] = _filter_state_dict_by_key_prefixes(state_dict, prefixes)
    return found


def each_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that all layers share (`tie="model"`), under the keys of the first layer alone."""
    first: dict[str, str] = {}
    for key in tensors:
        first.setdefault(parameter_name(key), key)
    return {key: tensors[key] for key in first.values()}


def to_all_layers(tensors: dict[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """The inverse of `each_once`: `tensors`, and the shared ones under all of `keys` besides."""
    shared = {parameter_name(key): tensor for key, tensor in tensors.items() if is_ours(key)}
    repeated = {key: shared[parameter_name(key)] for key in keys if parameter_name(key) in shared}
    return {**tensors, **repeated}


def put_back(
    model: nn.Module,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    others: Sequence[str],
    parameters: Iterable[str],
) -> None:
    """Enter in `state_dict` the adapter's tensors that PEFT has dropped from it.

    PEFT drops every key that has the name of another adapter between dots. If another adapter is named "b" it drops
    every bias; if one is named "layers" it drops everything. PEFT looks up modules that are trained beside LoReFT in
    `state_dict`, too, after this.

    Args:
        model: the model.
        adapter_name: whose tensors are saved.
        state_dict: what PEFT has left; completed in place.
        others: names of the other adapters.
        parameters: names of the parameters of the adapter's formula.

    Raises:
        ValueError: something is lost, and `state_dict` does not hold this model's own tensors.
    """
    prefixes = key_prefixes(model, adapter_name)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            prefixes |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()}
    parts = {part for prefix in (*prefixes, *parameters) for part in prefix.split(".")}
    clashing = parts & set(others)
    if not clashing:
        return
    whole = model.state_dict()
    lost = {key for key in _filter_state_dict_by_key_prefixes(whole, prefixes) if key not in state_dict}
    if not lost:
        return
    if any(_is_another(tensor, whole.get(key)) for key, tensor in state_dict.items()):
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be saved from the given state_dict: PEFT takes {min(lost)} for a "
            f"tensor of adapter {min(clashing)!r}, whose name is a part of it. Give that adapter another name."
        )
    complete = {key: whole[key] for key in whole if key in lost or key in state_dict}
    state_dict.clear()
    state_dict.update(complete)


def _is_another(tensor: Any, own: Any) -> bool:
    """Whether `tensor` is not the model's own tensor. Entries that are no tensors do not count."""
    if not isinstance(tensor, Tensor):
        return False
    return not isinstance(own, Tensor) or tensor.data_ptr() != own.data_ptr()


def check_gathered(tensors: dict[str, Tensor], shapes: dict[str, str]) -> None:
    """Raise ValueError if tensors are flat or empty, as the shards of FSDP and ZeRO-3 are.

    Args:
        tensors: LoReFT's, by key.
        shapes: the dimensions of each parameter of the formula, such as `"rd"`.
    """
    for key, tensor in tensors.items():
        if not tensor.numel() or tensor.ndim < len(shapes[parameter_name(key)]):
            raise ValueError(
                f"{key} is a shard of shape {tuple(tensor.shape)}, from which no file can be made. Save under "
                "`deepspeed.zero.GatheredParameters` (ZeRO-3) or `FullyShardedDataParallel.summon_full_params` (FSDP)."
            )
