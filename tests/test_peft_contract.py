"""What users do with any method of PEFT: shorthands, contracts of layers, second tries, state dicts, adapter names."""

import copy
import warnings

import peft
import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    helpers,
    inject_adapter_in_model,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from torch import nn

from peft_reft import LoReftConfig
from peft_reft.tuner.layer import LoReftLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
]

PEFT_0_20 = not hasattr(BaseTuner, "_get_adapter_state_dict")
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def config(**kwargs):
    return LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f3+l2", **kwargs})


def randomise_all(model, seed=1):
    """Randomise adapters and all that is trained beside them."""
    randomise(model, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in f".{name}" or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoReftLayer)]


# The contract of a tuner layer.


@pytest.mark.parametrize("fields", [{}, dict(component="mlp"), dict(target_modules=["q_proj", "v_proj"])], ids=str)
def test_every_module_can_be_asked_for_its_weight(fields):
    model = get_peft_model(build("llama"), config(**fields))
    for module in model.modules():
        for name in ("weight", "bias", "in_features", "out_features", "qweight", "base_layer"):
            assert hasattr(module, name) in (True, False)
    for layer in layers(model):
        block = layer.block
        assert layer.get_base_layer() is block
        if isinstance(block, nn.Linear):
            assert layer.weight is block.weight and layer.bias is block.bias
            assert torch.equal(layer.get_base_weight(), block.weight)
        else:
            assert not hasattr(layer, "weight")


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, (32, 32)),
        (dict(component="attention", tie="group"), (32, 32)),
        (dict(intervention="red", r=8, target_modules=["up_proj"]), (32, 48)),
        (dict(intervention="nodireft", target_modules=["k_proj"]), (32, 16)),
    ],
    ids=str,
)
def test_sizes_of_what_is_edited(fields, sizes):
    model = get_peft_model(build("llama"), config(**fields))
    assert {(layer.in_features, layer.out_features) for layer in layers(model)} == {sizes}


def test_the_base_of_a_layer_on_a_lora_layer_is_the_linear_map():
    base = build("llama")
    linear = base.model.layers[0].self_attn.q_proj
    base.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    base.add_adapter(config(target_modules=["q_proj"]), "loreft")
    assert layers(base)[0].get_base_layer() is linear


def test_casting_of_inputs_may_be_switched_off_and_changes_nothing():
    model = get_peft_model(build("llama"), config())
    randomise(model)
    before = logits(model)
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers(model))
        assert torch.equal(logits(model), before)
    assert all(layer.cast_input_dtype_enabled for layer in layers(model))


def test_pefts_status_functions_see_the_adapters():
    model = get_peft_model(build("llama"), config())
    model.add_adapter("second", config(layers=[0]))
    status = get_model_status(model)
    assert status.available_adapters == ["default", "second"] and status.active_adapters == ["default"]
    assert status.num_adapter_layers == 3 and status.enabled is True and status.merged_adapters == []
    assert [each.name for each in get_layer_status(model)] == [f"model.model.layers.{n}.loreft" for n in range(3)]
    assert "LoReftLayer" in repr(model)


def test_status_follows_what_is_done_to_the_adapters():
    """On a model without PeftModel, too. LoRA beside it says the same of itself."""
    fields = dict(positions="all", component="mlp")
    for model in (get_peft_model(build("llama"), config(**fields)), inject_adapter_in_model(config(), build("llama"))):
        first = get_layer_status(model)[0]
        assert first.module_type == "LoReftLayer" and first.requires_grad == {"default": True}
        assert first.devices == {"default": ["cpu"]} and first.quantization_backend is None
        status = get_model_status(model)
        assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = get_peft_model(build("llama"), config(**fields))
    model.add_adapter("second", config(**fields, inference_mode=True))
    assert get_model_status(model).requires_grad["second"] is False
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    model.merge_adapter(["default"], new_parameters=True)
    assert get_model_status(model).merged_adapters == ["default"]
    layers(model)[0].unmerge()
    assert get_model_status(model).merged_adapters == "irregular"


@pytest.mark.parametrize("fields", [{}, dict(intervention="red", r=8), dict(tie="model", gate=True)], ids=str)
def test_scales_are_rescaled_for_a_while(fields):
    model = get_peft_model(build("llama"), config(**fields))
    model.add_adapter("second", config(**fields, layers=[0]))
    randomise(model)
    model.base_model.set_scale("second", 0.5)
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        found[name] = logits(model)
    untouched = logits(build("llama"))
    with pytest.raises(KeyError), helpers.rescale_adapter_scale(model, 0):
        for name in found:
            model.set_adapter(name)
            assert torch.equal(logits(model), untouched)
        raise KeyError
    for name, before in found.items():
        model.set_adapter(name)
        assert torch.equal(logits(model), before)
        with helpers.rescale_adapter_scale(model, 2):
            assert not torch.equal(logits(model), before)
            assert layers(model)[0].scaling == {"default": 2.0, "second": 1.0}
    with (
        pytest.raises(TypeError, match="multiplier='1': expected a number"),
        helpers.rescale_adapter_scale(model, "1"),
    ):
        pass


