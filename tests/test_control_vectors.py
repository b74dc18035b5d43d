"""Control vectors of llama.cpp and repeng, and AxBench's dictionaries: the format's own reader is the judge."""

from pathlib import Path

import gguf
import numpy
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peft_reft import LoReftConfig
from peft_reft.convert import Adapter, from_axbench, from_control_vector, to_control_vector
from peft_reft_cli import main

PARITY = Path(__file__).parent / "parity"
LLAMA = str(PARITY / "llama")
BATCH = load_file(PARITY / "end_to_end.safetensors")


def trained(folder, **fields):
    """An adapter with random weights, saved; its model."""
    fields = {"intervention": "bias", "positions": "all", "layers": "1-", "init_weights": False, **fields}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(LLAMA), LoReftConfig(task_type="CAUSAL_LM", **fields))
    model.save_pretrained(str(folder))
    return model.eval()


def directions(path):
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def write(path, tensors, architecture="controlvector"):
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


def test_there_and_back_is_equal_to_the_bit(tmp_path):
    model = trained(tmp_path / "ours")
    old = Adapter.load(str(tmp_path / "ours"))
    path = str(tmp_path / "vector.gguf")
    to_control_vector(old, path)
    new = from_control_vector(path, base=LLAMA, task_type="CAUSAL_LM")
    assert list(new.weights) == ["model.layers.1", "model.layers.2"]
    for module, parameters in old.weights.items():
        assert torch.equal(new.weights[module]["b"], parameters["b"])
    new.save(str(tmp_path / "again"))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(LLAMA), str(tmp_path / "again")).eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(LlamaForCausalLM.from_pretrained(LLAMA).eval()))


def test_what_their_reader_finds(tmp_path):
    trained(tmp_path / "ours", layers=[2])
    to_control_vector(Adapter.load(str(tmp_path / "ours")), str(tmp_path / "v.gguf"))
    reader = gguf.GGUFReader(str(tmp_path / "v.gguf"))
    said = {name: bytes(field.parts[-1]) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert said == {
        "general.architecture": b"controlvector",
        "controlvector.model_hint": b"llama",
        "controlvector.layer_count": (1).to_bytes(4, "little"),
    }
    (tensor,) = reader.tensors
    assert tensor.name == "direction.2" and tensor.tensor_type == gguf.GGMLQuantizationType.F32


def test_lobireft_is_a_vector(tmp_path):
    model = trained(tmp_path / "ours", intervention="lobireft", r=4)
    path = str(tmp_path / "v.gguf")
    to_control_vector(Adapter.load(str(tmp_path / "ours")), path)
    from_control_vector(path, LLAMA, "CAUSAL_LM").save(str(tmp_path / "bias"))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(LLAMA), str(tmp_path / "bias")).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_weights_tied_over_the_model_go_to_every_layer(tmp_path):
    trained(tmp_path / "ours", tie="model")
    to_control_vector(Adapter.load(str(tmp_path / "ours")), str(tmp_path / "v.gguf"))
    held = directions(str(tmp_path / "v.gguf"))
    assert set(held) == {"direction.1", "direction.2"}
    assert (held["direction.1"] == held["direction.2"]).all()


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(intervention="red"), "intervention='red'.*'bias', 'lobireft'"),
        (dict(intervention="loreft", r=2), "intervention='loreft'"),
        (dict(positions="f7+l7"), r"positions='f7\+l7'.*'all'"),
        (dict(positions="p"), "positions='p'"),
        (dict(positions="g"), "positions='g'"),
        (dict(positions={"1": "all", "2": "p"}), "positions=.*'all'"),
        (dict(tie="group"), "tie='group'.*'layer' or 'model'"),
        (dict(component="mlp"), "component='mlp'.*'block'"),
        (dict(gate=True), "gate=True.*False"),
        (dict(layers="all", target_modules=["mlp"]), "target_modules=.*None"),
        (dict(layers="all"), "layers='all'.*layer 0.*from 1"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save="),
    ],
    ids=str,
)
def test_what_a_control_vector_cannot_hold(fields, said, tmp_path):
    trained(tmp_path / "ours", **fields)
    with pytest.raises(ValueError, match=said):
        to_control_vector(Adapter.load(str(tmp_path / "ours")), str(tmp_path / "v.gguf"))
    assert not (tmp_path / "v.gguf").exists()


def test_a_base_is_needed_and_nothing_is_overwritten(tmp_path):
    trained(tmp_path / "ours")
    adapter = Adapter.load(str(tmp_path / "ours"))
    (tmp_path / "v.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"v\.gguf exists"):
        to_control_vector(adapter, str(tmp_path / "v.gguf"))
    assert (tmp_path / "v.gguf").read_text() == "mine"
    adapter.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="base_model_name_or_path=None"):
        to_control_vector(adapter, str(tmp_path / "new.gguf"))


