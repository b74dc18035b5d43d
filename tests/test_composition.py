"""Adapters composed: scales, weighted sums, and merging into the weights."""

import pytest
import torch
from conftest import CAUSAL, HIDDEN, VOCAB, build, randomise
from peft import LoraConfig, PeftModel, get_peft_model

from peft_reft import LoReftConfig

RED = dict(intervention="red", r=8)
IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))


def config(**kwargs):
    return LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **kwargs})


def adapted(family="llama", seed=1, **kwargs):
    model = get_peft_model(build(family), config(**kwargs)).eval()
    randomise(model, seed=seed)
    return model


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


@torch.no_grad()
def edit_of(model, layer=1):
    """Return what is added to the output of block `layer`, in a model edited there alone."""
    seen = {}
    block = model.get_base_model().model.layers[layer]
    handle = block.register_forward_hook(lambda module, args, output: seen.update(out=output.clone()))
    logits(model)
    edited = seen["out"]
    with model.disable_adapter():
        logits(model)
    handle.remove()
    return edited - seen["out"]


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, 2.0])
@pytest.mark.parametrize(
    "fields", [{}, dict(positions="all"), dict(intervention="red", r=8), dict(gate=True)], ids=str
)
def test_set_scale_multiplies_the_edit(fields, scale):
    model = adapted(layers=[1], **fields)
    whole = edit_of(model)
    model.base_model.set_scale("default", scale)
    torch.testing.assert_close(edit_of(model), scale * whole, atol=1e-5, rtol=1e-4)
    model.base_model.set_scale("default", 1)
    torch.testing.assert_close(edit_of(model), whole)
    with pytest.raises(ValueError, match="nobody"):
        model.base_model.set_scale("nobody", scale)


def test_scale_layer_as_lora_s():
    model = adapted(layers=[1])
    whole = edit_of(model)
    layer = model.get_base_model().model.layers[1].loreft
    layer.scale_layer(0.5)
    layer.scale_layer(0.5)
    torch.testing.assert_close(edit_of(model), whole / 4, atol=1e-6, rtol=1e-4)
    layer.unscale_layer(0.5)
    torch.testing.assert_close(edit_of(model), whole / 2, atol=1e-6, rtol=1e-4)
    layer.unscale_layer()
    torch.testing.assert_close(edit_of(model), whole)


def test_scales_in_a_mixed_batch():
    model = adapted(layers=[1])
    model.add_adapter("second", config(layers=[1]))
    randomise(model)
    model.base_model.set_scale("second", -0.5)
    mixed = logits(model, adapter_names=["second", "default", "__base__"])
    for row, name in enumerate(("second", "default")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model)[row], atol=1e-5, rtol=1e-4)


PAIRS = [
    (dict(), dict(r=2)),
    (dict(), dict(intervention="nodireft", r=3)),
    (dict(intervention="consreft"), dict(intervention="lobireft", r=2)),
    (dict(intervention="direft"), dict(intervention="noreft")),
    (dict(tie="group"), dict(tie="group", intervention="lobireft")),
    (dict(tie="position", positions="f1+l2"), dict(tie="position", positions="f1+l2", r=1)),
    (dict(tie="model"), dict(tie="model", r=2)),
    (dict(positions="all"), dict(positions="all", intervention="direft")),
    (dict(intervention="nodireft", act_fn="tanh"), dict(intervention="direft", act_fn="tanh", r=2)),
    (dict(intervention="red", r=8), dict(intervention="red", r=8)),
    (dict(intervention="red", r=8), dict(intervention="bias", r=8)),
    (dict(intervention="bias", r=8), dict(intervention="bias", r=8)),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_a_weighted_adapter_is_the_weighted_sum(first, second, tmp_path):
    """Its edit is the weighted sum of the two edits, each computed by itself; also after saving and loading."""
    model = adapted(layers=[1], **first)
    model.add_adapter("second", config(layers=[1], **second))
    randomise(model)
    edits = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        edits[name] = edit_of(model)
    model.base_model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "both")
    model.set_adapter("both")
    expected = 0.7 * edits["default"] - 1.5 * edits["second"]
    torch.testing.assert_close(edit_of(model), expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "both").eval()
    torch.testing.assert_close(edit_of(loaded), expected, atol=1e-5, rtol=1e-4)
    if "intervention" not in first:
        assert loaded.peft_config["default"].r == 4 + second.get("r", 4)


