"""LoRA and LoReFT on one model: each way of docs/with_lora.md equals "merge LoRA, then load LoReFT"."""

import pytest
import torch
from conftest import VOCAB, build, randomise
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig

IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
LABELS = IDS.masked_fill(torch.arange(9) < 5, -100)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
]


def loreft():
    return LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2")


@pytest.fixture
def lora_folder(tmp_path):
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    get_peft_model(build("llama"), config).save_pretrained(tmp_path / "lora")
    return str(tmp_path / "lora")


@pytest.fixture
def loreft_folder(tmp_path):
    model = get_peft_model(build("llama"), loreft())
    randomise(model)
    model.save_pretrained(tmp_path / "loreft")
    return str(tmp_path / "loreft")


@torch.no_grad()
def results(model):
    """Logits of a forward with labels, its loss, and the logits of each step of `generate`."""
    model.eval()
    forward = model(input_ids=IDS, labels=LABELS)
    settings = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    steps = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **settings).logits
    return forward.logits, forward.loss, torch.stack(steps)


def merged(lora_folder, loreft_folder):
    base = PeftModel.from_pretrained(build("llama"), lora_folder).merge_and_unload()
    return PeftModel.from_pretrained(base, loreft_folder)


def transformers_lora_first(lora_folder, loreft_folder):
    model = build("llama")
    model.load_adapter(lora_folder)
    model.load_adapter(loreft_folder, adapter_name="second")
    return model


def transformers_loreft_first(lora_folder, loreft_folder):
    return transformers_lora_first(loreft_folder, lora_folder)


def peft_lora_first(lora_folder, loreft_folder):
    first = PeftModel.from_pretrained(build("llama"), lora_folder)
    return PeftModel.from_pretrained(first.base_model.model, loreft_folder, adapter_name="second")


def peft_loreft_first(lora_folder, loreft_folder):
    return peft_lora_first(loreft_folder, lora_folder)


WAYS = [transformers_lora_first, transformers_loreft_first, peft_lora_first, peft_loreft_first]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_way_equals_merging_lora_first(lora_folder, loreft_folder, way):
    expected = results(merged(lora_folder, loreft_folder))
    for found, wanted in zip(results(way(lora_folder, loreft_folder)), expected):
        torch.testing.assert_close(found, wanted, atol=6e-5, rtol=0)
    for alone in (lora_folder, loreft_folder):
        one = results(PeftModel.from_pretrained(build("llama"), alone))
        assert (one[0] - expected[0]).abs().max() > 1e-2


def test_on_a_peft_model_the_error_says_what_to_do(lora_folder, loreft_folder):
    first = PeftModel.from_pretrained(build("llama"), lora_folder)
    with pytest.raises(ValueError, match=r"on the model within, and give it another name") as raised:
        PeftModel.from_pretrained(first, loreft_folder)
    assert len(str(raised.value)) < 350 and "first.base_model.model" in str(raised.value)


def test_one_name_for_both(lora_folder, loreft_folder):
    model = build("llama")
    model.load_adapter(lora_folder)
    with pytest.raises(ValueError, match=r"already exists\. Please use a different name"):
        model.load_adapter(loreft_folder)


@pytest.mark.parametrize("order", [1, -1], ids=["lora_first", "loreft_first"])
def test_one_name_for_both_cannot_be_saved(lora_folder, loreft_folder, order, tmp_path):
    """A model within a model: PEFT takes one name twice, and then has one config for both."""
    folders = [lora_folder, loreft_folder][::order]
    first = PeftModel.from_pretrained(build("llama"), folders[0])
    second = PeftModel.from_pretrained(first.base_model.model, folders[1])
    for model in (first, second):
        for selected in (None, ["default"]):
            with pytest.raises(ValueError, match=r"'default' is the name of two adapters .* `adapter_name="):
                model.save_pretrained(tmp_path / "out", selected_adapters=selected)
    assert not (tmp_path / "out").exists()


def test_a_token_that_is_trained_too_is_no_second_adapter(tmp_path):
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", trainable_token_indices=[5])
    get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    assert any("trainable_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_loreft_is_trained_on_a_frozen_lora_and_each_is_saved_alone(lora_folder, tmp_path):
    first = PeftModel.from_pretrained(build("llama"), lora_folder, adapter_name="below")
    model = get_peft_model(first.base_model.model, loreft())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 9 and all(".loreft." in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.save_pretrained(tmp_path / "top", selected_adapters=["default"])
    first.save_pretrained(tmp_path / "again", selected_adapters=["below"])
    assert not (tmp_path / "top" / "below").exists() and not (tmp_path / "again/adapter_model.safetensors").exists()
    name = "adapter_model.safetensors"
    before, after = load_file(f"{lora_folder}/{name}"), load_file(tmp_path / "again" / "below" / name)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = results(merged(lora_folder, str(tmp_path / "top")))
    for found, wanted in zip(again, results(model)):
        torch.testing.assert_close(found, wanted, atol=6e-5, rtol=0)
    lora_alone = results(PeftModel.from_pretrained(build("llama"), lora_folder))
    assert (again[0] - lora_alone[0]).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_both_are_trained_at_once_and_loaded_again(tokenizer, tmp_path):
    """As the page does it: with TRL, whose trainer takes the model as it is."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=2, target_modules=["up_proj", "down_proj"])
    first = get_peft_model(build("llama"), lora, adapter_name="beside")
    steering = LoReftConfig(task_type="CAUSAL_LM", r=1, intervention="nodireft", act_fn="silu", positions="all")
    model = get_peft_model(first.base_model.model, steering)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(["beside"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = Dataset.from_list([{"input_ids": ids, "labels": LABELS[n].tolist()} for n, ids in enumerate(IDS.tolist())])
    args = SFTConfig(str(tmp_path / "run"), learning_rate=1e-2, max_steps=3, bf16=False, report_to="none", seed=1)
    SFTTrainer(model=model, train_dataset=rows, args=args, processing_class=tokenizer).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".loreft." in name or ".lora_" in name}

    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(build("llama"), str(tmp_path / "both" / "beside"), adapter_name="beside")
    again = PeftModel.from_pretrained(again.base_model.model, str(tmp_path / "both"))
    for found, wanted in zip(results(again), results(model)):
        torch.testing.assert_close(found, wanted, atol=6e-5, rtol=0)