ROW = numpy.ones(32, numpy.float32)


@pytest.mark.parametrize(
    "tensors, architecture, said",
    [
        ({"direction.1": ROW}, "llama", "general.architecture='llama'.*'controlvector'"),
        ({"direction.0": ROW}, "controlvector", "'direction.0'.*N from 1"),
        ({"direction.1": ROW, "else": ROW}, "controlvector", "'else'"),
        ({"direction.1": ROW.astype(numpy.float16)}, "controlvector", "direction.1 is F16.*F32"),
        ({"direction.1": numpy.ones((2, 32), numpy.float32)}, "controlvector", r"shape \(2, 32\)"),
        ({"direction.1": ROW, "direction.2": ROW[:16]}, "controlvector", r"sizes \[16, 32\]"),
        ({"direction.1": ROW * numpy.nan}, "controlvector", "infinite or not a number in direction.1"),
        ({"direction.3": ROW}, "controlvector", "layer 3: the base model has the layers 0 to 2"),
        ({}, "controlvector", "no tensor"),
    ],
)
def test_files_that_are_refused(tensors, architecture, said, tmp_path):
    write(tmp_path / "v.gguf", tensors, architecture)
    with pytest.raises(ValueError, match=said):
        from_control_vector(str(tmp_path / "v.gguf"), base=LLAMA)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing" * 9])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "v.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.gguf cannot be read as GGUF"):
        from_control_vector(str(tmp_path / "v.gguf"))


def test_without_a_base_blocks_are_named_as_in_llama(tmp_path):
    write(tmp_path / "v.gguf", {"direction.7": ROW})
    adapter = from_control_vector(str(tmp_path / "v.gguf"))
    assert list(adapter.weights) == ["model.layers.7"] and adapter.config.layers == [7]


# AxBench.


def test_a_concept_of_axbench_steers_as_theirs(tmp_path):
    """h + factor · max_act · weight[concept] behind the block, at every token."""
    weight = torch.randn(5, 32).bfloat16()
    torch.save(weight, tmp_path / "weight.pt")
    from_axbench(str(tmp_path / "weight.pt"), 3, 1, 2.5, LLAMA, "CAUSAL_LM").save(str(tmp_path / "ours"))
    base = LlamaForCausalLM.from_pretrained(LLAMA).eval()
    hook = base.model.layers[1].register_forward_hook(lambda _, __, h: h + 2.5 * weight[3].float())
    expected = logits(base)
    hook.remove()
    model = PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    kept = BATCH["attention_mask"] == 1
    assert torch.allclose(logits(model)[kept], expected[kept], atol=1e-5)


@pytest.mark.parametrize(
    "held, changes, said",
    [
        (torch.ones(5, 32), dict(concept=5), "concept=5: .*0 to 4"),
        (torch.ones(5, 32), dict(layer=-1), "layer=-1"),
        (torch.ones(5, 32), dict(strength=float("nan")), "strength=nan"),
        (torch.ones(32), {}, r"shape \(32,\)"),
        ({"a": torch.ones(5, 32)}, {}, "holds dict"),
        (torch.full((5, 32), torch.inf), {}, "infinite"),
    ],
)
def test_dictionaries_that_are_refused(held, changes, said, tmp_path):
    torch.save(held, tmp_path / "weight.pt")
    with pytest.raises(ValueError, match=said):
        from_axbench(str(tmp_path / "weight.pt"), **{"concept": 0, "layer": 1, "strength": 1.0, **changes})


def test_the_command(tmp_path, capsys):
    trained(tmp_path / "ours")
    vector, again, concept = (str(tmp_path / name) for name in ("v.gguf", "again", "concept"))
    assert main(["convert", "--to", "gguf", str(tmp_path / "ours"), vector]) == 0
    assert "--control-vector" in capsys.readouterr().out
    assert main(["convert", "--from", "gguf", vector, again, "--base", LLAMA]) == 0
    assert torch.equal(
        Adapter.load(again).weights["model.layers.1"]["b"],
        Adapter.load(str(tmp_path / "ours")).weights["model.layers.1"]["b"],
    )
    torch.save(torch.ones(2, 32), tmp_path / "weight.pt")
    source = str(tmp_path / "weight.pt")
    arguments = ["convert", "--from", "axbench", source, concept, "--concept", "1", "--layer", "2"]
    assert main(arguments) == 1
    assert "--strength is missing" in capsys.readouterr().err
    assert main([*arguments, "--strength", "4"]) == 0
    assert (Adapter.load(concept).weights["model.layers.2"]["b"] == 4).all()
