"""Offloaded weights: `device_map` with CPU and disk, accelerate's hooks."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import build, randomise
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig
from peft_reft.positions.sources import Given
from peft_reft.positions.spec import Positions
from peft_reft.positions.wanted import Wanted
from peft_reft.tuner.forward import Attachment, LayerPlan, begin, end

CPU = torch.device("cpu")
PARTS = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm", "model.rotary_emb", "lm_head"]
DEVICE_MAP = {part: "disk" if part in ("model.layers.1", "model.layers.2") else "cpu" for part in PARTS}


def loreft():
    return LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2+g1")


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=4)


@pytest.fixture
def prompts():
    ids = torch.randint(3, 64, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return dict(input_ids=ids, attention_mask=mask)


def offloaded(how, folder):
    build("llama").save_pretrained(folder / "base")
    settings = dict(device_map=DEVICE_MAP, offload_folder=folder / "off") if how == "device_map" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", **settings).eval()
    if how == "cpu_offload":
        cpu_offload(model, CPU)
    elif how == "disk_offload":
        disk_offload(model, folder / "off", CPU)
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    assert {p.device.type for p in model.model.layers[1].parameters()} == {"meta"}
    return model


@pytest.mark.cell("Device layouts", "offloaded weights: {how}")
@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk_offload"])
def test_offloaded(how, tmp_path, prompts):
    plain = get_peft_model(build("llama"), loreft())
    randomise(plain)
    plain.save_pretrained(tmp_path / "adapter")
    plain.eval()
    model = get_peft_model(offloaded(how, tmp_path), loreft())
    set_peft_model_state_dict(model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    model.eval()

    assert torch.equal(model(**prompts).logits, plain(**prompts).logits)
    settings = dict(**prompts, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**settings), plain.generate(**settings))
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**prompts).logits, plain(**prompts).logits)

    labels = prompts["input_ids"].clone()
    labels[:, :8] = -100
    for each in (plain, model):
        each.train()
        each(**prompts, labels=labels).loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == got.keys() and all(g.abs().sum() > 0 for g in expected.values())
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name])

    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)


@pytest.mark.filterwarnings("ignore:for base_model.*copying from a non-meta parameter:UserWarning")  # torch, of LoRA
@pytest.mark.cell(
    "Device layouts",
    "PeftModel.from_pretrained on a base whose device_map is CPU and disk alone",
    refused="PEFT's, for every method: accelerate cannot dispatch such a model again. Use `get_peft_model` and "
    "`set_peft_model_state_dict`.",
)
@pytest.mark.parametrize("config", [loreft, lora])
def test_dispatching_a_second_time_is_not_ours(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT looks for the weights by their path without its first slash, and makes folders
    get_peft_model(build("llama"), config()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        PeftModel.from_pretrained(offloaded("device_map", tmp_path), tmp_path / "adapter")


def test_positions_follow_the_hidden_states_to_another_device():
    module = torch.nn.Linear(1, 1)
    spec = Positions.parse("f2")
    plan = LayerPlan(Wanted(spec.groups, None), spec.groups, "all", 0.0)
    forward = begin(Attachment(module, has_answers=False), Given(torch.tensor([[0, 1]]), (1, 4)), module)
    end(module)
    elsewhere = torch.empty(1, 4, 8, device="meta")
    here, there = forward.index("a", plan, torch.empty(1, 4, 8)), forward.index("a", plan, elsewhere)
    assert here.rows.device == CPU and there.rows.device == there.valid.device == elsewhere.device
    assert forward.index("a", plan, elsewhere) is there  # moved once for all layers of that device
