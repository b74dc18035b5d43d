"""Adapters of `pyreft` and `adapters`, converted: the logits are those that these libraries recorded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.utils.parametrizations import orthogonal
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from peft_reft import LoReftConfig
from peft_reft.convert import Adapter, from_adapters, from_pyreft, to_easysteer, to_pyreft

PARITY = Path(__file__).parent / "parity"
LLAMA = str(PARITY / "llama")
NUMBERS = load_file(PARITY / "end_to_end.safetensors")
BATCH = {name: NUMBERS[name] for name in ("input_ids", "attention_mask", "labels")}
PYREFT = {
    **{name: NUMBERS[f"{name}.logits"] for name in ("loreft_tied", "loreft_untied", "direft_tied")},
    **load_file(PARITY / "pyreft" / "logits.safetensors"),
}
ADAPTERS = load_file(PARITY / "adapters" / "logits.safetensors")
RELU = [name for name in PYREFT if "relu" in name]
CAUSAL = sorted({*PYREFT} - {"classifier"})


def pyreft_folder(name):
    return str(PARITY / "pyreft" / name)


def assert_same_logits(got, expected, mask=BATCH["attention_mask"]):
    got, expected = got[mask == 1], expected[mask == 1]
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def logits_of(adapter, folder, model_class=LlamaForCausalLM, **batch):
    adapter.save(str(folder))
    model = PeftModel.from_pretrained(model_class.from_pretrained(LLAMA), str(folder)).eval()
    with torch.no_grad():
        return model(**(batch or BATCH)).logits


@pytest.mark.parametrize("base", [None, LLAMA], ids=["without base", "with base"])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_pyrefts(name, base, tmp_path):
    adapter = from_pyreft(pyreft_folder(name), "f2+l2", act_fn="relu" if name in RELU else None, base=base)
    assert adapter.config.tie == ("group" if "untied" in name else "layer")
    assert_same_logits(logits_of(adapter, tmp_path / "new"), PYREFT[name])


def test_a_pyreft_classifier_brings_its_head(tmp_path):
    adapter = from_pyreft(pyreft_folder("classifier"), "f2+l2", task_type="SEQ_CLS")
    assert adapter.config.modules_to_save == ["score"] and {*adapter.others} == {"score.weight"}
    adapter.save(str(tmp_path / "new"))
    base = LlamaForSequenceClassification.from_pretrained(LLAMA, num_labels=3, pad_token_id=0)
    model = PeftModel.from_pretrained(base, str(tmp_path / "new")).eval()
    # They edited f2+l2 of a prompt in a longer row; here these tokens are named.
    where = torch.tensor([[0, 1, n - 2, n - 1] for n in (8, 6, 5)])
    with torch.no_grad():
        logits = model(
            input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], intervention_positions=where
        ).logits
    assert (logits - PYREFT["classifier"]).abs().max() < 1e-5


def test_what_the_config_says(tmp_path):
    ranks = from_pyreft(pyreft_folder("loreft_ranks"), "f2+l2").config
    assert ranks.r == {"0": 2, "2": 5} and ranks.layers == [0, 2]
    assert from_pyreft(pyreft_folder("loreft_mlp"), "f2+l2").config.component == "mlp"
    by_path = from_pyreft(pyreft_folder("loreft_by_path"), "f2+l2").config
    assert by_path.layers == [0, 2] and by_path.target_modules is None and by_path.component == "block"
    inside = from_pyreft(pyreft_folder("loreft_by_path_inside"), "f2+l2").config
    assert {*inside.target_modules} == {f"model.layers.{n}.mlp.down_proj" for n in (0, 2)}
    several = from_pyreft(pyreft_folder("loreft_untied"), {"0": "f2+l2", "2": "f1+l3"})
    assert several.config.tie == "group" and several.weights["model.layers.2"]["W"].shape == (2, 4, 32)
    assert from_pyreft(pyreft_folder("loreft_untied"), "f1+l1").config.tie in ("group", "position")


def over_peft(name, tmp_path):
    """Write a folder as `pyreft` does around a `PeftModel`: paths of modules begin with PEFT's prefix."""
    source, folder = Path(pyreft_folder(name)), tmp_path / "over_peft"
    folder.mkdir()
    for file in source.iterdir():
        shutil.copy(file, folder / file.name.replace("comp_model_", "comp_base_model_model_model_"))
    text = (folder / "config.json").read_text()
    text = text.replace('"model.layers', '"base_model.model.model.layers')
    (folder / "config.json").write_text(text.replace("comp_model_", "comp_base_model_model_model_"))
    return folder


@pytest.mark.parametrize("name", ["loreft_by_path", "loreft_by_path_inside"])
def test_interventions_on_the_modules_of_a_peft_model(name, tmp_path):
    adapter = from_pyreft(str(over_peft(name, tmp_path)), "f2+l2")
    assert adapter.config == from_pyreft(pyreft_folder(name), "f2+l2").config
    assert_same_logits(logits_of(adapter, tmp_path / "new"), PYREFT[name])


