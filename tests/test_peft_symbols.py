"""Every private symbol of PEFT that this package overrides or calls, with the signature it was written for.

When this fails, PEFT has changed under us: read what changed, adapt, run everything, then move the bound in
pyproject.toml.
"""

import ast
import inspect
import re
from pathlib import Path

import peft
import pytest
from peft import PeftConfig, PeftModel, helpers
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import hotswap, other
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers.integrations.peft import PeftAdapterMixin

import peft_reft.tuner
from peft_reft import LoReftConfig, LoReftModel
from peft_reft.tuner.layer import LoReftLayer

STATE_DICT = "cls, model, config, adapter_name, state_dict"
SIGNATURES = {
    # Overridden.
    (BaseTuner, "__init__"): "self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None",
    (BaseTuner, "_prepare_adapter_config"): "self, peft_config, model_config",
    (BaseTuner, "_prepare_model"): "self, peft_config, model",
    (BaseTuner, "_check_target_module_exists"): "peft_config, key",
    (BaseTuner, "_check_target_module_compatiblity"): "self, peft_config, model, target_name",
    (BaseTuner, "inject_adapter"): (
        "self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None"
    ),
    (BaseTuner, "_cast_adapter_dtype"): "self, adapter_name, autocast_adapter_dtype=True",
    (BaseTuner, "_create_and_replace"): (
        "self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None"
    ),
    (BaseTuner, "_replace_module"): "self, parent, child_name, new_module, child",
    (BaseTuner, "merge_adapter"): "self, adapter_names=None, safe_merge=False",
    (BaseTuner, "_check_merge_allowed"): "self",
    (BaseTuner, "_unload_and_optionally_merge"): (
        "self, merge=True, progressbar=False, safe_merge=False, adapter_names=None"
    ),
    (BaseTuner, "_get_adapter_state_dict"): f"{STATE_DICT}, unwanted_adapter_names",
    (BaseTuner, "_remove_adapter_name_from_key"): "cls, key, adapter_name",
    (BaseTuner, "_remap_adapter_state_dict_for_load"): STATE_DICT,
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer"): "self, adapter_name, device=None",
    (BaseTunerLayer, "get_base_layer"): "self",
    (BaseTunerLayer, "merge"): "self, safe_merge=False, adapter_names=None",
    (BaseTunerLayer, "unmerge"): "self",
    (BaseTunerLayer, "enable_adapters"): "self, enabled",
    (PeftConfig, "__post_init__"): "self",
    (PeftConfig, "from_pretrained"): "cls, pretrained_model_name_or_path, subfolder=None, **kwargs",
    (PeftConfig, "to_dict"): "self",
    (PeftConfig, "save_pretrained"): "self, save_directory, **kwargs",
    # Called, or found by PEFT under a name of ours.
    (tuners_utils, "_maybe_include_all_linear_layers"): "peft_config, model",
    (tuners_utils, "check_target_module_exists"): "config, key",
    (tuners_utils, "check_adapters_to_merge"): "module, adapter_names=None",
    (other, "_get_input_embeddings_name"): "model, default=None",
    (other, "_get_module_names_tied_with_embedding"): "model",
    (AuxiliaryTrainingWrapper, "_get_available_adapters"): "self",
    (AuxiliaryTrainingWrapper, "_error_message_name"): "self",
    (AuxiliaryTrainingWrapper, "adapter_state_dict_load_map"): "self, adapter_name",
    (ModulesToSaveWrapper, "delete_adapter"): "self, adapter_name, new_active_adapters",
    (PeftModel, "_enable_peft_forward_hooks"): "self, *args, **kwargs",
    # Wrapped.
    (hotswap, "hotswap_adapter_from_state_dict"): "model, state_dict, adapter_name, config, parameter_prefix='lora_'",
    (hotswap, "prepare_model_for_compiled_hotswap"): "model, target_rank=None, config=None, check_compiled='error'",
    (helpers, "rescale_adapter_scale"): "model, multiplier",
    (PeftModel, "save_pretrained"): (
        "self, save_directory, safe_serialization=True, selected_adapters=None, save_embedding_layers='auto', "
        "is_main_process=True, path_initial_model_for_weight_conversion=None, **kwargs"
    ),
}

ASKED_SINCE_0_21 = {"_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"}
"""PEFT 0.20 has none of these; `peft_reft.tuner.older_peft` wraps its functions instead."""
if peft.__version__.startswith("0.20."):
    SIGNATURES = {key: value for key, value in SIGNATURES.items() if key[1] not in ASKED_SINCE_0_21}


def function(owner, name):
    found = inspect.getattr_static(owner, name)
    return getattr(found, "__func__", found)


def signature(owner, name):
    parameters = inspect.signature(function(owner, name)).parameters.values()
    return ", ".join(str(each.replace(annotation=inspect.Parameter.empty)) for each in parameters)


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda value: getattr(value, "__name__", value))
def test_the_signature_is_that_which_we_wrote_for(owner, name):
    assert signature(owner, name) == SIGNATURES[owner, name], f"peft {peft.__version__}"


def test_the_table_has_all_that_is_overridden():
    overridden = set()
    for ours, theirs in ((LoReftModel, BaseTuner), (LoReftLayer, BaseTunerLayer), (LoReftConfig, PeftConfig)):
        for name in vars(ours):
            if hasattr(theirs, name) and inspect.isfunction(function(theirs, name)) and not hasattr(object, name):
                overridden.add((theirs, name))
    assert overridden <= {*SIGNATURES}


def imported_private_names():
    imported = set()
    for file in Path(peft_reft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft":
                imported |= {alias.name for alias in node.names if alias.name.startswith("_")}
    return imported


def test_the_table_has_all_private_names_that_are_imported():
    known = {name for _, name in SIGNATURES}
    imported = imported_private_names()
    assert imported and imported <= known


def test_the_page_has_all_private_names():
    """The table in the docstring of `peft_reft.tuner`: each symbol, what for, and the public way."""
    names = {name for _, name in SIGNATURES} | imported_private_names()
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    described = set(re.findall(r"^`(_\w+)`  +\S", peft_reft.tuner.__doc__, re.MULTILINE))
    assert described == private | ASKED_SINCE_0_21


def test_what_of_transformers_is_wrapped():
    """Arguments are handed on as they come; these two are read."""
    assert signature(PeftAdapterMixin, "load_adapter").startswith("self, peft_model_id=None, adapter_name=None")
    assert "load_config=None" in signature(PeftAdapterMixin, "load_adapter")
