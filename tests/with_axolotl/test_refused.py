"""What axolotl's YAML may not say beside `adapter: loreft`: each error names the field."""

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_linear": True,
    "lora_target_modules": ["q_proj"],
    "lora_mlp_kernel": True,
    "lora_qkv_kernel": True,
    "lora_o_kernel": True,
    "loraplus_lr_ratio": 16.0,
    "peft_use_dora": True,
    "peft_layers_to_transform": [0],
    "load_in_4bit": True,
    "load_in_8bit": True,
    "unfrozen_parameters": ["lm_head"],
    "lisa_n_layers": 2,
    "context_parallel_size": 2,
    "tensor_parallel_size": 2,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings(world, name):
    with pytest.raises(ValueError, match=f"{name}.*cannot be combined with adapter='loreft'"):
        world.load(**{name: REFUSED[name]})


@pytest.mark.parametrize(
    "section, message",
    [
        (dict(rank=4), "loreft has rank, which it does not know"),
        (dict(r=0), "loreft: r=0: expected an int"),
        (dict(positions="x3"), "loreft: .*x3"),
        (dict(tie="position", positions="p"), "loreft: tie='position' needs a count"),
        (dict(runtime_config=dict(untouched_prompt="no")), "loreft: untouched_prompt='no'"),
        (dict(task_type="CAUSAL_LM"), "loreft has task_type"),
    ],
)
def test_fields(world, section, message):
    with pytest.raises(ValueError, match=message):
        world.load(loreft=section)


def test_the_section_needs_the_adapter(world):
    with pytest.raises(ValueError, match="needs adapter='loreft'; it is 'lora'"):
        world.load(adapter="lora", lora_r=8, lora_alpha=8, lora_target_linear=True)


def test_other_adapters_are_left_alone(world):
    # Its kernels would stay in the classes of transformers, for the tests that follow.
    kernels = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    lora = dict(lora_r=2, lora_alpha=2, lora_target_linear=True, **kernels)
    trainer = world.trainer(adapter="lora", loreft=None, **lora)
    assert trainer.model.peft_config["default"].peft_type == "LORA"


def test_every_field_arrives(world):
    section = dict(
        r={"0": 2, "1-": 4},
        positions={"0": "f1", "1-": "l2+g1"},
        layers=[0, 2],
        intervention="noreft",
        act_fn="relu",
        gate=True,
        tie="group",
        dropout=0.1,
        response_template=[[4, 8]],
        instruction_template=[[4, 7]],
        runtime_config=dict(kept_mb=0),
    )
    trainer = world.trainer(loreft=section, lora_modules_to_save=["lm_head"])
    config = trainer.model.peft_config["default"]
    runtime = section.pop("runtime_config")
    assert config.modules_to_save == ["lm_head"] and config.runtime_config.kept_mb == runtime["kept_mb"]
    assert {name: getattr(config, name) for name in section} == section
