"""Adapters come, change, and go without a trace, by PEFT's calls and by transformers' own."""

import copy
import pickle

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from peft_reft import LoReftConfig
from peft_reft.tuner.forward import ATTRIBUTE

# What PEFT says, with reason, of things that these tests do on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter second was active which is now deleted:UserWarning"),
]

IDS = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(5))


def config(**kwargs):
    return LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **kwargs})


def adapted(base=None, seed=1, **kwargs):
    model = get_peft_model(base or build("llama"), config(**kwargs)).eval()
    randomise(model, seed=seed)
    return model


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def traces(model):
    """Return everything that injection may leave on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        "modules": [name for name, _ in model.named_modules()],
        "parameters": [name for name, _ in model.named_parameters()],
        "hooks": {name: [len(getattr(m, hook)) for hook in hooks] for name, m in model.named_modules()},
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "generate": model.generate.__func__ is type(model).generate,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_disable_is_exact_and_enable_brings_it_back(family):
    base = build(family)
    expected = logits(base)
    model = adapted(base)
    edited = logits(model)
    assert not torch.equal(edited, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), edited)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert"])
def test_unload_leaves_no_trace(family):
    base = build(family)
    before, expected = (traces(base) if family != "bert" else None), logits(base)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config(task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM"))
    randomise(model)
    logits(model)
    if family != "bert":
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, pad_token_id=0)
    unloaded = model.unload()
    assert unloaded is base
    assert torch.equal(logits(base), expected)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert ATTRIBUTE not in base.__dict__
    if before:
        assert traces(base) == before


def test_merging_raises_with_the_reason_and_loses_nothing():
    model = adapted()
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"cannot be merged.*a block's output.*unload"):
            merge()
    assert torch.equal(logits(model), before)


def test_add_set_delete():
    model = adapted()
    first = logits(model)
    model.add_adapter("second", config(r=2, positions="l1", layers=[0, 2], intervention="direft"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    randomise(model, seed=2)
    second = logits(model)
    assert not torch.equal(first, second)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".second." in name for name in trainable)
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")


def test_edits_of_several_active_adapters_add_up():
    """Each is computed from the block's own output, so the order does not matter."""
    model = adapted(layers=[1])
    model.add_adapter("second", config(r=2, positions="f1+l3", layers=[1], intervention="nodireft"))
    randomise(model)
    outputs = {}
    block = model.get_base_model().model.layers[1]
    block.register_forward_hook(lambda module, args, output: outputs.update(now=output))
    for names in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(names)
        logits(model)
        outputs["+".join(names)] = outputs["now"]
    with model.disable_adapter():
        logits(model)
    total = outputs["default"] + outputs["second"] - outputs["now"]
    torch.testing.assert_close(outputs["default+second"], total)
    torch.testing.assert_close(outputs["second+default"], total)


