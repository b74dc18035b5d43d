"""Adapters exchanged, loaded and dropped under a running model."""

import threading

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap as pefts
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap_adapter

from peft_reft import LoReftConfig, hotswap_adapter

BY = pytest.mark.parametrize("swap", [hotswap_adapter, pefts_hotswap_adapter], ids=["ours", "PEFT's"])
"""Our function, and PEFT's, which takes the name of the adapter without a default."""
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


@BY
@pytest.mark.parametrize(
    "fields", [{}, dict(tie="group"), dict(tie="model"), dict(intervention="red", r=8, gate=True)], ids=str
)
def test_a_swapped_in_adapter_computes_as_a_loaded_one(tmp_path, fields, swap):
    first, expected_first = saved(tmp_path, "first", 1, **fields)
    second, expected_second = saved(tmp_path, "second", 2, **fields)
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    assert torch.equal(logits(model), expected_first)
    storages = [p.data_ptr() for p in model.parameters()]
    for folder, expected in [(second, expected_second), (first, expected_first)]:
        swap(model, folder, adapter_name="default")
        assert torch.equal(logits(model), expected)
    assert [p.data_ptr() for p in model.parameters()] == storages


@pytest.mark.slow
@pytest.mark.cell("torch.compile", "adapters exchanged without compiling again, by `hotswap_adapter` and by PEFT's")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("swap", "warm"),
    [(hotswap_adapter, True), (hotswap_adapter, False), (pefts_hotswap_adapter, True)],
    ids=["ours", "ours, cold", "PEFT's"],
)
def test_hotswap_under_compile(tmp_path, swap, warm):
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
            swap(compiled, folder, adapter_name="default")
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
    with pytest.raises(ValueError, match=f"{words}|Configs are incompatible: for {next(iter(fields))}, "):
        pefts_hotswap_adapter(model, other, "default")
    assert torch.equal(logits(model), expected)


def test_pefts_check_of_two_configs_knows_which_fields_matter():
    one = LoReftConfig()
    pefts.check_hotswap_configs_compatible(one, LoReftConfig(layers=[0], dropout=0.1, init_weights="paper"))
    for fields in (dict(r=2), dict(positions="l1"), dict(act_fn="relu"), dict(response_template=[[1]])):
        with pytest.raises(ValueError, match=f"Configs are incompatible: for {next(iter(fields))}, "):
            pefts.check_hotswap_configs_compatible(one, LoReftConfig(**fields))


def test_pefts_function_swaps_what_is_trained_beside_the_edits(tmp_path):
    first, expected_first = saved(tmp_path, "first", 1, modules_to_save=["lm_head"])
    second = get_peft_model(
        build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["lm_head"])
    ).eval()
    randomise(second, seed=2)
    with torch.no_grad():
        second.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    expected_second = logits(second)
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(build("llama"), first).eval()
    for folder, expected in [(tmp_path / "second", expected_second), (first, expected_first)]:
        pefts_hotswap_adapter(model, str(folder), "default")
        assert torch.equal(logits(model), expected)


def test_pefts_function_names_the_adapter_that_is_not_alike(tmp_path):
    """PEFT compares with the active adapter; we compare with the one that is named, too."""
    folder, expected = saved(tmp_path, "first", 1)
    model = PeftModel.from_pretrained(build("llama"), folder).eval()
    model.add_adapter("other", LoReftConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(ValueError, match="not alike: r=2 in 'other', 4 in the state dict"):
        pefts_hotswap_adapter(model, folder, "other")
    with pytest.raises(ValueError, match="no LoReFT adapter of that name"):
        pefts_hotswap_adapter(model, folder, "nobody")
    assert torch.equal(logits(model), expected)


def test_pefts_functions_still_swap_lora(tmp_path):
    """With LoReFT's adapters refused for LoRA's, and LoRA's for ours."""
    ours, _ = saved(tmp_path, "ours", 1)
    expected = []
    for seed in range(2):
        torch.manual_seed(seed)
        lora = get_peft_model(
            build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        ).eval()
        expected.append(logits(lora))
        lora.save_pretrained(tmp_path / f"lora{seed}")
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "lora0").eval()
    pefts.prepare_model_for_compiled_hotswap(model, target_rank=16)
    pefts_hotswap_adapter(model, str(tmp_path / "lora1"), "default")
    torch.testing.assert_close(logits(model), expected[1])
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and LOREFT"):
        pefts_hotswap_adapter(model, ours, "default")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LOREFT and LORA"):
        pefts_hotswap_adapter(PeftModel.from_pretrained(build("llama"), ours), str(tmp_path / "lora0"), "default")


def test_nothing_is_prepared_for_swaps_under_compile(tmp_path):
    folder, expected = saved(tmp_path, "first", 1)
    model = PeftModel.from_pretrained(build("llama"), folder).eval()
    pefts.prepare_model_for_compiled_hotswap(model)
    pefts.prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert torch.equal(logits(model), expected)
    with pytest.raises(
        ValueError, match=r"target_rank=16: adapters of LoReFT have ranks \(\[4\] here\).*allowed: None"
    ):
        pefts.prepare_model_for_compiled_hotswap(model, target_rank=16)
    with pytest.raises(ValueError, match="No adapter layers found"):
        pefts.prepare_model_for_compiled_hotswap(build("llama"))


def test_names_and_merged_adapters(tmp_path):
    folder, _ = saved(tmp_path, "first", 1, component="mlp", positions="all")
    model = PeftModel.from_pretrained(build("llama"), folder).eval()
    with pytest.raises(ValueError, match="no LoReFT adapter of that name"):
        hotswap_adapter(model, folder, adapter_name="nobody")
    model.merge_adapter(new_parameters=True)
    for swap in (hotswap_adapter, pefts_hotswap_adapter):
        with pytest.raises(ValueError, match="merged into the weights"):
            swap(model, folder, adapter_name="default")


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
