"""`LoReftModel`: put LoReFT into a model, and take it out again."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    onload_layer,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import LoReftConfig
from ..edits.formulas import INTERVENTIONS
from ..edits.intervention import Intervention
from ..edits.rotation import orthonormalise
from ..files import check_finite, does_not_fit
from ..positions.index import Arrangement
from ..positions.marks import Marks
from ..positions.spec import Layout, Positions
from ..positions.wanted import Wanted
from .architectures import (
    Target,
    check_streams,
    check_tokens,
    find_targets,
    modules_of_decoder,
    modules_of_encoder,
    output_size,
)
from .conflicts import refuse_conflicts
from .forward import ATTRIBUTE, LayerPlan, naming_rows, share_plan
from .hooks import attach, attach_parts, detach
from .layer import CHILD, LoReftLayer
from .merging import NEW_BIAS, SHARED_WEIGHT, projection_of
from .mixed_batches import hand_adapter_names
from .weighted import check_combination, fill_weighted, weighted_config

MERGE_ADVICE = "Keep the adapter beside the model; `unload()` gives the base model back without it."


class LoReftModel(BaseTuner):
    """A model whose hidden states LoReFT edits at a few positions and layers (arXiv 2404.03592).

    Made by `peft.get_peft_model(model, LoReftConfig(...))` rather than by hand. Blocks are not replaced: each edited
    module gains one child, `loreft`, and a forward hook. Names and weights of the base model stay as they are.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_reft import LoReftConfig
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
        >>> model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f1+l1"))
        >>> model.print_trainable_parameters()  # 2 layers x (2 x 4 x 32 + 4)
        trainable params: 520 || all params: 27,560 || trainable%: 1.8868
    """

    prefix = "loreft_"
    tuner_layer_cls = LoReftLayer
    after_injection: ClassVar[list[Callable[[LoReftConfig], None]]] = []
    """Called with an adapter's config when it is in the model: how rooms above hear of it (see `register`)."""
    target_module_mapping: dict[str, list[str]] = {}  # blocks are found by rule, see architectures.py

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        shared = getattr(model, "peft_config", None)
        before = dict(shared) if isinstance(shared, dict) else None
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            # PEFT has entered the config of what could not be added, perhaps over that of one which still edits.
            if isinstance(shared, dict) and before is not None:
                shared.clear()
                shared.update(before)
            raise

    @property
    def _base(self) -> nn.Module:
        """The model itself, if `torch.compile` has wrapped it: PEFT, too, leaves the wrapper out of names."""
        wrapped: nn.Module | None = getattr(self.model, "_orig_mod", None)
        model: nn.Module = self.model
        return model if wrapped is None else wrapped

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> LoReftConfig:
        """Decide what is edited where, before anything is changed: all that can be wrong raises here."""
        config = _as_ours(peft_config)
        encoder, self._decoder = modules_of_encoder(self._base), modules_of_decoder(self._base)
        read = None if encoder is None else encoder | (self._decoder or set())
        if isinstance(config.target_modules, str):
            self._write_out_shorthand(config, read)
        check_tokens(self.model)
        targets = self._find_targets(config)
        check_streams(self.model, targets)
        outside = [target.name for target in targets if read is not None and not self._is_in(target.name, read)]
        if outside:
            raise ValueError(
                f"target_modules names {', '.join(outside)}, in neither the encoder nor the decoder of "
                f"{type(self._base).__name__}. Only modules of these can be edited: positions count in their inputs."
            )
        specs = config.positions_by_layer(len(targets)) if targets else {}
        ranks = config.ranks(specs, len(targets)) if targets else {}
        self._targets: dict[str, tuple[Target, Positions, int | None]] = {}
        for target in targets:
            if target.layer in specs:
                r = ranks[target.layer]
                if r is not None and r > target.d:
                    raise ValueError(
                        f"r={r} is larger than the hidden size {target.d} of {target.name}: "
                        f"allowed are 1 to {target.d}."
                    )
                self._targets[target.name] = (target, specs[target.layer], r)
        self._beyond = self._targets_of_checkpoint(config, targets)
        if (
            config.tie == "model"
            and len(sizes := {target.d for target, *_ in (self._targets | self._beyond).values()}) > 1
        ):
            raise ValueError(f"tie='model' needs one hidden size, but the targets have {sorted(sizes)}.")
        self._shared: Intervention | None = None
        config.chosen_modules = set(self._targets)  # type: ignore[misc]  # of this object, not of its class
        names = [name for name in self._targets if self._check_target_module_exists(config, name)]
        layers = [name for name, module in self._base.named_modules() if isinstance(module, LoReftLayer)]
        refuse_conflicts(self._base, config, names, [name.removesuffix(f".{CHILD}") for name in layers])
        return config

    def _write_out_shorthand(self, peft_config: LoReftConfig, read: set[int] | None) -> None:
        """`target_modules="all-linear"` becomes PEFT's list of names, less maps that do not read token by token."""
        shorthand = peft_config.target_modules
        _maybe_include_all_linear_layers(peft_config, self._base)
        if peft_config.target_modules is not shorthand:
            peft_config.target_modules = {
                name
                for name in peft_config.target_modules or ()
                if "pooler" not in name.split(".") and (read is None or self._is_in(name, read))
            }

    def _targets_of_checkpoint(
        self, peft_config: LoReftConfig, targets: list[Target]
    ) -> dict[str, tuple[Target, Positions, int | None]]:
        """What a state dict, from whose keys the adapter is injected, has beyond the config."""
        there = {name for name, _ in self._base.named_modules()}
        names = sorted((self._checkpoint & there) - {*self._targets})
        if not names:
            return {}
        wide = copy.copy(peft_config)
        wide.layers = "all"
        by_name = {target.name: target for target in targets}
        specs = wide.positions_by_layer(len(targets))
        beyond: dict[str, tuple[Target, Positions, int | None]] = {}
        for name in names:
            target = by_name.get(name) or Target(name, -1, output_size(self._base, name))
            spec = specs.get(target.layer) or (wide.specs[0] if isinstance(wide.positions, str) else None)
            if spec is None:
                raise ValueError(f"state_dict has {name}, but positions={peft_config.positions!r} has no spec there.")
            beyond[name] = (target, spec, wide.ranks([target.layer], len(targets))[target.layer])
        return beyond

    def _find_targets(self, peft_config: LoReftConfig) -> list[Target]:
        if peft_config.target_modules is None:
            return find_targets(self._base, peft_config.component)
        names = [
            name
            for name, _ in self._base.named_modules()
            if name and f".{CHILD}." not in f".{name}." and check_target_module_exists(peft_config, name)
        ]
        return [Target(name, layer, output_size(self._base, name)) for layer, name in enumerate(names)]

    def _is_in(self, name: str, modules: set[int]) -> bool:
        return id(self._base.get_submodule(name)) in modules

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """Whether module `key` is edited. PEFT judges `exclude_modules` and `modules_to_save` on the chosen names."""
        asked = copy.copy(_as_ours(peft_config))
        asked.target_modules = asked.chosen_modules or set()
        key = key.removeprefix("_orig_mod.")
        found = check_target_module_exists(asked, key)
        return key in asked.target_modules if found else found

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """PEFT's check concerns weights that LoRA would bypass; the outputs of any module can be edited."""

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        # All checks are passed. What a replaced adapter trained besides must not be saved with the new one.
        found = self._beyond or any(self._check_target_module_exists(peft_config, name) for name in self._targets)
        if self._replaced is None or not found:
            return
        for name, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper) and self._replaced in module._get_available_adapters():
                if len(module._get_available_adapters()) > 1:
                    module.delete_adapter(self._replaced, new_active_adapters=None)
                else:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, module.original_module)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        task = self.peft_config[adapter_name].task_type
        base: Any = getattr(model, "_orig_mod", model)
        can_generate = hasattr(base, "can_generate") and base.can_generate() and not base.config.is_encoder_decoder
        has_answers = task == TaskType.CAUSAL_LM or (task is None and can_generate)
        self.peft_config[adapter_name].has_answers = has_answers
        self._attachment = attach(base, has_answers)
        below = f".{CHILD}.{self.prefix}"
        self._checkpoint: set[str] = set()
        if self.peft_config[adapter_name].tie == "model":
            state_dict = None  # it names the first layer alone: the config says which layers share the weights
        if state_dict is not None:  # PEFT finds modules by the part of a key before the prefix: that is our child
            self._checkpoint = {key.partition(below)[0].removeprefix("_orig_mod.") for key in state_dict}
            state_dict = {key.replace(below, f".{self.prefix}"): value for key, value in state_dict.items()}
        replaces = any(adapter_name in layer.plans for layer in self._layers())
        self._replaced = adapter_name if replaces else None
        self._filled: set[LoReftLayer] = set()
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if replaces:
                self._forget_elsewhere(adapter_name)
        finally:
            self._filled.clear()  # unloaded layers must not live on here
            if not (edited := [layer.block for layer in base.modules() if isinstance(layer, LoReftLayer)]):
                detach(base)
        attach_parts(base, edited)
        for listener in self.after_injection:
            listener(self.peft_config[adapter_name])

    def _forget_elsewhere(self, adapter_name: str) -> None:
        """`get_peft_model` was called again on one base: the adapter is the new one alone."""
        for layer in list(self._layers()):
            if layer not in self._filled and adapter_name in layer.plans:
                layer.forget(adapter_name)
                if not layer.plans:
                    layer.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self._layers():
                layer.cast_to_base(adapter_name)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = _as_ours(peft_config)
        name = current_key.removeprefix("_orig_mod.")
        chosen, spec, r = self._targets.get(name) or self._beyond[name]
        by: Arrangement = config.tie if config.tie in ("group", "position") else "all"
        count = {
            "all": None,
            "group": len(spec.groups),
            "position": sum(group.count or 0 for group in spec.groups),
        }[by]
        intervention = self._shared
        if intervention is None:
            formula = INTERVENTIONS[config.intervention]
            intervention = formula(chosen.d, r, count, config.init_weights, config.act_fn, config.gate)
        if config.tie == "model":
            self._shared = intervention
        layer = getattr(target, CHILD, None)
        if layer is None:
            in_decoder = self._decoder is not None and id(target) in self._decoder
            attachment = self._attachment.decoder if in_decoder else self._attachment
            assert attachment is not None
            layer = LoReftLayer(target, attachment)
            target.add_module(CHILD, layer)
        plan = LayerPlan(wanted_by(config, spec.groups), spec.groups, by, config.dropout)
        layer.update_layer(adapter_name, intervention, share_plan(plan))
        self._filled.add(layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Called only to take PEFT's other wrappers out again. PEFT's own also copies a weight, which a classifier head
        # of several layers does not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to hand `adapter_names`, one a row, to every layer of a forward."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if unknown := sorted({*adapter_names} - {*self.peft_config, "__base__"}):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. adapter_names may have "
                f"{', '.join(sorted(self.peft_config))} and '__base__'."
            )
        attachment = getattr(self.model, "_orig_mod", self.model).__dict__[ATTRIBUTE]
        with naming_rows(attachment, adapter_names), hand_adapter_names(self.model, adapter_names):
            yield

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the edits of an adapter by `scale` in all layers: 1 as trained, 0 nothing, −1 the reverse.

        It lasts until it is set again, and is not saved. Raises ValueError if there is no adapter of that name.
        """
        self._known([adapter])
        for layer in self._layers():
            layer.set_scale(adapter, scale)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **settings: Any,
    ) -> None:
        """Add an adapter whose edit is exactly the weighted sum of the edits of `adapters`; see `composition.py`.

        Args:
            adapters: names of adapters of one kind: with one spec of positions, tied alike, on the same modules.
            weights: one for each; negative ones subtract.
            adapter_name: name of the new adapter. Those of rank r₁, r₂ ... give one of rank r₁ + r₂ ...
            combination_type: as for LoRA: `"cat"`, the exact sum; `"linear"`, the sum of the parameters, which is that
                of the edits for formulas without a rank (`red`, `bias`) alone.
            **settings: LoRA's settings of its other combination types, which must be left out.

        Raises:
            ValueError: the sum is no single edit of this family, or is not what `combination_type` asks for; the
                message says which.
        """
        self._known(adapters)
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r}: there is an adapter of that name already.")
        if len(weights) != len(adapters):
            raise ValueError(f"weights has {len(weights)} entries for {len(adapters)} adapters.")
        chosen = {name: self.peft_config[name] for name in adapters}
        check_combination(combination_type, settings, chosen)
        config = weighted_config(chosen, len(self._find_targets(chosen[adapters[0]])))
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in self._layers():
            if adapter_name in layer.plans:
                summands = [(w, layer.weights(name)) for w, name in zip(weights, adapters) if name in layer.plans]
                fill_weighted(layer.weights(adapter_name), summands)

    def _layers(self) -> Iterator[LoReftLayer]:
        return (module for module in self.model.modules() if isinstance(module, LoReftLayer))

    def _known(self, adapters: Sequence[str]) -> None:
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"Adapters {list(adapters)}: there are {sorted(self.peft_config)}.")

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, new_parameters: bool = False
    ) -> None:
        """Fold adapters into the weights, where that is exact: `component` "attention" or "mlp", positions "all".

        The linear map whose output is edited takes up the edit. Exact to the rounding of the weights' type;
        `unmerge_adapter` takes it out again. Trained tokens are merged too, and other PEFT layers of the model.

        Args:
            adapter_names: which; None for the active ones.
            safe_merge: whether to raise, before a layer is changed, if its result is not finite.
            new_parameters: whether a linear map may get a parameter that the base's does not have: a bias, if it has
                none, or a weight of its own, if it shares one (tied embeddings). Who reads the merged weights by the
                base's names would not find it, as TRL, which merges so before it sends weights to vLLM.

        Raises:
            ValueError: it cannot be merged; the message says which condition fails, and no weight has changed.
        """
        self._check_merge_allowed()
        self._fold(adapter_names, safe_merge, new_parameters)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoReftLayer):
                with onload_layer(module):
                    module.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _fold(self, adapter_names: list[str] | None, safe_merge: bool, new_parameters: bool) -> None:
        """Merge the LoReFT layers. Raises ValueError, before anything is changed, if one of them cannot be merged."""
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        blocks = {id(block) for lists in self.model.modules() if isinstance(lists, nn.ModuleList) for block in lists}
        of_modules = [parameter for module in self.model.modules() for parameter in module._parameters.values()]
        times = Counter(id(parameter) for parameter in of_modules if parameter is not None)
        chosen = [layer for layer in self._layers() if layer.plans.keys() & names]
        shared = set()
        reasons = []
        for layer in chosen:
            reason = layer.why_not_merge(names)
            if id(layer.block) in blocks:
                reason = "a block's output is edited, which no single weight makes (allowed: 'attention', 'mlp')"
            reasons.append(reason)
        for layer in chosen if not any(reasons) else ():
            projection = projection_of(layer.block)
            if times[id(projection.weight)] > 1:
                shared.add(layer)
                reasons.append(None if new_parameters else SHARED_WEIGHT.format(type(projection).__name__))
            elif not new_parameters and layer.gains_bias(names):
                reasons.append(NEW_BIAS.format(type(projection).__name__))
        if reason := next(filter(None, reasons), None):
            raise ValueError(f"LoReFT cannot be merged into the weights: {reason}. {MERGE_ADVICE}")
        for layer in chosen:
            layer.merge(safe_merge, adapter_names, new_parameters=True, shared=layer in shared)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        # PEFT declares that this returns None, but it returns the base model.
        if merge:
            self._fold(adapter_names, safe_merge, new_parameters=True)
            gained = [layer for layer in self._layers() if layer.has_new_bias]
            if gained:
                warnings.warn(
                    f"{len(gained)} linear maps without a bias got one by merging. Most model configs cannot say so: "
                    "a saved model may lose it when loaded with `from_pretrained`. Use it as it is, or keep the "
                    "adapter.",
                    stacklevel=2,
                )
        else:
            for module in self.model.modules():
                if isinstance(module, BaseTunerLayer) and module.merged:
                    with onload_layer(module):
                        module.unmerge()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for module in list(model.modules()):
            if isinstance(module, LoReftLayer):
                module.remove()
        detach(model)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """R as it computes, W and b; with `tie="model"` once, under the first layer's name."""
        config = _as_ours(config)
        shapes = INTERVENTIONS[config.intervention].shapes_of(config.act_fn, config.gate)
        _put_back(model, adapter_name, state_dict, unwanted_adapter_names, shapes)
        prefixes = {prefix for prefix in _key_prefixes(model, adapter_name) if cls._is_own(prefix)}
        found = _filter_state_dict_by_key_prefixes(state_dict, prefixes)
        _check_gathered(found, shapes)
        if config.tie == "model":
            first_of_each = {key.rpartition(".")[2]: key for key in reversed(found)}
            found = {key: found[key] for key in found if key in first_of_each.values()}
        return {
            key: orthonormalise(value.float())[0] if key.endswith(".R") and not value.is_meta else value
            for key, value in found.items()
        }

    @classmethod
    def _is_own(cls, key: str) -> bool:
        return f".{CHILD}.{cls.prefix}" in f".{key}"

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own takes any part of that name for the adapter's, such as a layer's number or `score`.
        before, holder, after = key.rpartition(f"{CHILD}.{cls.prefix}weights.")
        return f"{before}{holder}{after.removeprefix(f'{adapter_name}.')}" if holder else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Names of the model for names of the file.

        Raises:
            ValueError: a tensor is missing, has no place, or has values that are not finite.
        """
        own = _filter_state_dict_by_key_prefixes(model.state_dict(), _key_prefixes(model, adapter_name))
        own = {name: tensor for name, tensor in own.items() if cls._is_own(name)}
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        if _as_ours(config).tie == "model":
            shared = {name.rpartition(".")[2]: tensor for name, tensor in remapped.items() if cls._is_own(name)}
            remapped |= {name: shared[last] for name in own if (last := name.rpartition(".")[2]) in shared}
        missing = [cls._remove_adapter_name_from_key(name, adapter_name) for name in own if name not in remapped]
        unknown = [name for name in remapped if cls._is_own(name) and name not in own]
        if missing or unknown:
            raise ValueError(does_not_fit(f"The file of adapter {adapter_name!r}", missing, unknown))
        check_finite(state_dict, f"The file of adapter {adapter_name!r}")
        return remapped


def _as_ours(config: PeftConfig) -> LoReftConfig:
    """`config`, which PEFT's annotations take for a config of any method."""
    assert isinstance(config, LoReftConfig)
    return config