def test_a_weighted_adapter_on_layers_that_differ():
    """A layer's rank is the sum of the ranks of the adapters that edit it. Its edit is theirs when both are active."""
    model = adapted(layers=[0, 1])
    model.add_adapter("second", config(layers=[1, 2], r=2))
    randomise(model)
    model.base_model.add_weighted_adapter(["default", "second"], [1, 1], "both")
    assert model.peft_config["both"].r == {"0": 4, "1": 6, "2": 2}
    assert model.peft_config["both"].layers == [0, 1, 2]
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    model.base_model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (dict(positions="l2"), r"positions='f2\+l2' in 'default', 'l2' in 'second'"),
        (dict(tie="group"), r"tie='layer'.*'group'"),
        (dict(component="mlp"), r"component='block'.*'mlp'"),
        (dict(gate=True), r"'second' has gate=True"),
        (dict(intervention="interchange"), r"'interchange'"),
        (dict(intervention="red", r=8), r"some formulas have a rank, some have none"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
    ],
    ids=str,
)
def test_sums_that_are_no_single_edit(second, words):
    model = adapted()
    model.add_adapter("second", config(**second))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=words):
        model.base_model.add_weighted_adapter(["default", "second"], [1, 1], "both")
    assert [name for name, _ in model.named_modules()] == names and "both" not in model.peft_config


def test_a_sum_with_an_activation_and_a_subtraction():
    model = adapted(act_fn="relu")
    with pytest.raises(ValueError, match=r"'default' has act_fn='relu' and intervention='loreft', which subtracts"):
        model.base_model.add_weighted_adapter(["default"], [1], "both")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["nobody"], [1], "both"), "nobody"),
        (([], [], "both"), r"\[\]"),
        ((["default"], [1, 2], "both"), "2 entries for 1"),
        ((["default"], [1], "default"), "already"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_sum(arguments, words):
    with pytest.raises(ValueError, match=words):
        adapted().base_model.add_weighted_adapter(*arguments)


# Merging.

MERGEABLE = [
    *(dict(intervention=name) for name in ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")),
    *(dict(intervention="red", r=8), dict(intervention="bias", r=8), dict(tie="model")),
]
GAINS_BIAS = pytest.mark.filterwarnings("ignore:.*linear maps without a bias:UserWarning")


@GAINS_BIAS
@pytest.mark.parametrize("component", ["attention", "mlp", "heads"])
@pytest.mark.parametrize("fields", MERGEABLE, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_is_exact(family, fields, component):
    model = adapted(family, positions="all", component=component, **fields)
    expected, weights = logits(model), {n: p.clone() for n, p in model.get_base_model().named_parameters()}
    with model.disable_adapter():
        base = logits(model)
    assert not torch.allclose(expected, base, atol=1e-2)
    model.merge_adapter(new_parameters=True)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    for name, parameter in model.get_base_model().named_parameters():
        torch.testing.assert_close(parameter, weights.pop(name), atol=1e-5, rtol=1e-4)
    assert not weights
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)
    assert not any("loreft" in name for name, _ in merged.named_modules())


@GAINS_BIAS
@pytest.mark.parametrize("component", ["attention", "mlp", "heads"])
@pytest.mark.parametrize("family", list(CAUSAL))
def test_merging_is_exact_in_every_family(family, component):
    model = adapted(family, positions="all", component=component)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=2e-5, rtol=1e-4)


@GAINS_BIAS
def test_several_merged_and_scaled():
    """Each edit is computed from the output as it was. Merged one after the other, edits add and do not compound."""
    fields = dict(positions="all", component="mlp")
    model = adapted(**fields)
    model.add_adapter("second", config(**fields, intervention="red", r=8))
    randomise(model)
    model.base_model.set_scale("second", -0.5)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    model.merge_adapter(["default"], new_parameters=True)
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["default", "second"], new_parameters=True)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits(model, adapter_names=["default"] * 3)
    with model.disable_adapter():
        base = logits(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(base, logits(build("llama")), atol=1e-5, rtol=1e-4)


def test_unload_takes_merged_edits_out_again():
    model = adapted(positions="all", component="mlp")
    model.merge_adapter(new_parameters=True)
    torch.testing.assert_close(logits(model.unload()), logits(build("llama")), atol=1e-5, rtol=1e-4)


def test_a_map_that_gains_a_bias_says_so():
    with pytest.warns(UserWarning, match="3 linear maps without a bias got one"):
        adapted(positions="all", component="mlp").merge_and_unload()


def test_a_linear_target_is_merged_into_itself():
    fields = dict(target_modules=["q_proj", "down_proj"], positions="all")
    model = adapted(**fields)
    expected = logits(model)
    with pytest.warns(UserWarning, match="6 linear maps"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(positions="all"), r"a block's output is edited.*'attention', 'mlp'"),
        (dict(positions="all", target_modules=r".*layers\.\d+"), r"a block's output"),
        (dict(component="mlp"), r"positions are 'f2\+l2'.*'all'"),
        (dict(component="mlp", positions="p"), r"positions are 'p'.*'all'"),
        (dict(component="mlp", positions="g"), r"positions are 'g'"),
        (dict(component="mlp", positions={"0": "all", "1": "p"}), r"positions are 'p'"),
        (dict(component="mlp", positions="all", tie="group"), r"tie='group'; allowed: 'layer', 'model'"),
        (dict(component="mlp", positions="all", act_fn="relu"), r"not affine.*act_fn"),
        (dict(component="mlp", positions="all", gate=True), r"not affine.*gate"),
        (dict(component="mlp", positions="all", intervention="interchange"), r"not affine"),
    ],
    ids=str,
)
def test_the_error_says_which_condition_fails(fields, words):
    model = adapted(**fields)
    before, weights = logits(model), [p.clone() for p in model.parameters()]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"cannot be merged.*{words}.*unload"):
            merge()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("component", ["attention", "mlp"])
