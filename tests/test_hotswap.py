"""Adapters exchanged, loaded and dropped under a running model."""

import threading

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import PeftModel, get_peft_model

from peft_reft import LoReftConfig, hotswap_adapter

IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))


def saved(tmp_path, name, seed, **kwargs):
    """Save an adapter; return its folder and its logits."""
    model = get_peft_model(build("llama"), LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, **kwargs})).eval()
    randomise(model, seed=seed)
    model.save_pretrained(tmp_path / name)
    return str(tmp_path / name), logits(model)


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


@pytest.mark.parametrize(
    "fields", [{}, dict(tie="group"), dict(tie="model"), dict(intervention="red", r=8, gate=True)], ids=str
)
def test_a_swapped_in_adapter_computes_as_a_loaded_one(tmp_path, fields):
    first, expected_first = saved(tmp_path, "first", 1, **fields)
    second, expected_second = saved(tmp_path, "second", 2, **fields)
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    assert torch.equal(logits(model), expected_first)
    storages = [p.data_ptr() for p in model.parameters()]
    for folder, expected in [(second, expected_second), (first, expected_first)]:
        hotswap_adapter(model, folder)
        assert torch.equal(logits(model), expected)
    assert [p.data_ptr() for p in model.parameters()] == storages


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hotswap_under_compile(tmp_path, warm):
    """The compiled graph runs with the new weights, and nothing is compiled again."""
    first, expected_first = saved(tmp_path, "first", 1)
    second, expected_second = saved(tmp_path, "second", 2)
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    if warm:
        logits(model)  # what is kept without gradients is then part of the graph
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not warm)
    torch.testing.assert_close(logits(compiled), expected_first, atol=1e-5, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for folder, expected in [(second, expected_second), (first, expected_first)]:
            hotswap_adapter(compiled, folder, adapter_name="default")
            torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(r=2), r"r=4 in 'default', 2 in"),
        (dict(positions="l1"), r"positions='f7\+l7'"),
        (dict(intervention="direft"), r"intervention='loreft'"),
        (dict(tie="group"), r"tie='layer'"),
        (dict(layers=[0]), r"Missing: .*layers\.1"),
    ],
    ids=str,
)
def test_adapters_that_are_not_alike(tmp_path, fields, words):
    first, expected = saved(tmp_path, "first", 1)
    other, _ = saved(tmp_path, "other", 2, **fields)
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    with pytest.raises(ValueError, match=words):
        hotswap_adapter(model, other)
    assert torch.equal(logits(model), expected)


def test_names_and_merged_adapters(tmp_path):
    folder, _ = saved(tmp_path, "first", 1, component="mlp", positions="all")
    model = PeftModel.from_pretrained(build("llama"), folder).eval()
    with pytest.raises(ValueError, match="no LoReFT adapter of that name"):
        hotswap_adapter(model, folder, adapter_name="nobody")
    model.merge_adapter(new_parameters=True)
    with pytest.raises(ValueError, match="merged into the weights"):
        hotswap_adapter(model, folder)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.filterwarnings("ignore:Adapter other was active:UserWarning")
def test_loading_and_dropping_while_generating_in_another_thread(tmp_path, by_row):
    """Every answer is that of the adapter that was asked for, whatever is loaded and dropped beside it."""
    first, _ = saved(tmp_path, "first", 1, positions="f2+l2+g")
    other, _ = saved(tmp_path, "other", 2, positions="all", r=2, tie="group")
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    settings = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, pad_token_id=0)
    if by_row:
        settings["adapter_names"] = ["default", "__base__", "default"]
    expected = model.generate(input_ids=IDS, **settings).tolist()
    answers, errors = [], []

    def generate():
        try:
            for _ in range(12):
                answers.append(model.generate(input_ids=IDS, **settings).tolist())
        except Exception as error:  # shown by the test, in its own thread
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    loads = 0
    while thread.is_alive():
        model.load_adapter(other, "other")
        model.delete_adapter("other")
        loads += 1
    thread.join()
    assert not errors and loads > 3
    assert answers == [expected] * 12
