"""The plugin for axolotl, where axolotl is not installed. tests/with_axolotl runs axolotl itself.

Stand-ins have the names that the plugin takes from axolotl. What axolotl does with it is not tested here.
"""

import importlib
import sys
from dataclasses import dataclass, fields
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import build, make_tokenizer
from peft import PeftConfig, get_peft_model
from pydantic import BaseModel

from peft_reft import LoReftConfig, chat_marks

PLUGIN = "peft_reft.integrations.axolotl"


class Settings(dict):
    """As axolotl's: a missing setting is None."""

    def __getattr__(self, name):
        return self.get(name)


class BasePlugin:
    """Of `axolotl.integrations.base`."""


@dataclass(frozen=True)
class AdapterCapabilities:
    """The same."""

    name: str
    lora_like: bool = False
    relora: bool = False


def get_chat_template_from_config(cfg, ds_cfg, tokenizer):
    return ds_cfg.chat_template or tokenizer.chat_template


@pytest.fixture
def plugin(monkeypatch):
    contents = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": dict(BasePlugin=BasePlugin, AdapterCapabilities=AdapterCapabilities),
        "axolotl.utils": {},
        "axolotl.utils.chat_templates": dict(get_chat_template_from_config=get_chat_template_from_config),
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(PLUGIN)
    del sys.modules[PLUGIN]


def read(plugin, **settings):
    """What axolotl does with a YAML: the section's class is one base of its own."""
    Base = type(
        "Base", (BaseModel,), {"__annotations__": {"loraplus_lr_embedding": float}, "loraplus_lr_embedding": 1e-6}
    )
    Merged = type("Merged", (Base, plugin.LoReftArgs), {})
    return Merged(**{"adapter": "loreft", **settings})


def load(plugin, **settings):
    return plugin.LoReftPlugin().load_adapter(build("llama"), Settings(adapter="loreft", **settings))


def test_it_names_what_axolotl_imports(plugin):
    own = plugin.LoReftPlugin()
    assert own.get_input_args() == f"{PLUGIN}.LoReftArgs"
    assert own.get_adapter_capabilities() == [AdapterCapabilities("loreft")]
    assert own.load_adapter(None, Settings(adapter="lora")) is None


def test_the_section_is_the_config(plugin):
    section = dict(r={"0": 2, "1-": 4}, positions="f2+l3", dropout=0.1, runtime_config=dict(kept_mb=0), act_fn=None)
    assert read(plugin, loreft=section).loreft == section
    model, config = load(plugin, loreft=section, lora_modules_to_save=["lm_head"], revision_of_model="v2", seed=1)
    assert model.peft_config["default"] is config
    assert (config.r, config.positions, config.dropout) == (section["r"], "f2+l3", 0.1)
    assert (config.runtime_config.kept_mb, config.modules_to_save, config.revision) == (0, ["lm_head"], "v2")


def test_every_field_is_allowed(plugin):
    own = {field.name for field in fields(LoReftConfig)} - {field.name for field in fields(PeftConfig)}
    assert own - plugin.FIELDS == {"target_parameters"} and own > plugin.FIELDS


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(loreft=dict(rank=2)), "loreft has rank, which it does not know. Allowed: .*'r'"),
        (dict(loreft=dict(r=0)), "loreft: r=0: expected an int"),
        (dict(loreft=dict(runtime_config=dict(untouched_prompt="no"))), "loreft: untouched_prompt='no'"),
        (dict(loreft="f7"), "loreft='f7': expected fields"),
        (dict(loreft=dict(modules_to_save=["a"]), lora_modules_to_save=["b"]), r"loreft\.modules_to_save=\['a'\]"),
        (dict(adapter="lora", loreft=dict(r=2)), "needs adapter='loreft'; it is 'lora'"),
        (dict(lora_r=8), "lora_r=8 cannot be combined .* stand in `loreft:`"),
        (dict(lora_qkv_kernel=True), "lora_qkv_kernel=True cannot be combined"),
        (dict(load_in_4bit=True), "load_in_4bit=True cannot be combined .* quantises"),
        (dict(unfrozen_parameters=["lm_head"]), "unfrozen_parameters="),
        (dict(context_parallel_size=2), "context_parallel_size=2 .* Allowed: 1"),
        (dict(trl=dict(use_vllm=True)), r"trl\.use_vllm=True"),
        (dict(rl="ebft"), "rl='ebft'"),
        (dict(pretraining_dataset=[{}]), "pretraining_dataset: its texts have no prompts"),
        (dict(merge_lora=True), "merge_method=None .* Allowed: 'legacy'"),
        (dict(inference=True), "inference: give the trained adapter"),
    ],
)
def test_what_cannot_work_is_refused(plugin, settings, message):
    with pytest.raises(ValueError, match=message):
        read(plugin, **settings)


def test_what_stands_for_nothing_is_not_refused(plugin):
    read(plugin, lora_dropout=0.0, lora_r=None, load_in_4bit=False, tensor_parallel_size=1, loraplus_lr_embedding=1e-6)
    read(plugin, adapter="lora", lora_r=8, load_in_4bit=True)
    read(plugin, pretraining_dataset=[{}], loreft=dict(positions="all"))


def test_training_goes_on_from_an_adapter(plugin, tmp_path):
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l3", init_weights=False)
    saved = get_peft_model(build("llama"), config)
    saved.save_pretrained(tmp_path)
    model, config = load(plugin, lora_model_dir=str(tmp_path), loreft=dict(runtime_config=dict(kept_mb=7)))
    assert (config.r, config.positions, config.runtime_config.kept_mb) == (2, "l3", 7)
    before = dict(saved.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == ("loreft_weights" in name)
    with pytest.raises(ValueError, match=r"loreft\.r=4, but the adapter in lora_model_dir=.* has 2"):
        load(plugin, lora_model_dir=str(tmp_path), loreft=dict(r=4))


def test_the_config_alone(plugin, tmp_path):
    """For DPO: the trainer adds the adapter."""
    own = plugin.LoReftPlugin()
    model, config = own.load_adapter(None, Settings(adapter="loreft", rl="dpo"), config_only=True)
    assert model is None and isinstance(config, LoReftConfig)
    with pytest.raises(ValueError, match=r"lora_model_dir=.* cannot be combined with rl='dpo'"):
        own.load_adapter(None, Settings(adapter="loreft", rl="dpo", lora_model_dir="x"), config_only=True)


def test_what_does_not_merge_is_refused(plugin):
    with pytest.raises(ValueError, match="merge-lora: a block's output is edited"):
        load(plugin, merge_lora=True)
    load(plugin, merge_lora=True, loreft=dict(component="mlp", positions="all", intervention="red", init_weights=True))


@pytest.mark.parametrize("own_marks", [False, True], ids=["found", "given"])
def test_marks_of_a_datasets_own_template(plugin, own_marks):
    tokenizer = make_tokenizer()
    marks = chat_marks(tokenizer)
    section = dict(response_template=[[9]], instruction_template=[[10]]) if own_marks else {}
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0]['content'] }}"
    dataset = Settings(type="chat_template", chat_template=template)
    cfg = Settings(adapter="loreft", loreft=section, datasets=[dataset, Settings(type="alpaca")])
    model, config = plugin.LoReftPlugin().load_adapter(build("llama"), cfg)
    plugin.LoReftPlugin().post_trainer_create(cfg, SimpleNamespace(model=model, processing_class=tokenizer))
    assert {name: getattr(config, name) for name in marks} == (section or marks)