def test_scales_of_lora_are_rescaled_as_before():
    lora = LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=4)
    alone = get_peft_model(build("llama"), lora)
    with helpers.rescale_adapter_scale(alone, 3):
        assert alone.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 3.0}
    base = build("llama")
    base.add_adapter(lora, "lora")
    base.add_adapter(config(), "loreft")
    with helpers.rescale_adapter_scale(base, 3):
        assert base.model.layers[0].self_attn.q_proj.scaling == {"lora": 3.0}
        assert layers(base)[0].scaling == {"loreft": 3.0}
    assert base.model.layers[0].self_attn.q_proj.scaling == {"lora": 1.0}
    assert layers(base)[0].scaling == {"loreft": 1.0}
    refused = pytest.raises(ValueError, match="only supported for models with `LoraLayer`s")
    with refused, helpers.rescale_adapter_scale(build("llama"), 3):
        pass


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("positions", ["f3+l2", "all"])
def test_a_forward_on_the_meta_device_gives_the_shape(positions, train):
    with torch.device("meta"):
        base = build("llama")
    model = get_peft_model(base, config(positions=positions)).train(train)
    ids = IDS.to("meta")
    out = model(input_ids=ids, labels=ids) if train else model(input_ids=ids)
    assert out.logits.shape == (2, 9, VOCAB) and out.logits.is_meta


# "all-linear", state dicts.


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize(
    ("family", "shorthand", "each"),
    [("llama", "all-linear", 7), ("llama", "All-Linear", 7), ("gpt2", "all-linear", 4), ("gpt_neox", "all-linear", 4)],
)
def test_all_linear_is_what_it_is_for_lora(family, shorthand, each, tmp_path):
    lora = get_peft_model(build(family), LoraConfig(target_modules=shorthand))
    model = get_peft_model(build(family), config(target_modules=shorthand))
    assert sorted(model.targeted_module_names) == sorted(lora.targeted_module_names)
    assert len(layers(model)) == each * 3
    sizes = {layer.block: (layer.in_features, layer.out_features) for layer in layers(model)}
    of_lora = {name: (m.in_features, m.out_features) for name, m in lora.named_modules() if hasattr(m, "lora_A")}
    assert {name: sizes[m] for name, m in model.named_modules() if m in sizes} == of_lora
    randomise(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(family), tmp_path)), logits(model))


def test_all_linear_leaves_out_a_pooler_which_reads_no_tokens():
    model = get_peft_model(build("bert"), LoReftConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
    names = set(model.targeted_module_names)
    assert "bert.encoder.layer.0.output.dense" in names and not any("pooler" in name for name in names)
    assert logits(model).shape == (2, 3)


def keys_and_model(narrow, compiled=False, **wide):
    """Return a state dict of `config(**wide)`, and a model injected from its keys with another config."""
    given = peft.get_peft_model_state_dict(inject_adapter_in_model(config(**wide), build("llama")))
    base = torch.compile(build("llama"), backend="eager") if compiled else build("llama")
    return given, inject_adapter_in_model(narrow, base, state_dict=given)


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (dict(layers=[0]), dict()),
        (dict(), dict(layers=[1])),
        (dict(layers=[2]), dict(layers=[0])),
        (dict(), dict(component="mlp")),
        (dict(layers=[0]), dict(target_modules=["k_proj"])),
    ],
    ids=str,
)
def test_injection_follows_the_keys_of_a_state_dict(narrow, wide):
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
        given, model = keys_and_model(config(**narrow), **wide)
    assert peft.get_peft_model_state_dict(model).keys() == given.keys()
    untouched = logits(build("llama"))
    randomise(model)
    assert not torch.equal(logits(model), untouched)


def test_of_weights_tied_over_the_model_the_config_says_the_layers():
    """The keys of its state dict name the first layer alone."""
    _, model = keys_and_model(config(tie="model", layers=[0, 2]), tie="model", layers=[0, 2])
    assert len(layers(model)) == 2


def test_a_state_dict_beyond_what_the_config_says_of_layers():
    narrow = config(positions={"0": "f3+l2"})
    with pytest.raises(ValueError, match=r"state_dict has model\.layers\.1, but positions=.* no spec there"):
        keys_and_model(narrow)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("with_keys", [pytest.param(True, marks=pytest.mark.slow), False])