def test_what_a_peft_model_trained_besides(tmp_path):
    folder = over_peft("loreft_by_path", tmp_path)
    head = torch.randn(3, 32)
    torch.save({"base_model.model.score.modules_to_save.default.weight": head}, folder / "pytorch_model.bin")
    adapter = from_pyreft(str(folder), "f2+l2", task_type="SEQ_CLS")
    assert adapter.config.modules_to_save == ["score"] and torch.equal(adapter.others["score.weight"], head)
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    torch.save({lora: torch.randn(2, 32)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin holds {re.escape(lora)}, of a PEFT adapter"):
        from_pyreft(str(folder), "f2+l2")


def test_the_last_token_can_be_left_out(tmp_path):
    """`last_position = len - 1`, as their supervised data sets have it."""
    adapter = from_pyreft(pyreft_folder("loreft_tied"), "f2+l2~1")
    adapter.save(str(tmp_path / "new"))
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(LLAMA), str(tmp_path / "new")).eval()
    where = torch.tensor([[0, 1, n - 3, n - 2] for n in (8, 6, 5)])
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, model(**BATCH, intervention_positions=where).logits)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_logits_are_those_of_adapters(name, tmp_path):
    formula = None if name.startswith("loreft") else name.partition("_")[0]
    adapter = from_adapters(str(PARITY / "adapters" / name), formula, task_type="CAUSAL_LM")
    assert adapter.config.base_model_name_or_path == "llama"
    # Copies: labels of an evaluation are remembered with the tensor of its ids.
    whole_row = {key: value.clone() for key, value in BATCH.items() if key != "labels"}
    assert_same_logits(logits_of(adapter, tmp_path / "new", **whole_row), ADAPTERS[name])


def test_adapters_do_not_say_which_formula():
    with pytest.raises(ValueError, match=r"intervention: .*'noreft'.*'nodireft'"):
        from_adapters(str(PARITY / "adapters" / "nodireft"))
    with pytest.raises(ValueError, match=r"intervention='noreft'.*'loreft' or 'direft'"):
        from_adapters(str(PARITY / "adapters" / "loreft_tied"), "noreft")


# Back to pyreft.


@pytest.mark.parametrize("name", sorted({*PYREFT} - {"loreft_by_path"}))
def test_there_and_back(name, tmp_path):
    """Their folder is converted into ours and back: the files are the same, and each computes the same."""
    act_fn = "relu" if name in RELU else None
    adapter = from_pyreft(pyreft_folder(name), "f2+l2", act_fn=act_fn)
    adapter.save(str(tmp_path / "ours"))
    to_pyreft(Adapter.load(str(tmp_path / "ours")), str(tmp_path / "theirs"))
    assert {p.name for p in (tmp_path / "theirs").iterdir()} == {p.name for p in Path(pyreft_folder(name)).iterdir()}
    old, new = (
        json.loads((Path(folder) / "config.json").read_text()) for folder in (pyreft_folder(name), tmp_path / "theirs")
    )
    for key in new:
        if key == "representations":  # theirs may be a name of a rank more
            assert [entry[:4] for entry in new[key]] == [entry[:4] for entry in old[key]]
        else:
            assert new[key] == old[key], key
    again = from_pyreft(str(tmp_path / "theirs"), "f2+l2", act_fn=act_fn)
    for module, parameters in adapter.weights.items():
        for parameter, tensor in parameters.items():
            assert torch.allclose(again.weights[module][parameter], tensor, atol=1e-6), (module, parameter)


@pytest.mark.parametrize("name", ["direft_untied_relu", "consreft", "lobireft"])
def test_torch_reads_the_rotation_that_we_write(name, tmp_path):
    adapter = from_pyreft(pyreft_folder(name), "f2+l2", act_fn="relu" if name in RELU else None)
    to_pyreft(adapter, str(tmp_path / "theirs"))
    for path in (tmp_path / "theirs").glob("*.bin"):
        held = torch.load(path, weights_only=True)
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(32, 4)))
        orthogonal(layer)
        layer.load_state_dict({k.removeprefix("rotate_layer."): v for k, v in held.items() if "rotate_layer" in k})
        layer_number, group = int(path.name.split("_")[2]), int(path.stem[-1])
        rotation = adapter.weights[f"model.layers.{layer_number}"]["R"]
        expected = rotation[group] if adapter.config.tie == "group" else rotation
        assert torch.allclose(layer.weight.T, expected, atol=1e-6)


