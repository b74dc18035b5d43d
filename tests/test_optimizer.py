"""`create_loreft_optimizer`: which parameter gets which rate, and what that is for."""

import math

import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB, build
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft_reft import LoReftConfig, create_loreft_optimizer
from peft_reft.tools.norm_gains import norm_gains


def rates(model, optimizer):
    """The rate of each trained parameter, by name."""
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(by_id) == sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    return {name: by_id[id(parameter)] for name, parameter in trained.items()}


@pytest.mark.parametrize("r", [1, 8, 32])
@pytest.mark.parametrize("layers", ["all", "1"])
def test_rates_follow_rank_and_number_of_layers(r, layers):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=r, layers=layers))
    n = LAYERS if layers == "all" else 1
    found = rates(model, create_loreft_optimizer(model, lr=1e-3))
    assert len(found) == 3 * n
    assert [*found.values()] == pytest.approx([1e-3 * 2000 / (n * math.sqrt(r * HIDDEN))] * len(found))


def test_each_layer_has_the_rate_of_its_rank():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r={"0": 2, "1-": 8}))
    found = rates(model, create_loreft_optimizer(model, lr=1e-3))
    first = {rate for name, rate in found.items() if ".layers.0." in name}
    second = {rate for name, rate in found.items() if ".layers.1." in name}
    assert first.pop() == pytest.approx(2 * second.pop())


@pytest.mark.parametrize("tie", ["group", "model"])
def test_shared_weights_are_one_parameter(tie):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", tie=tie))
    found = rates(model, create_loreft_optimizer(model, lr=1e-3))
    assert [*found.values()] == pytest.approx([1e-3 * 2000 / (LAYERS * math.sqrt(8 * HIDDEN))] * len(found))


def test_a_formula_without_rank_has_the_rate_itself():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", intervention="bias"))
    assert {*rates(model, create_loreft_optimizer(model, lr=1e-3)).values()} == {1e-3}


def test_a_new_head_has_a_higher_rate_and_a_pretrained_module_has_not():
    model = get_peft_model(build("bert"), LoReftConfig(task_type="SEQ_CLS", positions="f1"))
    heads = {rate for name, rate in rates(model, create_loreft_optimizer(model, lr=1e-3)).items() if "classif" in name}
    assert [*heads] == pytest.approx([1e-2])
    found = rates(model, create_loreft_optimizer(model, lr=1e-3, head_lr_ratio=3.0))
    assert [rate for name, rate in found.items() if "classif" in name] == pytest.approx([3e-3] * 2)
    tokens = LoReftConfig(task_type="SEQ_CLS", positions="f1", trainable_token_indices={"word_embeddings": [3]})
    model = get_peft_model(build("bert"), tokens)
    found = rates(model, create_loreft_optimizer(model, lr=1e-3))
    assert [rate for name, rate in found.items() if "trainable_tokens" in name] == [1e-3]
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", modules_to_save=["norm"]))
    found = rates(model, create_loreft_optimizer(model, lr=1e-3))
    assert {rate for name, rate in found.items() if "modules_to_save" in name} == {1e-3}


def test_the_rates_hold_through_a_training(tmp_path):
    """The Trainer's schedule multiplies each group's own rate."""
    model = get_peft_model(build("bert"), LoReftConfig(task_type="SEQ_CLS", positions="f1", r=2))
    optimizer = create_loreft_optimizer(model, torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95))
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    rows = [{"input_ids": [3, 4, 5, 6], "labels": 1}, {"input_ids": [7, 8, 9, 6], "labels": 2}]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, report_to="none", use_cpu=True, save_strategy="no", lr_scheduler_type="linear"
    )
    before = rates(model, optimizer)
    trainer = Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(rates(model, optimizer)))
    trainer.train()
    for step, share in enumerate([1.0, 0.75, 0.5, 0.25]):
        assert seen[step] == pytest.approx({name: rate * share for name, rate in before.items()})


def relative_step(d, r, n, make):
    """|Φ(h) − h| / |h| behind the first edited block after one step."""
    sizes = dict(hidden_size=d, intermediate_size=d, num_attention_heads=d // 32, num_key_value_heads=d // 32)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n, vocab_size=VOCAB))
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=r, positions="p"))
    ids = torch.randint(3, VOCAB, (8, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :8] = -100
    optimizer = make(model)
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    model.disable_adapter_layers()
    h = model(input_ids=ids, labels=labels, output_hidden_states=True).hidden_states[1][:, :8].reshape(-1, d).detach()
    edit = model.base_model.model.model.layers[0].loreft.loreft_weights["default"].edit(h)
    return (edit.norm() / h.norm()).item() * n


def test_a_step_moves_narrow_and_wide_few_and_many_layers_alike():
    """Adam itself moves the widest, of the highest rank and the most layers, many times as far."""
    shapes = [(64, 1, 2), (64, 16, 8), (512, 1, 2), (512, 16, 8)]

    def spread(make):
        steps = [relative_step(*shape, make) for shape in shapes]
        return max(steps) / min(steps)

    ours = spread(lambda model: create_loreft_optimizer(model, lr=1e-5))
    plain = spread(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-5))
    assert ours < 4
    assert plain > 3 * ours