def test_adapter_names_choose_row_by_row():
    model = adapted()
    model.add_adapter("second", config(r=2, positions="f1+l3", layers=[0, 1]))
    randomise(model)
    mixed = logits(model, adapter_names=["second", "__base__", "default"])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model)[1])
    torch.testing.assert_close(mixed[2], logits(model)[2])
    model.set_adapter("second")
    torch.testing.assert_close(mixed[0], logits(model)[0])
    with pytest.raises(ValueError, match="nobody"):
        logits(model, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        logits(model, adapter_names=["default"] * 2)
    alone = {}
    mask = torch.ones_like(IDS)
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    both = model.generate(
        input_ids=IDS,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        adapter_names=["second", "default", "second"],
    )
    assert both.tolist() == [alone["second"][0].tolist(), alone["default"][1].tolist(), alone["second"][2].tolist()]


@pytest.mark.parametrize(
    ("tie", "positions"),
    [
        ("layer", "f2+l2"),
        ("group", "f1+l2"),
        ("position", "f1+l2"),
        ("model", "f2+l2"),
        ("layer", "all"),
        ("group", "p+g2"),
        ("layer", "f1+g"),
    ],
)
def test_a_mixed_batch_equals_each_row_alone(tie, positions):
    """Rows with adapters that compute together, with other formulas, with another rank, and with the base alone."""
    shared = dict(tie=tie, positions=positions)
    model = adapted(**shared)
    model.add_adapter("alike", config(**shared))
    model.add_adapter("formula", config(**shared, intervention="lobireft"))
    model.add_adapter("rank", config(**shared, r=2))
    model.add_adapter("red", config(**shared, r=8, intervention="red"))
    model.add_adapter("gated", config(**shared, gate=True))
    model.add_adapter("curved", config(**shared, act_fn="tanh"))
    randomise(model)
    names = ["alike", "rank", "__base__", "default", "formula", "red", "gated", "curved", "alike", "default", "gated"]
    ids = torch.randint(3, VOCAB, (len(names), 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[3, :2] = 0
    settings = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True)
    settings |= dict(return_dict_in_generate=True, pad_token_id=0)
    mixed = torch.stack(model.generate(input_ids=ids, adapter_names=names, **settings).logits, 1)
    for name in set(names):
        rows = [row for row, wanted in enumerate(names) if wanted == name]
        if name == "__base__":
            with model.disable_adapter():
                alone = torch.stack(model.generate(input_ids=ids, **settings).logits, 1)
        else:
            model.set_adapter(name)
            alone = torch.stack(model.generate(input_ids=ids, **settings).logits, 1)
        torch.testing.assert_close(mixed[rows], alone[rows], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("settings", [dict(num_beams=2), dict(do_sample=True, num_return_sequences=2)], ids=str)
def test_rows_that_generate_repeats_keep_their_adapter(settings):
    model = adapted()
    model.add_adapter("second", config())
    randomise(model)
    mask = torch.ones_like(IDS)
    found = {}
    for how, names in {"mixed": ["second", "default", "__base__"], "second": ["second"] * 3}.items():
        torch.manual_seed(0)
        found[how] = model.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=4, pad_token_id=0, adapter_names=names, **settings
        )
    repeats = settings.get("num_return_sequences", 1)
    assert torch.equal(found["mixed"][:repeats], found["second"][:repeats])
    assert not torch.equal(found["mixed"], found["second"])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("tie", ["layer", "model"])
def test_copies_compute_the_same_and_stand_alone(duplicate, tie):
    model = adapted(tie=tie)
    before = logits(model)
    twin = duplicate(model)
    assert torch.equal(logits(twin), before)
    mask = torch.ones_like(IDS)
    ours = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(twin.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False), ours)
    randomise(twin, seed=5)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    assert torch.equal(twin.unload()(input_ids=IDS).logits, build("llama")(input_ids=IDS).logits)
    assert torch.equal(logits(model), before)


def test_transformers_own_calls(tmp_path):
    base = build("llama")
    expected = logits(base)
    base.add_adapter(config(), adapter_name="one")
    randomise(base)
    one = logits(base)
    assert not torch.equal(one, expected)
    base.disable_adapters()
    assert torch.equal(logits(base), expected)
    base.enable_adapters()
    assert torch.equal(logits(base), one)
    base.add_adapter(config(r=2, positions="l1"), adapter_name="two")
    base.set_adapter("two")
    randomise(base, seed=3)
    assert not torch.equal(logits(base), one)
    base.set_adapter("one")
    one = logits(base)
    base.save_pretrained(tmp_path)
    fresh = build("llama")
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(logits(fresh), one)
    out = fresh.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert out.shape == (3, 13)
    wrapped = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(logits(wrapped), one)


def test_inject_adapter_in_model():
    base = inject_adapter_in_model(config(), build("llama"))
    randomise(base)
    assert not torch.equal(logits(base), logits(build("llama")))


@pytest.mark.parametrize("first", ["lora", "loreft"])
@pytest.mark.cell("Beside LoRA", "LoRA and LoReFT on one base, trained together")
def test_beside_lora(first):
    """Both on one base, in either order of injection: LoRA inside the blocks, LoReFT on their outputs."""
    configs = {"lora": LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]), "loreft": config()}
    base = build("llama")
    expected = logits(base)
    order = ["lora", "loreft"] if first == "lora" else ["loreft", "lora"]
    for name in order:
        base.add_adapter(configs[name], adapter_name=name)
    randomise(base)
    base.set_adapter(["lora", "loreft"])
    both = logits(base)
    for layer in base.modules():
        if type(layer).__name__ == "LoReftLayer":
            layer.enable_adapters(False)
    lora_only = logits(base)
    assert not torch.equal(both, lora_only) and not torch.equal(lora_only, expected)


