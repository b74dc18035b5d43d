"""What is saved comes back bit for bit; a file that does not fit raises."""

import json
import os
import re

import pytest
import torch
from conftest import CAUSAL, HIDDEN, SEQ_CLS, VOCAB, build, randomise
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig

IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


def trained(base, **kwargs):
    """Return an adapter after some optimiser steps. Its stored R is not orthonormal after the last of them."""
    config = LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **kwargs})
    model = get_peft_model(base, config)
    randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(input_ids=IDS, labels=torch.tensor([[-100] * 6 + [5] * 5] * 2)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_reloaded_logits_are_bit_identical(family, low_cpu_mem_usage, tmp_path):
    model = trained(build(family))
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), before)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded), before)
    trainable = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True).eval()
    assert torch.equal(trainable(input_ids=IDS).logits.detach(), before)  # with gradients: another path to R


@pytest.mark.parametrize(
    "formula",
    [
        *(dict(intervention=name) for name in ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")),
        *(dict(intervention="red", r=8), dict(intervention="bias", r=8, gate=True)),
        *(dict(act_fn="relu", gate=True), dict(intervention="noreft", act_fn="gelu")),
    ],
    ids=str,
)
@pytest.mark.parametrize("tie", ["layer", "group", "position", "model"])
def test_every_formula_and_tie_comes_back(formula, tie, tmp_path):
    model = trained(build("llama"), tie=tie, positions={"0": "f2+l2", "1-": "f2+l1"}, **formula)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), logits(model))
    direct = AutoModelForCausalLM.from_pretrained
    build("llama").save_pretrained(tmp_path / "base")
    base = direct(tmp_path / "base").eval()
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base), logits(model))


def test_the_files_hold_the_weights_and_nothing_else(tmp_path):
    model = trained(build("llama"))
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.{}.loreft.loreft_weights.{}"
    assert sorted(tensors) == sorted(prefix.format(layer, name) for layer in range(3) for name in ("R", "W", "b"))
    assert tensors[prefix.format(1, "R")].shape == (4, HIDDEN) and tensors[prefix.format(1, "b")].shape == (4,)
    for layer in range(3):
        rotation = tensors[prefix.format(layer, "R")]
        assert (rotation @ rotation.T - torch.eye(4)).abs().max() < 1e-5
    overhead = os.path.getsize(tmp_path / "adapter_model.safetensors") - 4 * sum(t.numel() for t in tensors.values())
    assert overhead < 100 * len(tensors) + 200
    assert os.path.getsize(tmp_path / "adapter_config.json") < 2048


def test_one_shared_intervention_is_saved_once(tmp_path):
    trained(build("llama"), tie="model").save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3


def test_a_rotation_stored_in_bf16_is_saved_orthonormal(tmp_path):
    model = trained(build("llama"))
    for parameter in model.parameters():  # as TRL does to the adapter of a quantised base
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    before = logits(model)
    model.save_pretrained(tmp_path)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        if name.endswith(".R"):
            assert tensor.dtype == torch.float32
            assert (tensor @ tensor.T - torch.eye(4)).abs().max() < 1e-5
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("family", SEQ_CLS)
def test_the_classifier_head_is_saved(family, tmp_path):
    model = get_peft_model(build(family), LoReftConfig(task_type="SEQ_CLS", r=2, positions="f1")).eval()
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_named_adapters_and_auto_classes(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    first = logits(model)
    model.add_adapter("second", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1", layers=[1]))
    randomise(model, seed=9)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "second" / "README.md").exists()
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "second").eval()
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "second").eval()
    assert torch.equal(logits(by_peft), second) and torch.equal(logits(by_transformers), second)
    assert not torch.equal(first, second)
    by_peft.load_adapter(tmp_path / "out", "first")
    assert torch.equal(logits(by_peft), second)
    by_peft.set_adapter("first")
    model.set_adapter("default")
    assert torch.equal(logits(by_peft), logits(model))


def test_unsaved_model_config_is_as_peft_writes_it(tmp_path):
    trained(build("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOREFT" and config["positions"] == "f2+l2" and config["inference_mode"] is True


def broken(tmp_path, change):
    """Save an adapter, change its tensors, load it."""
    trained(build("llama")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, file)
    base = build("llama")
    return base, tensors


KEY = "base_model.model.model.layers.1.loreft.loreft_weights.W"


def test_a_missing_tensor_is_named(tmp_path):
    def change(tensors, file):
        del tensors[KEY]
        save_file(tensors, file)

    base, _ = broken(tmp_path, change)
    with pytest.raises(ValueError, match=f"Missing: {re.escape(KEY)}"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_renamed_tensor_is_named(tmp_path):
    def change(tensors, file):
        tensors[KEY + "x"] = tensors.pop(KEY)
        save_file(tensors, file)

    base, _ = broken(tmp_path, change)
    with pytest.raises(ValueError, match=f"Missing: {re.escape(KEY)}.*no place in the model: {re.escape(KEY)}x"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_wrong_shape_is_named(tmp_path):
    def change(tensors, file):
        tensors[KEY] = tensors[KEY][:, :-1].clone()
        save_file(tensors, file)

    base, _ = broken(tmp_path, change)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*layers\.1\.loreft\.loreft_weights\.default\.W"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    def change(tensors, file):
        file.write_bytes(file.read_bytes()[:-100])

    base, _ = broken(tmp_path, change)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or cut short"):
        PeftModel.from_pretrained(base, tmp_path)
