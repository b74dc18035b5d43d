"""`LoReftModel`: put LoReFT into a model, and take it out again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists, onload_layer
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import LoReftConfig
from ..edits.formulas import INTERVENTIONS
from ..edits.intervention import Intervention
from ..positions.index import weight_sets
from ..positions.layout import Layout
from ..positions.marks import Marks
from ..positions.wanted import Wanted
from .architectures import in_base, modules_of_decoder, uncompiled
from .conflicts import refuse_conflicts, refuse_shared_modules
from .forward import ATTRIBUTE, Attachment, LayerPlan, naming_rows, share_plan
from .hooks import attach, attach_parts, detach
from .layer import CHILD, PREFIX, LoReftLayer
from .merging import merge_layers
from .mixed_batches import hand_adapter_names
from .state_dicts import from_file, own_tensors, put_back, to_file, without_adapter_name
from .targets import Choice, Chosen, choose, targets_of
from .weighted import check_combination, fill_weighted, weighted_config


@dataclass
class _Injection:
    """One call of `inject_adapter`: what the methods that PEFT calls meanwhile have to know."""

    adapter_name: str
    attachment: Attachment
    in_state_dict: set[str]
    """Names of the modules that a given state dict has weights for."""
    replaces: bool
    """Whether the model has an adapter of that name."""
    choice: Choice | None = None
    """None until `_prepare_adapter_config` has chosen."""
    shared: Intervention | None = None
    """The one intervention of all layers, if `tie="model"`."""
    filled: set[LoReftLayer] = field(default_factory=set)
    """Layers that the adapter has been put into."""


class LoReftModel(BaseTuner):
    """A model whose hidden states LoReFT edits at a few positions and layers (arXiv 2404.03592).

    `peft.get_peft_model(model, LoReftConfig(...))` makes it. No module is replaced: each edited module gains one
    child, `loreft`, and a forward hook. Names and weights of the base model stay as they are.

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

    prefix = PREFIX
    tuner_layer_cls = LoReftLayer
    after_injection: ClassVar[list[Callable[[LoReftConfig], None]]] = []
    """Functions that are called with an adapter's config when it is in the model: rooms above enter theirs."""
    target_module_mapping: dict[str, list[str]] = {}  # blocks are found by rule, see architectures.py

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        with _restored_on_error(getattr(model, "peft_config", None)):
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter of that name in `peft_config`, or replace the one that the model has."""
        config = _as_ours(self.peft_config[adapter_name])
        base = uncompiled(model)
        refuse_shared_modules(base)
        has_answers = _has_answers(base, config)
        config.has_answers = has_answers  # type: ignore[misc]  # of this object, not of its class
        attachment = attach(base, has_answers)
        attachment.runtime[adapter_name] = config.runtime_config
        if config.tie == "model":
            state_dict = None  # it names the first layer alone: the config says which layers share the weights
        in_state_dict: set[str] = set()
        if state_dict is not None:
            # PEFT takes what stands before the prefix for the module. In our keys that is the module's child.
            of_child = f".{CHILD}.{self.prefix}"
            in_state_dict = {in_base(key.partition(of_child)[0]) for key in state_dict}
            state_dict = {key.replace(of_child, f".{self.prefix}"): value for key, value in state_dict.items()}
        replaces = any(adapter_name in layer.plans for layer in self._layers())
        self._injection = _Injection(adapter_name, attachment, in_state_dict, replaces)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if replaces:
                self._forget_elsewhere(adapter_name)
        finally:
            del self._injection  # unloaded layers must not live on here
            edited = [layer.block for layer in base.modules() if isinstance(layer, LoReftLayer)]
            if not edited:
                detach(base)
        attach_parts(base, edited)
        for listener in self.after_injection:
            listener(config)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> LoReftConfig:
        """Decide what is edited where, before anything is changed: all that can be wrong raises here."""
        config = _as_ours(peft_config)
        base = uncompiled(self.model)
        choice = choose(base, config, self._injection.in_state_dict)
        config.chosen_modules = {*choice.by_config}  # type: ignore[misc]  # of this object, not of its class
        self._injection.choice = choice
        targets = [name for name in choice.by_config if self._check_target_module_exists(config, name)]
        layers = [name for name, module in base.named_modules() if isinstance(module, LoReftLayer)]
        refuse_conflicts(base, config, targets, edited=[name.removesuffix(f".{CHILD}") for name in layers])
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        """Whether module `key` is edited. PEFT judges `exclude_modules` and `modules_to_save` on the chosen names.

        Returns:
            A bool, or PEFT's private mark of excluded modules, which PEFT's annotation leaves out.
        """
        asked = copy.copy(_as_ours(peft_config))
        asked.target_modules = asked.chosen_modules or set()
        name = in_base(key)
        found = check_target_module_exists(asked, name)
        return name in asked.target_modules if found else found

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """PEFT's check is about weights that LoRA would bypass. The output of any module can be edited."""

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Take out what a replaced adapter trained beside LoReFT: it must not be saved with the new adapter.

        PEFT calls this when all checks are passed.
        """
        choice = self._injection.choice
        assert choice is not None
        found = choice.only_in_state_dict or any(
            self._check_target_module_exists(peft_config, target) for target in choice.by_config
        )
        if self._injection.replaces and found:
            _take_out_trained_beside(model, self._injection.adapter_name)

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
        """Give `target` its child, and the child this adapter. Nothing is replaced."""
        config = _as_ours(peft_config)
        injection = self._injection
        assert injection.choice is not None
        chosen = injection.choice[in_base(current_key)]
        intervention = injection.shared
        if intervention is None:
            intervention = _new_intervention(config, chosen)
        if config.tie == "model":
            injection.shared = intervention
        layer: LoReftLayer | None = getattr(target, CHILD, None)
        if layer is None:
            attachment = _attachment_of(target, self.model, injection.attachment)
            parent_of_input = None if chosen.target.heads is None else parent
            layer = LoReftLayer(target, attachment, parent_of_input, get_quantization_kwargs(self.model))
            target.add_module(CHILD, layer)
        groups = chosen.positions.groups
        plan = LayerPlan(wanted_by(config, groups), groups, config.sharing, config.dropout)
        layer.update_layer(adapter_name, intervention, share_plan(plan))
        injection.filled.add(layer)

    def _forget_elsewhere(self, adapter_name: str) -> None:
        """Take a replaced adapter out of the layers that the new one does not edit."""
        for layer in list(self._layers()):
            if layer not in self._injection.filled and adapter_name in layer.plans:
                layer.forget(adapter_name)
                if not layer.plans:
                    layer.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self._layers():
                layer.cast_to_base(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT calls this only to take its other wrappers out again. Its own method also copies a weight, which a
        # classifier head of several layers does not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one for each row, to every layer of the forward that runs in the context."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({*adapter_names} - {*self.peft_config, "__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. adapter_names may have "
                f"{', '.join(sorted(self.peft_config))} and '__base__'."
            )
        attachment: Attachment = uncompiled(self.model).__dict__[ATTRIBUTE]
        with naming_rows(attachment, adapter_names), hand_adapter_names(self.model, adapter_names):
            yield

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the edits of an adapter by `scale` in all layers: 1 as trained, 0 nothing, −1 the reverse.

        The scale stays until it is set again. It is not saved. Raises ValueError if the model has no such adapter.
        """
        self._check_known([adapter])
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
        """Add an adapter whose edit is exactly the weighted sum of the edits of `adapters`; see `weighted.py`.

        Args:
            adapters: names of adapters that are alike: one spec of positions, tied alike, on the same modules.
            weights: one for each adapter; negative weights subtract.
            adapter_name: name of the new adapter. Adapters of rank r₁, r₂ ... give one of rank r₁ + r₂ ...
            combination_type: as for LoRA: `"cat"`, the exact sum; `"linear"`, the sum of the parameters, which is the
                sum of the edits only for formulas without a rank (`red`, `bias`).
            **settings: LoRA's settings of its other combination types, which must be left out.

        Raises:
            ValueError: the sum is no single edit of this family, or is not what `combination_type` asks for; the
                message says which.
        """
        self._check_known(adapters)
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r}: the model has an adapter of that name already.")
        if len(weights) != len(adapters):
            raise ValueError(f"weights has {len(weights)} entries for {len(adapters)} adapters.")
        chosen = {name: self.peft_config[name] for name in adapters}
        check_combination(combination_type, settings, chosen)
        n_layers = len(targets_of(uncompiled(self.model), chosen[adapters[0]]))
        config = weighted_config(chosen, n_layers)
        with _restored_on_error(self.peft_config):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
        for layer in self._layers():
            if adapter_name in layer.plans:
                summands = [
                    (weight, layer.weights(name)) for weight, name in zip(weights, adapters) if name in layer.plans
                ]
                fill_weighted(layer.weights(adapter_name), summands)

    def _layers(self) -> Iterator[LoReftLayer]:
        return (module for module in self.model.modules() if isinstance(module, LoReftLayer))

    def _check_known(self, adapters: Sequence[str]) -> None:
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"Adapters {list(adapters)}: there are {sorted(self.peft_config)}.")

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, new_parameters: bool = False
    ) -> None:
        """Fold adapters into the weights, if that is exact: any `component` but "block", positions "all".

        The linear map whose output or input is edited takes up the edit, exactly but for the rounding of the weights'
        type. Of weights that bitsandbytes or torchao has quantised that rounding is coarse. `unmerge_adapter` takes it
        out again. Trained tokens are merged too, and other PEFT layers of the model.

        Args:
            adapter_names: which; None for the active ones.
            safe_merge: whether to raise, before a layer is changed, if its result is not finite.
            new_parameters: whether a linear map may get a parameter that the base model does not have: a bias, if it
                has none; a weight of its own, if it shares one (tied embeddings); or a newly quantised weight. Code
                that reads the merged weights by the base's names would not find it. TRL does so when it sends weights
                to vLLM.

        Raises:
            ValueError: it cannot be merged; the message says which condition fails, and no weight has changed.
        """
        self._check_merge_allowed()
        self._merge_layers(adapter_names, safe_merge, new_parameters)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoReftLayer):
                with onload_layer(module):
                    module.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _merge_layers(self, adapter_names: list[str] | None, safe_merge: bool, new_parameters: bool) -> None:
        """Merge the LoReFT layers. Raises ValueError, before anything is changed, if one of them cannot be merged."""
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._check_known(names)
        merge_layers(self.model, names, adapter_names, safe_merge=safe_merge, new_parameters=new_parameters)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """Give the base model back, which PEFT's method does too, though its annotation says None."""
        if merge:
            self._merge_layers(adapter_names, safe_merge, new_parameters=True)
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
        """The tensors to save; see `to_file`."""
        config = _as_ours(config)
        shapes = INTERVENTIONS[config.intervention].shapes_of(config.act_fn, config.gate)
        put_back(model, adapter_name, state_dict, others=unwanted_adapter_names, parameters=shapes)
        return to_file(own_tensors(adapter_name, state_dict), config)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own takes any part of that name for the adapter's, such as a layer's number or `score`.
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file under the names that the model has for them; see `from_file`."""
        tensors = from_file(state_dict, model, adapter_name, _as_ours(config))
        in_model = {
            without_adapter_name(key, adapter_name): key for key in own_tensors(adapter_name, model.state_dict())
        }
        return {in_model.get(key, key): tensor for key, tensor in tensors.items()}


def wanted_by(config: LoReftConfig, groups: Layout) -> Wanted:
    """What a layer that edits `groups` asks a forward."""
    everything = groups.edits_every_token and config.sharing == "all"
    return Wanted(config.layout, Marks.of(config.response_template, config.instruction_template), everything)


def _as_ours(config: PeftConfig) -> LoReftConfig:
    """`config`, which PEFT's annotations take for a config of any method."""
    assert isinstance(config, LoReftConfig)
    return config