def test_a_model_without_a_trained_adapter_is_refused():
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PeftModelForCausalLM has no LoReFT adapter that is trained"):
        create_loreft_optimizer(model, lr=1e-3)


def with_few_large_dimensions(name):
    """A model whose hidden states are nearly all in one dimension, which the norms make small again, as Gemma 3's."""
    base = build(name)
    with torch.no_grad():
        base.get_input_embeddings().weight[:, 0] = 20.0  # the others are about 0.02
        for module in base.modules():
            if type(module).__name__.endswith("RMSNorm") and module.weight.shape == (HIDDEN,):
                module.weight[0] = 0.01 - ("gemma" in name)  # Gemma's norms multiply by 1 + weight
    return base


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gains_are_those_of_the_formula(name):
    """A norm gives out w ∘ h / |h|, so that a random direction counts for rms(w) · |h| / |w ∘ h| times as much."""
    base = with_few_large_dimensions(name)
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM"))
    ids = torch.arange(3, 19)[None]
    found = [*norm_gains(model, ids).values()]
    h = []  # of each block: (1, 16, d)
    for block in base.model.layers:
        block.register_forward_hook(lambda _, args, out: h.append(out[0] if isinstance(out, tuple) else out))
    model.disable_adapter_layers()
    model(input_ids=ids)
    norms = [*(block.input_layernorm for block in base.model.layers), base.model.norm][1:]
    expected = []
    for hidden, norm in zip(h, norms):
        w = norm.weight + ("gemma" in name)
        ratio = w.square().mean().sqrt() * hidden.norm(dim=-1) / (w * hidden).norm(dim=-1)  # (1, 16)
        expected.append(ratio.median().item())
    assert len(found) == LAYERS and min(expected) > 3
    assert found == pytest.approx(expected, rel=0.15), "the direction is one of many"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_norm_that_makes_edits_large_gets_a_lower_rate(name):
    model = get_peft_model(with_few_large_dimensions(name), LoReftConfig(task_type="CAUSAL_LM"))
    rule = 1e-3 * 2000 / (LAYERS * math.sqrt(8 * HIDDEN))
    found = rates(model, create_loreft_optimizer(model, lr=1e-3))
    for layer, gain in norm_gains(model).items():
        own = {found[key] for key, each in model.named_parameters() if any(each is one for one in layer.parameters())}
        assert gain > 3 and [*own] == pytest.approx([rule / (gain / 2)])
    left_out = rates(model, create_loreft_optimizer(model, lr=1e-3, norm_gains=False))
    assert [*left_out.values()] == pytest.approx([rule] * len(left_out))


def test_weights_that_layers_share_have_the_lowest_of_their_rates():
    model = get_peft_model(with_few_large_dimensions("llama"), LoReftConfig(task_type="CAUSAL_LM", tie="model"))
    found = {*rates(model, create_loreft_optimizer(model, lr=1e-3)).values()}
    lowest = 1e-3 * 2000 / (LAYERS * math.sqrt(8 * HIDDEN)) / (max(norm_gains(model).values()) / 2)
    assert [*found] == pytest.approx([lowest])


def test_looking_at_norms_leaves_the_model_as_it_was():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", init_weights=False)).train()
    model.base_model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    batch = {"input_ids": torch.arange(3, 9)[None], "labels": torch.tensor([[-100] * 4 + [7, 8]])}
    torch.manual_seed(0)
    before = model(**batch).logits
    torch.manual_seed(0)
    create_loreft_optimizer(model, lr=1e-3)
    assert torch.equal(model(**batch).logits, before), "edits and the random state are as before"
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("norm"))


def test_an_encoder_whose_norms_stand_before_the_edit_has_no_gains():
    model = get_peft_model(build("bert"), LoReftConfig(task_type="SEQ_CLS", positions="f1"))
    assert norm_gains(model) == {}


def test_a_model_that_cannot_run_here_is_refused():
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=50))
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"norm_gains=True runs .* LlamaForCausalLM fails: .* Give norm_gains=False"):
        create_loreft_optimizer(model, lr=1e-3)
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("norm"))
    assert create_loreft_optimizer(model, lr=1e-3, norm_gains=False).param_groups