def lora():
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])


def names(folder):
    return {name.rpartition(".")[2] for name in load_file(folder / "adapter_model.safetensors")}


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.cell("Beside LoRA", "saved and reloaded as two adapters: two `PeftModel`s, one on the other's base")
def test_beside_lora_as_two_peft_models(tmp_path):
    first = get_peft_model(build("llama"), lora()).eval()
    lora_only = logits(first)
    # A name of its own: PEFT saves everything on the model that goes by an adapter's name, of whatever method.
    second = get_peft_model(first.get_base_model(), config(), adapter_name="second")
    randomise(second)
    both = logits(second.eval())
    assert not torch.equal(both, lora_only)
    with second.disable_adapter():  # PEFT's: the base without any adapter
        assert torch.equal(logits(second), logits(build("llama")))
    first.save_pretrained(tmp_path / "lora")
    second.save_pretrained(tmp_path / "loreft")
    assert names(tmp_path / "lora") == {"weight"} and names(tmp_path / "loreft/second") == {"R", "W", "b"}

    base = PeftModel.from_pretrained(build("llama"), tmp_path / "lora").get_base_model()
    assert torch.equal(logits(base), lora_only)
    again = PeftModel.from_pretrained(base, tmp_path / "loreft/second", adapter_name="second")
    assert torch.equal(logits(again), both)


@pytest.mark.cell("Beside LoRA", "saved and reloaded as two adapters: transformers' `add_adapter`, `load_adapter`")
def test_beside_lora_by_transformers_own_calls(tmp_path):
    base = build("llama")
    base.add_adapter(lora(), adapter_name="lora")
    base.add_adapter(config(), adapter_name="loreft")
    randomise(base)
    base.set_adapter(["lora", "loreft"])
    both = logits(base)
    for name in ("lora", "loreft"):
        base.set_adapter(name)
        base.save_pretrained(tmp_path / name)
    assert names(tmp_path / "lora") == {"weight"} and names(tmp_path / "loreft") == {"R", "W", "b"}

    again = build("llama")
    for name in ("lora", "loreft"):
        again.load_adapter(tmp_path / name, adapter_name=name)
    again.set_adapter(["lora", "loreft"])
    assert torch.equal(logits(again), both)


def test_a_new_adapter_on_an_unloaded_base():
    base = build("llama")
    for seed in (1, 2):
        model = adapted(base, seed=seed)
        logits(model)
        base = model.unload()
    assert torch.equal(logits(base), logits(build("llama")))


def test_a_failed_second_adapter_leaves_the_first_as_it_was():
    model = adapted()
    before = logits(model)
    with pytest.raises(ValueError, match="r=99"):
        model.add_adapter("second", config(r=99))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


def test_evaluation_after_an_optimiser_that_writes_behind_torchs_back():
    """bitsandbytes and DeepSpeed update parameters through raw pointers. Cached factors must not survive that."""
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # frozen, as loaded for inference
    stale = logits(model)
    model.train()
    for name, parameter in model.named_parameters():
        if name.endswith(".W"):
            parameter.data.add_(1.0)  # `.data` does not count as a change
    model.eval()
    assert not torch.equal(logits(model), stale)
