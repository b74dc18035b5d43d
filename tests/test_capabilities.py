"""What PEFT's table of methods looks at (`scripts/generate_method_capabilities.py` of its repository), and PEFT's own
functions that work for LoReFT as for LoRA. docs/other_tools.md shows our row."""

import dataclasses
import inspect
import re
import sys

import pytest
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reft import LoReftConfig
from peft_reft.tuner.layer import LoReftLayer


def found_by_pefts_script(peft_type):
    """What the script finds by looking at the classes, for any method."""
    config, model = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    module = sys.modules[model.tuner_layer_cls.__module__]
    layers = [
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, BaseTunerLayer) and each.__module__ == module.__name__
    ]
    fields = {field.name for field in dataclasses.fields(config)}
    papers = r"https://(?:huggingface\.co/papers/|arxiv\.org/(?:abs|pdf)/|openreview\.net/forum\?id=)[^\s)\"'>]+"
    links = [set(re.findall(papers, text)) for text in (config.__doc__, model.__doc__)]
    sources = [inspect.getsource(sys.modules[name]) for name in (model.__module__, module.__name__)]
    return {
        "mixed batches": hasattr(model, "_enable_peft_forward_hooks")
        and any(hasattr(layer, "_mixed_batch_forward") for layer in layers),
        "merging": any(layer.merge is not BaseTunerLayer.merge for layer in layers),
        "weighted sums": hasattr(model, "add_weighted_adapter"),
        "hot-swapping": peft_type in hotswap.CONFIG_KEYS_TO_CHECK,
        "modules_to_save": "modules_to_save" in fields,
        "trainable_token_indices": "trainable_token_indices" in fields,
        "parameters": "target_parameters" in fields,
        "every quantisation": any("resolve_quantization_backend" in source for source in sources),
        "paper": next((link for each in links if len(each) == 1 for link in each), None),
    }


def test_the_row_of_pefts_table():
    assert found_by_pefts_script(PeftType.LOREFT) == {
        "mixed batches": True,
        "merging": True,
        "weighted sums": True,
        "hot-swapping": True,
        "modules_to_save": True,
        "trainable_token_indices": True,
        "parameters": False,  # there is no way to edit the output of a parameter
        "every quantisation": True,
        "paper": "https://arxiv.org/abs/2404.03592",
    }


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "Linear": (lambda: nn.Linear(64, 64), True),
    "Embedding": (lambda: nn.Embedding(16, 64), True),
    "Conv1D (transformers)": (lambda: Conv1D(64, 64), True),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(64, num_heads=4), True),
    "LayerNorm": (lambda: nn.LayerNorm(64), True),
    "Conv1d": (lambda: nn.Conv1d(64, 64, 3), False),  # its channels are no hidden states of tokens
    "Conv2d": (lambda: nn.Conv2d(64, 64, 3), False),
    "Conv3d": (lambda: nn.Conv3d(64, 64, 3), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_pefts_table_tries(name):
    """With all defaults, as the script does."""
    make, supported = LAYERS[name]
    if not supported:
        with pytest.raises(ValueError, match="modules to edit need an attribute `out_features`"):
            get_peft_model(Holder(make()), LoReftConfig(target_modules=["layer"]))
        return
    model = get_peft_model(Holder(make()), LoReftConfig(target_modules=["layer"]))
    model.add_adapter("second", LoReftConfig(target_modules=["layer"]))
    model.set_adapter("second")
    (layer,) = [module for module in model.modules() if isinstance(module, LoReftLayer)]
    assert layer.active_adapters == ["second"] and not layer.supports_lora_conversion("second")
