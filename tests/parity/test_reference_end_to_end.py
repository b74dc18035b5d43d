"""A tiny Llama with interventions, against the authors' code: logits, loss, gradients, greedy generation."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peft_reft import LoReftConfig

HERE = Path(__file__).parent
NUMBERS = load_file(HERE / "end_to_end.safetensors")
BATCH = {name: NUMBERS[name] for name in ("input_ids", "attention_mask", "labels")}
CASES = {
    "loreft_tied": dict(intervention="loreft", tie="layer", layers=[0, 1, 2]),
    "loreft_untied": dict(intervention="loreft", tie="group", layers=[0, 2]),
    "direft_tied": dict(intervention="direft", tie="layer", layers=[1]),
}


def load_llama():
    return LlamaForCausalLM.from_pretrained(HERE / "llama").eval()


def reference(case, layer, what):
    """Their tensor for `layer`; untied, prefix and suffix stacked."""
    names = {"R": "w.{}.R", "W": "w.{}.W", "b": "w.{}.b"}
    names |= {"grad_W": "grad.{}.learned_source.weight", "grad_b": "grad.{}.learned_source.bias"}
    keys = [f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{group}" for group in range(2)]
    found = [NUMBERS.get(f"{case}.{names[what].format(key)}") for key in keys]
    if found[1] is None:
        return found[0].T if what == "R" else found[0]
    return torch.stack([tensor.T if what == "R" else tensor for tensor in found])


def weights(model, layer):
    return model.get_submodule(f"base_model.model.model.layers.{layer}.loreft.loreft_weights.default")


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def model(case):
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", **CASES[case])
    model = get_peft_model(load_llama(), config).eval()
    with torch.no_grad():
        for layer in config.layers:
            for name, parameter in weights(model, layer).named_parameters():
                parameter.copy_(reference(case, layer, name))
    return model


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def real(logits):
    return logits[BATCH["attention_mask"] == 1]


def test_the_base_model_is_theirs():
    with torch.no_grad():
        assert_close(real(load_llama()(**BATCH).logits), real(NUMBERS["base_logits"]))


def test_logits_loss_and_gradients(model, case):
    out = model(**BATCH)
    assert_close(real(out.logits), real(NUMBERS[f"{case}.logits"]))
    assert_close(out.loss, NUMBERS[f"{case}.loss"].squeeze())
    out.loss.backward()
    for layer in CASES[case]["layers"]:
        for name in ("W", "b"):
            assert_close(weights(model, layer).get_parameter(name).grad, reference(case, layer, f"grad_{name}"))
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 3 * len(CASES[case]["layers"]) and all(".loreft." in name for name in trained)


def test_the_edits_are_large_enough_to_see(model, case):
    with torch.no_grad():
        edited = model(**BATCH).logits
        with model.disable_adapter():
            assert_close(real(model(**BATCH).logits), real(NUMBERS["base_logits"]))
    assert (real(edited) - real(NUMBERS["base_logits"])).abs().max() > 1


def test_greedy_generation(model, case):
    generated = model.generate(
        input_ids=NUMBERS["prompt_ids_left_padded"],
        attention_mask=NUMBERS["prompt_mask_left_padded"],
        do_sample=False,
        min_new_tokens=10,  # suppresses the end of sequence
        max_new_tokens=10,
    )
    assert torch.equal(generated, NUMBERS[f"{case}.generated"])
