"""Merging beside PEFT's wrappers, tied embeddings, offloaded weights, and TRL; its arithmetic: test_composition.py."""

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from peft_reft import LoReftConfig

IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(6))
TIED = "ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"
GAINS_BIAS = pytest.mark.filterwarnings("ignore:.*linear maps without a bias:UserWarning")


def tied():
    config = build("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def adapted(base=None, **fields):
    fields = {"task_type": "CAUSAL_LM", "r": 4, "positions": "all", "init_weights": False, **fields}
    model = get_peft_model(base or build("llama"), LoReftConfig(**fields)).eval()
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def same(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


BESIDE = [dict(trainable_token_indices=[*range(3, 20)]), dict(modules_to_save=["lm_head"])]


@GAINS_BIAS
@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: next(iter(beside)))
def test_what_is_trained_beside_survives(beside):
    model = adapted(component="mlp", **beside)
    expected = logits(model)
    merged = model.merge_and_unload()
    same(logits(merged), expected)
    assert type(merged.model.embed_tokens) is torch.nn.Embedding and type(merged.lm_head) is torch.nn.Linear


def test_trained_tokens_are_merged_and_taken_out_again():
    model = adapted(component="mlp", **BESIDE[0])
    expected = logits(model)
    model.merge_adapter(new_parameters=True)
    embeddings = model.get_base_model().model.embed_tokens.token_adapter
    assert embeddings.merged
    same(logits(model), expected)
    model.unmerge_adapter()
    assert not embeddings.merged
    same(logits(model), expected)
    model.merge_adapter(new_parameters=True)
    same(logits(model.unload()), logits(build("llama")))


@GAINS_BIAS
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora_on_other_modules_is_merged_as_well():
    model = adapted(component="mlp")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model.get_base_model(), lora)
    expected = logits(model)
    same(logits(model.merge_and_unload()), expected)


@GAINS_BIAS
def test_only_the_adapters_that_are_named_are_judged():
    """The active one edits chosen tokens and cannot be merged; the other can."""
    model = adapted(component="mlp", positions="f1")
    model.add_adapter("other", LoReftConfig(r=4, positions="all", component="mlp", init_weights=False))
    model.set_adapter("other")
    expected = logits(model)
    model.set_adapter("default")
    same(logits(model.merge_and_unload(adapter_names=["other"])), expected)


# Tied embeddings.


@pytest.mark.filterwarnings(TIED)
def test_tied_embeddings_stay_as_they_are(tmp_path):
    model = adapted(tied(), target_modules=["lm_head"])
    expected, embeddings = logits(model), model.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="linear maps without a bias|no longer tied|tied_target_modules") as warned:
        merged = model.merge_and_unload()
    said = " ".join(str(each.message) for each in warned)
    assert "tied_target_modules=['lm_head']" in said and "no longer tied" in said
    same(logits(merged), expected)
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert merged.config.tie_word_embeddings is False


@pytest.mark.filterwarnings(TIED)
def test_merged_tied_embeddings_are_tied_again():
    base = tied()
    model = adapted(base, target_modules=["lm_head"])
    expected, weight = logits(model), base.lm_head.weight
    before = weight.clone()
    with pytest.raises(ValueError, match=r"other modules have the weight of Linear too.*new_parameters=True"):
        model.merge_adapter()
    assert base.lm_head.weight is weight and base.lm_head.bias is None
    model.merge_adapter(new_parameters=True)
    same(logits(model), expected)
    assert torch.equal(base.model.embed_tokens.weight, before)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight is weight
    assert torch.equal(weight, before) and base.lm_head.bias is None
    same(logits(model), expected)


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_a_second_adapter_merged_into_tied_embeddings():
    base = tied()
    model = adapted(base, target_modules=["lm_head"])
    fields = dict(r=2, positions="all", target_modules=["lm_head"], init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("second", LoReftConfig(**fields))
    model.base_model.set_adapter(["default", "second"])
    expected, before = logits(model), base.model.embed_tokens.weight.clone()
    model.merge_adapter(["default"], new_parameters=True)
    model.merge_adapter(["second"], new_parameters=True)
    same(logits(model), expected)
    assert torch.equal(base.model.embed_tokens.weight, before)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
def test_merged_tied_embeddings_can_be_saved(tmp_path):
    model = adapted(tied(), target_modules=["lm_head"])
    without_offset(model)
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    same(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), expected)


