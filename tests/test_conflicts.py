"""A target is refused before anything changes if its edit would never be computed, or would be saved in vain."""

import pytest
import torch
from conftest import VOCAB, build
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, MambaConfig, MambaForCausalLM

from peft_reft import LoReftConfig

IDS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(8))
TOKENS = dict(trainable_token_indices=[3, 4])
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def llama(tied=False):
    config = build("llama").config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def loreft(**fields):
    return LoReftConfig(**{"r": 2, "positions": "f2+l2", "task_type": "CAUSAL_LM", "init_weights": False, **fields})


def lora(**fields):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields})


PLAIN = {}
HEAD = dict(modules_to_save=["lm_head"])
CONFLICTS = [
    # fields of the first adapter, of the second, whether embeddings are tied, and what the message names
    (dict(target_modules=["embed_tokens"], **TOKENS), None, False, "trainable_token_indices names model.embed_tokens"),
    (
        dict(target_modules=["embed_tokens", "down_proj"], **TOKENS),
        None,
        True,
        "this adapter edits model.embed_tokens",
    ),
    (dict(target_modules=["embed_tokens"]), TOKENS, False, "another adapter edits model.embed_tokens"),
    (TOKENS, dict(target_modules=["embed_tokens"]), False, "embed_tokens is in `trainable_token_indices`"),
    (
        dict(trainable_token_indices={"embed_tokens": [3]}),
        dict(target_modules=["embed_tokens"]),
        False,
        "embed_tokens",
    ),
    (TOKENS, dict(target_modules=["lm_head"]), True, "lm_head is in `trainable_token_indices`"),
    (dict(target_modules=["lm_head"]), TOKENS, True, "trainable_token_indices names lm_head"),
    (HEAD, dict(target_modules=["lm_head"]), False, "lm_head is in `modules_to_save`"),
    (dict(target_modules=["lm_head"]), HEAD, False, "modules_to_save names lm_head"),
    (dict(modules_to_save=["mlp"]), dict(component="mlp"), False, "model.layers.0.mlp is in `modules_to_save`"),
    (dict(component="mlp"), dict(modules_to_save=["mlp"]), False, "modules_to_save names model.layers.0.mlp"),
    (dict(modules_to_save=["mlp"]), dict(target_modules=["down_proj"]), False, "mlp is in `modules_to_save`"),
    (dict(target_modules=["down_proj"]), dict(modules_to_save=["mlp"]), False, "edits model.layers.0.mlp.down_proj"),
    (PLAIN, dict(modules_to_save=["layers.1"], target_modules=["q_proj"]), False, "edits model.layers.1 with LoReFT"),
]


@pytest.mark.parametrize(("first", "second", "tied", "words"), CONFLICTS, ids=str)
def test_wrappers_and_edits_of_one_module(first, second, tied, words):
    base = llama(tied)
    if second is None:
        with pytest.raises(ValueError, match=words):
            get_peft_model(base, loreft(**first))
        assert not any("loreft" in name for name, _ in base.named_modules())
        return
    model = get_peft_model(base, loreft(**first), adapter_name="one").eval()
    before, names = model(input_ids=IDS).logits, [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=words):
        model.add_adapter("two", loreft(**second))
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert [name for name, _ in model.named_parameters()] == names and list(model.peft_config) == ["one"]


@pytest.mark.parametrize(
    ("first", "second", "tied"),
    [
        (dict(target_modules=["lm_head"], **TOKENS), PLAIN, False),
        (TOKENS, dict(target_modules=["lm_head"]), False),
        (HEAD, PLAIN, True),
        (dict(HEAD, **TOKENS), dict(HEAD, component="mlp"), False),
        (dict(target_modules=["lm_head", "down_proj"], **HEAD), PLAIN, False),  # PEFT takes lm_head off the targets
        (dict(modules_to_save=["down_proj"]), PLAIN, False),  # a part of what is edited
    ],
    ids=str,
)
def test_what_goes_together(first, second, tied):
    model = get_peft_model(llama(tied), loreft(**first), adapter_name="one")
    model.add_adapter("two", loreft(**second))
    for name in ("one", "two"):
        model.set_adapter(name)
        model(input_ids=IDS, labels=IDS.masked_fill(torch.arange(6) < 3, -100)).loss.backward()
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all(model.get_parameter(name).grad is not None for name in trained)
        model.zero_grad()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora_and_loreft_on_one_module_add_up():
    base = llama()
    get_peft_model(base, lora(target_modules=["embed_tokens"]))
    model = get_peft_model(base, loreft(target_modules=["embed_tokens"]))
    edited = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=IDS).logits, edited)


