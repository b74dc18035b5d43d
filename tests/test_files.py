"""Adapter files that are damaged, not finite, pickled or in shards: refused by every loader, which names the file."""

import json
import os
import shutil

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from peft_reft import LoReftConfig, hotswap_adapter
from peft_reft.convert import Adapter
from peft_reft.serving.adapters import read_adapter
from peft_reft.tuner.architectures import skeleton

# What PEFT says, with reason, of a second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def config(**kwargs):
    return LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f3+l2", **kwargs})


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Make a folder with a base model and an adapter of it."""
    folder = tmp_path_factory.mktemp("good")
    build("llama").save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config())
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return folder


def peft_model(good, bad):
    PeftModel.from_pretrained(build("llama"), bad)


def peft_model_by_way_of_meta(good, bad):
    PeftModel.from_pretrained(build("llama"), bad, low_cpu_mem_usage=True)


def peft_second_adapter(good, bad):
    model = PeftModel.from_pretrained(build("llama"), good / "adapter")
    before = logits(model)
    try:
        model.load_adapter(bad, "second")
    finally:
        assert torch.equal(logits(model), before)


def transformers_auto_model(good, bad):
    AutoModelForCausalLM.from_pretrained(bad)


def transformers_second_adapter(good, bad):
    model = build("llama")
    model.load_adapter(str(good / "adapter"))
    before = logits(model)
    try:
        model.load_adapter(str(bad), adapter_name="second")
    finally:
        assert list(model.peft_config) == ["default"] and model.active_adapters() == ["default"]
        assert torch.equal(logits(model), before)


def hotswap(good, bad):
    model = PeftModel.from_pretrained(build("llama"), good / "adapter")
    before = logits(model)
    try:
        hotswap_adapter(model, str(bad))
    finally:
        assert torch.equal(logits(model), before)


def without_a_model(good, bad):
    Adapter.load(str(bad))


def serving(good, bad):
    read_adapter(str(bad), skeleton(AutoConfig.from_pretrained(good / "base")))


BY_PEFT = [peft_model, peft_model_by_way_of_meta, peft_second_adapter]
BY_TRANSFORMERS = [transformers_auto_model, transformers_second_adapter]
OUR_OWN = [hotswap, without_a_model, serving]
LOADERS = BY_PEFT + BY_TRANSFORMERS + OUR_OWN


def cut(size):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def tensors(change):
    def apply(folder):
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


def spoil(value):
    def change(held):
        held[min(held)][1, 2] = value

    return tensors(change)


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def in_shards(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00001.safetensors")


@pytest.fixture
def bad(good, tmp_path):
    """Make a copy of the adapter with something wrong; return its folder."""

    def make(change):
        folder = tmp_path / "bad"
        shutil.copytree(good / "adapter", folder)
        change(folder)
        return folder

    return make


@pytest.mark.parametrize("size", [0, 100, 2000, -50])
@pytest.mark.parametrize("load", LOADERS)
def test_a_cut_file_is_named(load, size, good, bad):
    with pytest.raises(ValueError, match=r"bad/adapter_model\.safetensors is damaged or cut short"):
        load(good, bad(cut(size)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("load", LOADERS)
def test_values_that_are_not_finite_are_refused(load, value, good, bad):
    with pytest.raises(
        ValueError, match=r"infinite or not a number in .*layers\.0\.loreft\.loreft_weights\.\S*R\."
    ) as e:
        load(good, bad(spoil(value)))
    assert "adapter" in str(e.value).partition(" has values")[0]


def test_trained_modules_besides_must_be_finite_too(tmp_path):
    model = get_peft_model(build("llama"), config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    for load in (peft_model, transformers_second_adapter):
        good = tmp_path / "good"
        get_peft_model(build("llama"), config()).save_pretrained(good / "adapter")
        with pytest.raises(ValueError, match=r"infinite or not a number in .*lm_head\.\S*weight"):
            load(good, tmp_path)


@pytest.mark.parametrize("load", [*BY_TRANSFORMERS, without_a_model])
def test_a_tensor_that_is_missing_or_unknown_is_refused(load, good, bad):
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*layers\.0"):
        load(good, bad(tensors(lambda held: held.update({f"{min(held)}x": held.pop(min(held))}))))


@pytest.mark.parametrize("load", [*BY_PEFT, *BY_TRANSFORMERS, hotswap])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (pickled, r"bad/adapter_model\.bin is a pickle"),
        (in_shards, r"bad/adapter_model-00001-of-00001\.safetensors is a part of an adapter"),
    ],
)
def test_pickles_and_shards_are_not_read(load, change, words, good, bad):
    with pytest.raises(ValueError, match=words):
        load(good, bad(change))


def test_a_file_in_a_subfolder_is_named(good, bad, tmp_path):
    bad(cut(100))
    with pytest.raises(ValueError, match=r"bad/adapter_model\.safetensors is damaged"):
        build("llama").load_adapter(str(tmp_path), adapter_kwargs={"subfolder": "bad"})
    with pytest.raises(ValueError, match=r"bad/adapter_model\.safetensors is damaged"):
        PeftModel.from_pretrained(build("llama"), tmp_path, subfolder="bad")


def test_shards_as_transformers_writes_them(tmp_path):
    base = build("llama")
    base.add_adapter(config())
    base.save_pretrained(tmp_path, max_shard_size=1500)
    with pytest.raises(ValueError, match=r"is a part of an adapter.*larger max_shard_size"):
        PeftModel.from_pretrained(build("llama"), tmp_path)


def write(text):
    return lambda folder: (folder / CONFIG).write_text(text((folder / CONFIG).read_text()))


@pytest.mark.parametrize("load", OUR_OWN)
@pytest.mark.parametrize(
    "change",
    [write(lambda text: text[:60]), write(lambda text: ""), write(lambda text: "[]")],
    ids=["cut", "empty", "a list"],
)
def test_a_damaged_config_is_named(load, change, good, bad):
    with pytest.raises(ValueError, match=r"bad/adapter_config\.json cannot be used"):
        load(good, bad(change))


@pytest.mark.parametrize("load", [*BY_PEFT, *OUR_OWN])
def test_a_config_with_a_value_that_is_not_allowed_is_named(load, good, bad):
    change = write(lambda text: json.dumps({**json.loads(text), "positions": "x7"}))
    with pytest.raises(ValueError, match=r"bad/adapter_config\.json cannot be used: positions='x7'"):
        load(good, bad(change))


@pytest.mark.parametrize("tie", ["layer", "model", "group"])
def test_transformers_loads_what_is_whole(tie, tmp_path):
    model = get_peft_model(build("llama"), config(tie=tie))
    randomise(model)
    model.save_pretrained(tmp_path)
    base = build("llama")
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base), logits(model))
    given = build("llama")
    given.load_adapter(peft_config=config(tie=tie), adapter_state_dict=load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(given), logits(model))


def test_a_state_dict_that_is_not_finite_is_refused(good, bad):
    held = load_file(bad(spoil(float("nan"))) / WEIGHTS)
    base = build("llama")
    with pytest.raises(ValueError, match="adapter_state_dict has values that are infinite"):
        base.load_adapter(peft_config=config(), adapter_state_dict=held)
    assert not getattr(base, "peft_config", {})


def test_no_pickle_is_written(tmp_path):
    model = get_peft_model(build("llama"), config())
    with pytest.raises(ValueError, match=r"safe_serialization=False: 'default' would be written as a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert os.listdir(tmp_path) == []
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in os.listdir(tmp_path)