def test_a_module_that_adds_the_residual_stream_itself(component):
    model = get_peft_model(
        build("bert"),
        config(task_type="SEQ_CLS", positions="all", component=component, modules_to_save=["classifier"]),
    )
    with pytest.raises(ValueError, match=r"cannot be merged.*(no single linear map|residual)"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_weights_under_lora_are_not_merged():
    model = adapted(positions="all", component="mlp")
    stacked = get_peft_model(model.get_base_model(), LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    assert stacked is not None
    with pytest.raises(ValueError, match="another adapter"):
        model.merge_adapter()


def test_safe_merge_changes_nothing_if_the_result_is_broken():
    model = adapted(positions="all", component="mlp", layers=[0])
    layer = model.get_base_model().model.layers[0].mlp
    with torch.no_grad():
        layer.loreft.loreft_weights["default"].W[0, 0] = torch.nan
    before = layer.down_proj.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default"):
        model.merge_adapter(safe_merge=True, new_parameters=True)
    assert torch.equal(layer.down_proj.weight, before) and layer.down_proj.bias is None


def test_the_merged_weight_by_hand():
    """(I + Rᵀ(W − R)) M, and Rᵀb."""
    model = adapted(positions="all", component="mlp", layers=[0])
    mlp = model.get_base_model().model.layers[0].mlp
    m = mlp.down_proj.weight.detach().double()
    p = {name: value.detach().double() for name, value in mlp.loreft.loreft_weights["default"].named_parameters()}
    model.merge_adapter(new_parameters=True)
    expected = (torch.eye(HIDDEN) + p["R"].T @ (p["W"] - p["R"])) @ m
    torch.testing.assert_close(mlp.down_proj.weight.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mlp.down_proj.bias.double(), p["R"].T @ p["b"], atol=1e-5, rtol=1e-4)