def test_a_list_of_modules_has_no_output():
    with pytest.raises(ValueError, match=r"names model\.layers, a ModuleList, which is never called"):
        get_peft_model(llama(), loreft(target_modules=["layers"]))


def test_a_weight_that_another_module_takes():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.attention.out_features = 8

        def forward(self, input_ids):
            return self.attention(input_ids, input_ids, input_ids)[0]

    with pytest.raises(ValueError, match=r"attention\.out_proj, whose weight MultiheadAttention takes"):
        get_peft_model(Attends(), LoReftConfig(r=2, target_modules=["out_proj"]))
    get_peft_model(Attends(), LoReftConfig(r=2, target_modules=["attention"]))


@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_mamba_as_lora(name):
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2)
    for adapter in (lora(target_modules=[name]), loreft(target_modules=[name])):
        with pytest.raises(ValueError, match=name):
            get_peft_model(MambaForCausalLM(config), adapter)


# Modules of another model, as of a reward model around a policy's backbone.


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_modules_that_two_models_share():
    policy = get_peft_model(llama(), loreft()).eval()
    before = policy(input_ids=IDS).logits
    reward = LlamaForSequenceClassification(policy.get_base_model().config)
    reward.model = policy.get_base_model().model
    for name in ("default", "reward"):
        with pytest.raises(ValueError, match=r"model\.layers\.0 is a module of another model too.*keep_vars=True"):
            get_peft_model(reward, loreft(task_type="SEQ_CLS"), adapter_name=name)
    assert torch.equal(policy(input_ids=IDS).logits, before)
    policy.unload()
    assert get_peft_model(reward, loreft(task_type="SEQ_CLS")).eval()(input_ids=IDS).logits.shape == (2, 2)


def test_weights_that_two_models_share():
    policy, reward = llama(), LlamaForSequenceClassification(llama().config)
    reward.load_state_dict(policy.state_dict(keep_vars=True), strict=False, assign=True)
    reward, policy = (
        get_peft_model(reward, loreft(task_type="SEQ_CLS")).eval(),
        get_peft_model(policy, loreft()).eval(),
    )
    alone = get_peft_model(llama(), loreft()).eval()
    alone.load_state_dict(policy.state_dict())
    reward(input_ids=IDS)
    assert torch.equal(policy(input_ids=IDS).logits, alone(input_ids=IDS).logits)


# TRL's head, which does not call `lm_head`.


def with_fused_head(**fields):
    from trl.trainer.utils import add_fused_lm_head

    model = get_peft_model(llama(), loreft(**fields))
    add_fused_lm_head(model.get_base_model())
    return model


LABELS = IDS.masked_fill(torch.arange(6) < 3, -100)


@pytest.mark.parametrize("targets", [["lm_head"], r".*layers\.\d+|lm_head"], ids=str)
def test_a_head_that_trl_does_not_call(targets):
    model = with_fused_head(target_modules=targets)
    with pytest.raises(ValueError, match="'lm_head', whose output is never computed"):
        model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    with model.disable_adapter():  # DPO's reference
        model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert model.get_base_model().lm_head.loreft.loreft_weights["default"].W.grad is not None


def test_blocks_under_trl_s_head():
    model = with_fused_head()
    torch.testing.assert_close(
        model(input_ids=IDS, labels=LABELS, fused_lm_head=True).loss, model(input_ids=IDS, labels=LABELS).loss
    )
