"""Folders that `adapters` saves, and the logits it computes with them, for tests/test_convert.py.

In an environment of its own, which this package is not part of:

    pip install torch adapters==1.3.0
    cd tests/parity && python make_adapters.py
"""

import shutil
from pathlib import Path

import adapters
import torch
from adapters import DiReftConfig, LoReftConfig, NoReftConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
NUMBERS = load_file(HERE / "end_to_end.safetensors")
CASES = {
    "loreft_untied": LoReftConfig(r=4, prefix_positions=2, suffix_positions=3),
    "loreft_tied": LoReftConfig(r=4, prefix_positions=2, suffix_positions=2, tied_weights=True, layers=[0, 2]),
    "loreft_suffix": LoReftConfig(r=2, prefix_positions=0, suffix_positions=2),
    "noreft_leakyrelu": NoReftConfig(r=3, prefix_positions=3, non_linearity="leakyrelu"),
    "nodireft": DiReftConfig(r=4, prefix_positions=1, suffix_positions=1),
}

logits = {}
for name, config in CASES.items():
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained("llama", dtype=torch.float32)  # the name is saved
    adapters.init(model)
    model.add_adapter("mine", config=config)
    model.set_active_adapters("mine")
    with torch.no_grad():  # away from the start
        for key, parameter in model.named_parameters():
            if "reft" in key:
                noise = torch.randn_like(parameter)
                parameter.add_(noise.triu(1) if "original" in key else 0.3 * noise)
    model.eval()
    with torch.no_grad():
        out = model(input_ids=NUMBERS["input_ids"], attention_mask=NUMBERS["attention_mask"])
    logits[name] = out.logits.contiguous()
    folder = HERE / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    model.save_adapter(str(folder), "mine", use_safetensors=name == "nodireft", with_head=False)
save_file(logits, HERE / "adapters" / "logits.safetensors")