@contextmanager
def _restored_on_error(configs: Any) -> Iterator[None]:
    """Restore a model's configs by adapter if an adapter cannot be added.

    PEFT enters the config of a new adapter first, perhaps over that of an adapter that goes on editing.

    Args:
        configs: `peft_config` of the model; what is no dictionary is left alone.
    """
    before = dict(configs) if isinstance(configs, dict) else None
    try:
        yield
    except Exception:
        if before is not None:
            configs.clear()
            configs.update(before)
        raise


def _has_answers(model: Any, config: LoReftConfig) -> bool:
    """Whether rows of the model hold prompt and answer; without a task, whether it is a decoder that can generate."""
    if config.task_type is not None:
        return bool(config.task_type == TaskType.CAUSAL_LM)
    can_generate = hasattr(model, "can_generate") and model.can_generate()
    return bool(can_generate and not model.config.is_encoder_decoder)


def _attachment_of(target: nn.Module, model: nn.Module, attachment: Attachment) -> Attachment:
    """The attachment that a module's layer belongs to: the decoder of an encoder-decoder model has its own."""
    if attachment.decoder is None:
        return attachment
    in_decoder = modules_of_decoder(uncompiled(model)) or set()
    return attachment.decoder if id(target) in in_decoder else attachment


def _new_intervention(config: LoReftConfig, chosen: Chosen) -> Intervention:
    count = None if config.sharing == "all" else weight_sets(chosen.positions.groups, config.sharing)
    formula = INTERVENTIONS[config.intervention]
    return formula(
        d=chosen.target.d,
        r=chosen.r,
        count=count,
        init_weights=config.init_weights,
        act_fn=config.act_fn,
        gate=config.gate,
        heads=chosen.target.heads,
    )


def _take_out_trained_beside(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of PEFT's wrappers of modules that are trained beside LoReFT."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        adapters = module._get_available_adapters()
        if adapter_name not in adapters:
            continue
        if len(adapters) > 1:
            module.delete_adapter(adapter_name, new_active_adapters=None)
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)
