"""The tensors of one adapter in a state dict: picked out to be saved, and named as in the model to be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import LoReftConfig
from ..edits.formulas import INTERVENTIONS
from ..edits.rotation import orthonormalise
from ..files import check_finite, does_not_fit
from .layer import CHILD, PREFIX, LoReftLayer


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


def own_tensors(adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoReFT's tensors of an adapter."""
    own = f".{CHILD}.{PREFIX}weights.{adapter_name}"
    return {key: tensor for key, tensor in state_dict.items() if f".{key}".rpartition(".")[0].endswith(own)}


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
    prefixes = _prefixes(model, adapter_name)
    parts = {part for prefix in (*prefixes, *parameters) for part in prefix.split(".")}
    clashing = parts & set(others)
    if not clashing:
        return
    whole = model.state_dict()
    lost = {key for key in whole if key not in state_dict and f"{key}.".startswith(prefixes)}
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


def _prefixes(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """What the keys of an adapter's tensors begin with: LoReFT's, and those of modules that are trained beside it."""
    prefixes: list[str] = []
    for name, module in model.named_modules():
        # State dicts leave out the names of torch's wrappers of checkpointed and of sharded modules.
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_fsdp_wrapped_module.", "")
        if isinstance(module, LoReftLayer) and adapter_name in module.plans:
            prefixes.append(f"{name}.{PREFIX}weights.{adapter_name}.")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            keys = module.adapter_state_dict_load_map(adapter_name).values()
            prefixes += [f"{name}.{key}." for key in keys]
    return tuple(prefixes)


def _is_another(tensor: Any, own: Any) -> bool:
    """Whether `tensor` is not the model's own tensor. Entries that are no tensors do not count."""
    if not isinstance(tensor, Tensor):
        return False
    return not isinstance(own, Tensor) or tensor.data_ptr() != own.data_ptr()


def to_file(tensors: dict[str, Tensor], config: LoReftConfig) -> dict[str, Tensor]:
    """The tensors of an adapter as its file has them: R with orthonormal rows, shared ones (`tie="model"`) once.

    Raises:
        ValueError: a tensor is a shard.
    """
    _check_gathered(tensors, INTERVENTIONS[config.intervention].shapes_of(config.act_fn, config.gate))
    if config.tie == "model":
        tensors = each_once(tensors)
    for key, tensor in tensors.items():
        if parameter_name(key) == "R" and not tensor.is_meta:
            tensors[key] = orthonormalise(tensor.float())[0]
    return tensors


def from_file(
    tensors: dict[str, Tensor], model: nn.Module, adapter_name: str, config: LoReftConfig
) -> dict[str, Tensor]:
    """The tensors of a file, shared ones (`tie="model"`) under the names of all layers. Its keys stay a file's.

    Raises:
        ValueError: a tensor is missing, has no place, or has values that are not finite.
    """
    own = [without_adapter_name(key, adapter_name) for key in own_tensors(adapter_name, model.state_dict())]
    what = f"The file of adapter {adapter_name!r}"
    given = tensors
    if config.tie == "model":
        tensors = to_all_layers(tensors, own)
    missing = [key for key in own if key not in tensors]
    unknown = [key for key in tensors if is_ours(key) and key not in own]
    if missing and all(key.startswith("base_model.model.base_model.model.") for key in missing):
        raise ValueError(
            f"{what} is for a base model, but was to be loaded on a PeftModel. Load it on the model within, and give "
            "it another name than the first adapter has: "
            'PeftModel.from_pretrained(first.base_model.model, folder, adapter_name="second").'
        )
    if missing or unknown:
        raise ValueError(does_not_fit(what, missing, unknown))
    check_finite(given, what)
    return tensors


def _check_gathered(tensors: dict[str, Tensor], shapes: dict[str, str]) -> None:
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