# Parameters that the base does not have.


@torch.no_grad()
def without_offset(model):
    """Zero every b, so that merging needs no bias."""
    for name, parameter in model.named_parameters():
        if name.endswith("default.b"):
            parameter.zero_()


def test_a_new_bias_is_refused_unless_asked_for():
    """TRL merges, sends `named_parameters()` by the base's names, and unmerges. A new bias would not be sent."""
    model = adapted(component="mlp")
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"a Linear without a bias would get one.*TRL.*new_parameters=True"):
        model.merge_adapter()
    assert torch.equal(logits(model), before) and [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_a_bias_that_is_there_takes_the_edit(family):
    model = adapted(build(family), component="mlp")
    expected, names = logits(model), [name for name, _ in model.named_parameters()]
    model.merge_adapter()
    same(logits(model), expected)
    assert [name for name, _ in model.named_parameters()] == names


def test_an_edit_without_an_offset_needs_no_bias():
    model = adapted(component="mlp")
    without_offset(model)
    expected = logits(model)
    model.merge_adapter()
    same(logits(model), expected)


def sent_by_trl(model):
    """Return what TRL gives vLLM, by the base's names."""
    from trl.generation.vllm_generation import VLLMGeneration

    class Alone:
        is_fsdp = False

        def gather_params(self, parameters):
            return torch.no_grad()

    sender = VLLMGeneration.__new__(VLLMGeneration)
    sender.model, sender._dist = model, Alone()
    return {name: tensor.clone() for name, tensor in sender._iter_named_params()}


@torch.no_grad()
def rolled_out(family, weights):
    """Return the logits of the model that vLLM would have, with parameters by name and unknown ones left out."""
    base = build(family)
    for name, parameter in base.named_parameters():
        parameter.copy_(weights[name])
    return logits(base)


def test_what_trl_sends_is_the_policy_or_nothing():
    model = adapted(build("gpt2"), component="mlp")
    expected = logits(model)
    same(rolled_out("gpt2", sent_by_trl(model)), expected)
    same(logits(model), expected)
    model = adapted(component="mlp")
    with pytest.raises(ValueError, match="TRL's sync to vLLM leaves it out"):
        sent_by_trl(model)
    assert not any(hasattr(module, "merged") and module.merged for module in model.modules())


# The weights.


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_merging_reads_the_parameters_as_they_are(write):
    model = adapted(build("gpt2"), component="mlp")
    logits(model)  # whatever is kept for forwards is kept now
    other = adapted(build("gpt2"), component="mlp")
    randomise(other, seed=9)
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        if write == "data":
            old.data.copy_(new.data)
        else:
            old.detach().numpy()[...] = new.detach().numpy()
    model.merge_adapter()
    same(logits(model), logits(other))


def test_safe_merge_looks_at_the_stored_type():
    """60,000 doubled is finite, but not in float16."""
    model = adapted(build("gpt2").half(), component="mlp", intervention="red", r=8, layers=[0])
    projection = model.get_base_model().transformer.h[0].mlp.c_proj
    with torch.no_grad():
        projection.weight.fill_(60000)
        model.get_base_model().transformer.h[0].mlp.loreft.loreft_weights["default"].s.fill_(2)
    before = projection.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(projection.weight, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@GAINS_BIAS
def test_offloaded_weights(family):
    from accelerate import cpu_offload

    fields = dict(component="mlp")
    expected = logits(adapted(build(family), **fields))
    base = build(family)
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = adapted(base, **fields)
    assert all(parameter.is_meta for name, parameter in base.named_parameters() if "loreft" not in name)
    model.merge_adapter(new_parameters=True)
    same(logits(model), expected)
    model.unmerge_adapter()
    same(logits(model), expected)
    same(logits(model.merge_and_unload()), expected)