def test_injection_into_a_compiled_model(with_keys):
    expected = inject_adapter_in_model(config(), build("llama"))
    randomise(expected)
    if with_keys:
        given, model = keys_and_model(config(), compiled=True)
    else:
        given = peft.get_peft_model_state_dict(expected)
        model = inject_adapter_in_model(config(), torch.compile(build("llama"), backend="eager"))
    assert {key.removeprefix("_orig_mod.") for key in peft.get_peft_model_state_dict(model)} == given.keys()
    randomise(model)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-4)


# Tried twice.

TRIES = [
    (dict(), dict(layers=[0])),
    (dict(layers=[0]), dict(layers=[1])),
    (dict(), dict(component="mlp")),
    (dict(tie="model"), dict(r=2, layers=[1, 2], tie="group")),
    (dict(target_modules="all-linear"), dict()),
    (dict(modules_to_save=["lm_head"]), dict(layers=[0])),
    (dict(modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head"], layers=[0])),
    (dict(trainable_token_indices=[3, 4]), dict(layers=[0])),
    (dict(trainable_token_indices=[3, 4]), dict(trainable_token_indices=[5], layers=[0])),
]


@pytest.mark.parametrize(("first", "second"), TRIES, ids=str)
def test_the_second_config_replaces_the_first(first, second, tmp_path):
    base = build("llama")
    randomise_all(get_peft_model(base, config(**first)))
    model = get_peft_model(base, config(**second))
    alone = get_peft_model(build("llama"), config(**second))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in alone.named_parameters()}
    trained = [{n for n, p in each.named_parameters() if p.requires_grad} for each in (model, alone)]
    assert trained[0] == trained[1] and trained[0]
    randomise_all(model)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == peft.get_peft_model_state_dict(alone).keys()
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("llama")))


def test_a_second_config_takes_back_what_the_first_has_merged():
    base = build("llama")
    first = get_peft_model(base, config(positions="all", component="mlp"))
    randomise(first)
    first.merge_adapter(new_parameters=True)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        second = get_peft_model(base, config(layers=[0]))
    with second.disable_adapter():
        torch.testing.assert_close(logits(second), logits(build("llama")))
    assert [layer.block.mlp.down_proj.bias for layer in layers(second)] == [None]


@pytest.mark.parametrize(
    "bad",
    [
        dict(r=99),
        dict(layers=[9]),
        dict(target_modules=["nothing"]),
        dict(layers=[0], exclude_modules=["model.layers.0"]),
    ],
    ids=str,
)
def test_a_second_config_that_fails_leaves_the_first(bad, tmp_path):
    base = build("llama")
    model = get_peft_model(base, config(modules_to_save=["lm_head"]))
    randomise_all(model)
    before = logits(model)
    with pytest.raises(ValueError):
        get_peft_model(base, config(**bad))
    assert model.peft_config["default"].r == 4 and model.peft_config["default"].layers == "all"
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), before)


def test_a_second_try_leaves_adapters_of_other_names_alone():
    base = build("llama")
    first = get_peft_model(base, config())
    first.add_adapter("other", config(layers=[0, 1]))
    second = get_peft_model(base, config(layers=[2]))
    assert [sorted(layer.plans) for layer in layers(second)] == [["other"], ["other"], ["default"]]
    assert {tuple(layer.active_adapters) for layer in layers(second)} == {("default",)}


def test_transformers_forgets_an_adapter_that_could_not_be_added():
    base = build("llama")
    base.add_adapter(config(), "one")
    with pytest.raises(ValueError, match="r=99"):
        base.add_adapter(config(r=99), "two")
    assert list(base.peft_config) == ["one"]


# Names of adapters.

NAMES = ["b", "R", "W", "0", "1", "layers", "model", "loreft", "loreft_weights", "self_attn", "weight", "score"]


@pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix:UserWarning")
@pytest.mark.parametrize("fields", [{}, dict(tie="model"), dict(modules_to_save=["lm_head"])], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_named_like_a_part_of_a_path_costs_the_others_nothing(name, fields, tmp_path):
    model = get_peft_model(build("llama"), config(**fields), adapter_name="first")
    model.add_adapter(name, config(r=2, layers=[0, 1], **fields))
    randomise_all(model)
    expected = {}
    for each in ("first", name):
        model.set_adapter(each)
        expected[each] = logits(model)
    if PEFT_0_20 and "modules_to_save" in fields and name == "weight":
        with pytest.raises(KeyError, match="modules_to_save"):  # PEFT's own: a trained head is not ours to mend
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    if PEFT_0_20 and name == "loreft_weights":
        with pytest.raises(ValueError, match=r"with PEFT 0\.20 a name without 'loreft_' is needed"):
            PeftModel.from_pretrained(build("llama"), tmp_path / name, adapter_name=name)
        return
    together = PeftModel.from_pretrained(build("llama"), tmp_path / name, adapter_name=name)
    together.load_adapter(tmp_path / "first", "first")
    by_transformers = build("llama")
    for each in ("first", name):
        by_transformers.load_adapter(str(tmp_path / each), adapter_name=each)
        assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path / each)), expected[each])
    for each in ("first", name):
        for both in (together, by_transformers):
            both.set_adapter(each)
            assert torch.equal(logits(both), expected[each])


def test_a_state_dict_that_is_given_is_not_mended_with_the_models_own():
    model = get_peft_model(build("llama"), config())
    model.add_adapter("b", config())
    averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if PEFT_0_20:  # there is nothing to mend: LoReFT picks out its tensors before PEFT drops any
        assert len(peft.get_peft_model_state_dict(model, state_dict=averaged)) == 9
    else:
        with pytest.raises(ValueError, match=r"'default' cannot be saved .* adapter 'b', whose name is a part of it"):
            peft.get_peft_model_state_dict(model, state_dict=averaged)
    own = peft.get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert len(own) == 9
    model.delete_adapter("b")
    model.add_adapter("second", config())
    assert peft.get_peft_model_state_dict(model, state_dict=averaged).keys() == own.keys()


def test_saved_beside_lora_of_the_same_name_is_only_our_own():
    base = build("llama")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model = get_peft_model(base, config())
    assert all(".loreft." in key for key in peft.get_peft_model_state_dict(model))


# Shards of a model that is trained in parts.


@pytest.mark.parametrize("shard", [lambda t: t.flatten()[:5], lambda t: t.new_empty(0)], ids=["flat", "empty"])
def test_shards_are_not_saved(shard):
    model = get_peft_model(build("llama"), config())
    parts = {name: shard(t) if ".R" in name else t for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\S*\.R is a shard of shape .*GatheredParameters"):
        peft.get_peft_model_state_dict(model, state_dict=parts)


# Weighted sums.


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_combination_types_that_are_the_exact_sum(kind):
    fields = dict(intervention="red", r=8) if kind == "linear" else {}
    model = get_peft_model(build("llama"), config(**fields))
    model.add_adapter("second", config(**fields))
    randomise(model)
    model.add_weighted_adapter(["default", "second"], [0.3, 2.0], "unnamed")
    model.add_weighted_adapter(["default", "second"], [0.3, 2.0], "named", combination_type=kind, svd_rank=None)
    found = []
    for name in ("unnamed", "named"):
        model.set_adapter(name)
        found.append(logits(model))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(combination_type="linear"), r"'linear' adds up .* \('default', 'second'\).*Allowed with them: 'cat'"),
        (dict(combination_type="svd"), "'svd' is one of LoRA's approximations.*Allowed: 'cat'"),
        (dict(combination_type="ties", density=0.5), "combination_type='ties'"),
        (dict(density=0.5), "density: combination_type='cat' has no such settings"),
    ],
    ids=str,
)
def test_other_combination_types_are_refused_in_words(asked, words):
    model = get_peft_model(build("llama"), config())
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", **asked)
    assert sorted(model.peft_config) == ["default", "second"]


# Loading, going, copying.


@pytest.mark.parametrize("tie", ["layer", "model"])
def test_loading_by_way_of_the_meta_device(tie, tmp_path):
    model = get_peft_model(build("llama"), config(tie=tie))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    by_transformers = build("llama")
    by_transformers.load_adapter(str(tmp_path), low_cpu_mem_usage=True)
    for each in (loaded, by_transformers):
        assert torch.equal(logits(each), logits(model))
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), logits(model))


def test_state_dicts_and_copies():
    model = get_peft_model(build("llama"), config())
    randomise(model)
    other = get_peft_model(build("llama"), config())
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    twin = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model)) and torch.equal(logits(twin), logits(model))
    assert [layer.block for layer in layers(twin)] == [
        twin.get_submodule(name.removesuffix(".loreft"))
        for name, each in twin.named_modules()
        if isinstance(each, LoReftLayer)
    ]


def test_deleting_one_of_two_active_adapters():
    model = get_peft_model(build("llama"), config())
    model.add_adapter("second", config(layers=[0]))
    randomise(model)
    model.set_adapter("second")
    alone = logits(model)
    model.base_model.set_adapter(["default", "second"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model), alone)