def _put_back(
    model: nn.Module,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    others: Sequence[str],
    parameters: Iterable[str],
) -> None:
    """Enter in `state_dict` what PEFT has dropped from it although it is this adapter's.

    PEFT drops every key that has the name of another adapter between dots: if one is named "b" every bias of the
    others, if one is named "layers" everything. Modules that are trained besides are looked up in `state_dict`, too,
    after this.

    Raises:
        ValueError: something is lost, and `state_dict` is not of this model's own tensors.
    """
    prefixes = _key_prefixes(model, adapter_name)
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
            f"Adapter {adapter_name!r} cannot be saved from a state_dict that is given: PEFT takes {min(lost)} for "
            f"a tensor of adapter {min(clashing)!r}, whose name is a part of it. Give that adapter another name."
        )
    complete = {key: whole[key] for key in whole if key in lost or key in state_dict}
    state_dict.clear()
    state_dict.update(complete)


def _is_another(tensor: Any, own: Any) -> bool:
    """Whether `tensor` is not the model's own; entries that are no tensors do not count."""
    return isinstance(tensor, Tensor) and (not isinstance(own, Tensor) or tensor.data_ptr() != own.data_ptr())


def _check_gathered(tensors: dict[str, Tensor], shapes: dict[str, str]) -> None:
    """Raise ValueError if tensors are flat or empty, as the shards of FSDP and ZeRO-3 are."""
    for key, tensor in tensors.items():
        if not tensor.numel() or tensor.ndim < len(shapes[key.rpartition(".")[2]]):
            raise ValueError(
                f"{key} is a shard of shape {tuple(tensor.shape)}, which no file can be made of. Save under "
                "`deepspeed.zero.GatheredParameters` (ZeRO-3) or `FullyShardedDataParallel.summon_full_params` (FSDP)."
            )


def _key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """As they are in state dicts, from which torch's wrappers of checkpointed and of sharded modules are left out."""
    prefixes: set[str] = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    for wrapper in ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        prefixes = {prefix.replace(wrapper, "") for prefix in prefixes}
    return prefixes


def wanted_by(config: LoReftConfig, groups: Layout) -> Wanted:
    """What a layer that edits `groups` asks a forward for."""
    kinds = {group.kind for group in groups if group.count is None}
    everything = {"p", "g"} <= kinds and config.tie in ("layer", "model")
    return Wanted(config.layout, Marks.of(config.response_template, config.instruction_template), everything)