def test_weights_tied_over_the_model_go_to_every_layer(tmp_path):
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2", tie="model", init_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(LLAMA), config).eval()
    model.save_pretrained(str(tmp_path / "ours"))
    adapter = Adapter.load(str(tmp_path / "ours"))
    to_pyreft(adapter, str(tmp_path / "theirs"), base=LLAMA)
    again = from_pyreft(str(tmp_path / "theirs"), "f2")
    assert len(again.weights) == 3
    with torch.no_grad():
        assert_same_logits(logits_of(again, tmp_path / "again"), model(**BATCH).logits)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(intervention="red"), "intervention='red'"),
        (dict(gate=True), "gate=True"),
    ],
)
def test_what_pyreft_does_not_have(fields, said, tmp_path):
    config = LoReftConfig(task_type="CAUSAL_LM", positions="f2", **({"r": 2} if "gate" in fields else {}), **fields)
    get_peft_model(LlamaForCausalLM.from_pretrained(LLAMA), config).save_pretrained(str(tmp_path / "ours"))
    with pytest.raises(ValueError, match=said):
        to_pyreft(Adapter.load(str(tmp_path / "ours")), str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs").exists()


# To EasySteer.


def test_easysteer_gets_a_folder_for_each_layer(tmp_path):
    adapter = from_pyreft(pyreft_folder("loreft_tied"), "f2+l2")
    to_easysteer(adapter, str(tmp_path / "steer"))
    h = torch.randn(7, 32)
    for layer in range(3):
        folder = tmp_path / "steer" / f"layer_{layer}"
        assert json.loads((folder / "config.json").read_text())["representations"][0]["layer"] == layer
        (path,) = folder.glob("*.bin")  # it refuses a folder with two
        held = torch.load(path, weights_only=True)
        by_hand = (h @ held["weight"].T + held["bias"] - h @ held["rotate_layer"]) @ held["rotate_layer"].T
        own = adapter.weights[f"model.layers.{layer}"]
        assert torch.allclose(by_hand, (h @ own["W"].T + own["b"] - h @ own["R"].T) @ own["R"], atol=1e-6)


def test_easysteer_gets_groups_apart(tmp_path):
    to_easysteer(from_pyreft(pyreft_folder("loreft_untied"), "f2+l2"), str(tmp_path / "steer"))
    folders = {path.name for path in (tmp_path / "steer").iterdir()}
    assert folders == {"layer_0_f2", "layer_0_l2", "layer_2_f2", "layer_2_l2"}


def test_easysteer_has_only_loreft(tmp_path):
    with pytest.raises(ValueError, match=r"intervention='consreft'.*'loreft'"):
        to_easysteer(from_pyreft(pyreft_folder("consreft"), "f2+l2"), str(tmp_path / "steer"))
    assert not (tmp_path / "steer").exists()


# What is wrong is said.


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(pyreft_folder("loreft_tied"), tmp_path / "theirs"))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_missing_file_is_named(folder):
    (folder / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin").unlink()
    with pytest.raises(ValueError, match="intkey_layer_1"):
        from_pyreft(str(folder), "f2+l2")


def test_a_damaged_file_is_named(folder):
    path = folder / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"intkey_layer_1.*cannot be read"):
        from_pyreft(str(folder), "f2+l2")


def test_code_in_a_pickle_is_not_run(folder):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (folder / "owned",))

    torch.save({"weight": Evil()}, folder / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        from_pyreft(str(folder), "f2+l2")
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            dict(intervention_types=["<class 'pyvene.VanillaIntervention'>"] * 3),
            "VanillaIntervention.*LoreftIntervention",
        ),
        (dict(representations=[[0, "head_attention_value_output", "pos", 1, 4]]), "no intkey_layer_0_comp_head"),
        (dict(representations=[[0, "block_output", "h.pos", 1, 4]]), "unit='h.pos'"),
        (dict(representations=[]), "pyreft did not write it"),
    ],
)
def test_a_config_of_something_else_is_refused(folder, changes, said):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=said):
        from_pyreft(str(folder), "f2+l2")


def test_positions_that_do_not_fit_the_number_of_interventions():
    with pytest.raises(ValueError, match="positions='f4'"):
        from_pyreft(pyreft_folder("loreft_untied"), "f4")


def test_a_base_that_does_not_fit(tmp_path):
    config = json.loads((PARITY / "llama" / "config.json").read_text())
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"Layer 2 .* has 2 layers"):
        from_pyreft(pyreft_folder("loreft_tied"), "f2+l2", base=str(tmp_path / "small"))


def test_no_folder_and_no_name():
    with pytest.raises(ValueError, match="no folder, and no name on the Hub"):
        from_pyreft("/no/such/folder", "f2+l2")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        from_pyreft(pyreft_folder("loreft_tied"), "f2+l2").save(str(tmp_path / "new"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.txt"]


def test_a_file_of_another_method_is_refused(tmp_path):
    from peft import LoraConfig

    model = get_peft_model(LlamaForCausalLM.from_pretrained(LLAMA), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="LORA"):
        Adapter.load(str(tmp_path / "lora"))


def test_a_converted_adapter_is_one_like_any_other(tmp_path):
    """It has a card, names its base model, trains on, and saves what it loaded."""
    adapter = from_pyreft(pyreft_folder("loreft_untied"), "f2+l2", base=LLAMA)
    adapter.save(str(tmp_path / "new"))
    assert "import peft_reft" in (tmp_path / "new" / "README.md").read_text()
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "new"), is_trainable=True)
    model(**BATCH).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "layers.0.loreft" in name)
    model.save_pretrained(str(tmp_path / "again"))
    again = Adapter.load(str(tmp_path / "again"))
    for module, parameters in adapter.weights.items():
        for name, tensor in parameters.items():
            assert torch.allclose(again.weights[module][name], tensor, atol=1e-6)
