"""`component="heads"`: each attention head's output has an edit of its own, before the output projection."""

import copy
import re

import pytest
import torch
from conftest import CAUSAL, HIDDEN, LAYERS, SEQ_CLS, VOCAB, WIDER, build, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from peft_reft import LoReftConfig, LoReftRuntimeConfig
from peft_reft.convert import Adapter, to_easysteer, to_pyreft
from peft_reft.edits.formulas import INTERVENTIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

HEADS, R = 4, 2
SIZE = HIDDEN // HEADS
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def config(**fields):
    fields = dict(dict(task_type="CAUSAL_LM", r=R, positions="f2+l1", component="heads"), **fields)
    if not INTERVENTIONS[fields.get("intervention", "loreft")].has_rank:
        del fields["r"]
    return LoReftConfig(**fields)


def adapted(base="llama", **fields):
    model = get_peft_model(build(base) if isinstance(base, str) else base, config(**fields))
    randomise(model)
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model(input_ids=ids, **inputs).logits


def edited_modules(model):
    return [name.removesuffix(".loreft") for name, _ in model.named_modules() if name.endswith(".loreft")]


def with_plain_hooks(base, model, columns):
    """`base` with hooks, written here, that make the edits of `model`: head by head, token by token."""
    for name in edited_modules(model.get_base_model()):
        weights = model.get_base_model().get_submodule(f"{name}.loreft.loreft_weights.default")
        R_, W, b = weights.R.detach(), weights.W.detach(), weights.b.detach()  # (heads, r, size), ..., (heads, r)

        def hook(module, args, R_=R_, W=W, b=b):
            given = args[0].clone().view(*IDS.shape, -1)
            size = R_.shape[-1]
            for column in columns:
                for head in range(len(R_)):
                    h = given[:, column, head * size : (head + 1) * size]
                    h = h + (h @ W[head].T + b[head] - h @ R_[head].T) @ R_[head]
                    given[:, column, head * size : (head + 1) * size] = h
            return (given.view_as(args[0]),)

        base.get_submodule(name).register_forward_pre_hook(hook)
    return base


@pytest.mark.parametrize("family", CAUSAL)
def test_each_head_is_edited_by_itself(family):
    model = adapted(family)
    assert len(edited_modules(model)) == LAYERS
    assert model.get_nb_trainable_parameters()[0] == LAYERS * HEADS * (2 * R * SIZE + R)
    expected = logits(with_plain_hooks(build(family), model, [0, 1, 8]))
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert (expected - logits(build(family))).abs().max() > 1e-2


@pytest.mark.parametrize("family", SEQ_CLS)
def test_heads_of_an_encoder(family):
    model = adapted(family, task_type="SEQ_CLS", positions="f2")
    plain = with_plain_hooks(build(family), model, [0, 1])
    plain.classifier = model.get_base_model().classifier
    torch.testing.assert_close(logits(model), logits(plain), atol=2e-5, rtol=1e-4)


def test_heads_that_are_larger_than_their_share_of_the_hidden_size():
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    base = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, num_key_value_heads=2, head_dim=24, **sizes)).eval()
    plain = copy.deepcopy(base)
    model = adapted(base)
    shape = model.get_base_model().model.layers[0].self_attn.o_proj.loreft.loreft_weights.default.W.shape
    assert shape == (4, R, 24)
    torch.testing.assert_close(logits(model), logits(with_plain_hooks(plain, model, [0, 1, 8])), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_slice_of_the_input_is_what_one_head_makes():
    """A change of the values of one key-value head changes the slices of the two query heads that share it."""
    base, given = build("llama"), []
    attention = base.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    logits(base)
    attention.v_proj.weight[SIZE:].mul_(3)  # of the second key-value head
    logits(base)
    changed = (given[0] != given[1]).unflatten(-1, (HEADS, SIZE)).any(-1).any(0).any(0)
    assert changed.tolist() == [False, False, True, True]


FIELDS = [
    *(dict(intervention=name) for name in INTERVENTIONS if name != "interchange"),
    dict(act_fn="gelu"),
    dict(intervention="nodireft", act_fn="silu", positions="all"),
    dict(tie="group"),
    dict(tie="position"),
    dict(tie="model"),
    dict(positions="p+g", tie="group"),
    dict(r={"0": 1, "1-": SIZE}, layers="0-1"),
    dict(positions={"0": "f1", "1-": "l2"}),
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_saved_and_loaded(fields, tmp_path):
    model = adapted(**fields)
    expected = logits(model)
    assert (expected - logits(build("llama"))).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("llama")))
    base = model.unload()
    assert torch.equal(logits(base), logits(build("llama"))) and not edited_modules(base)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_heads_are_blocks_on_the_diagonal(fields):
    """An edit of all heads is one of their whole hidden state, and changes no slice by another slice."""
    model = adapted(**fields)
    layer = model.get_base_model().model.layers[0].self_attn.o_proj.loreft
    weights = layer.weights("default")
    h = torch.randn(*(() if weights.current_factors().lead is None else (weights.current_factors().lead,)), 5, HIDDEN)
    whole = weights.edit(h)
    by_head = weights.factors_by_head()
    for head in range(HEADS):
        mine = slice(head * SIZE, (head + 1) * SIZE)
        own = by_head.map(lambda tensor: tensor.select(1 if weights.current_factors().lead else 0, head))  # noqa: B023
        torch.testing.assert_close(whole[..., mine], own.edit(h[..., mine]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("init_weights", [True, "paper"])
def test_training(family, init_weights):
    model = get_peft_model(build(family), config(init_weights=init_weights))
    with torch.no_grad():
        same = torch.allclose(logits(model.eval()), logits(build(family)), atol=1e-6)
    assert same is (init_weights is True)
    labels = IDS.clone()
    labels[:, :6] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])] == []


def test_gradients_with_checkpointing_and_in_two_parts():
    found = []
    for untouched in ("off", "on"):
        for checkpointing in (False, True):
            model = adapted(positions="l2", runtime_config=LoReftRuntimeConfig(untouched_prompt=untouched))
            if checkpointing:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            labels = IDS.clone()
            labels[:, :6] = -100
            model.train()(input_ids=IDS, labels=labels).loss.backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("positions", ["f2+l2", "l1+g", "all"])
@pytest.mark.cell("Generation", '`component="heads"`: left padding, with and without a cache, beams')
def test_generate(positions):
    model = adapted(positions=positions)
    prompts = [IDS[0, :4], IDS[1, :7]]
    alone = [model.generate(input_ids=p[None], max_new_tokens=5, do_sample=False)[0, len(p) :] for p in prompts]
    padded = torch.zeros(2, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 7 - len(prompt) :] = prompt
    for more in (dict(), dict(use_cache=False), dict(cache_implementation="static")):
        out = model.generate(
            input_ids=padded, attention_mask=(padded > 0).long(), max_new_tokens=5, do_sample=False, **more
        )
        assert out[:, 7:].tolist() == [answer.tolist() for answer in alone]
    beams = [model.generate(input_ids=IDS[:1], num_beams=3, max_new_tokens=4, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)
    answer = alone[1]
    given = torch.cat([prompts[1], answer])[None]
    labels = given.clone()
    labels[:, :7] = -100
    assert logits(model, given, labels=labels)[0, 6:-1].argmax(-1).tolist() == answer.tolist()


def test_an_adapter_for_each_row():
    model = adapted()
    model.add_adapter("other", config(intervention="red", positions="all"))
    model.add_adapter("blocks", config(component="block"))
    randomise(model)
    names = ["default", "__base__", "other", "blocks", "default"]
    ids = IDS[:1].expand(5, -1)
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, IDS[:1])
        else:
            model.set_adapter(name)
            expected = logits(model, IDS[:1])
        torch.testing.assert_close(mixed[row], expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [dict(), dict(intervention="bias"), dict(tie="group")], ids=str)
def test_weighted_sum(fields):
    model = adapted(**fields)
    model.add_adapter("second", config(**fields))
    randomise(model, seed=3)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, -1.0], "sum")
    model.base_model.set_scale("default", 0.5)
    model.base_model.set_scale("second", -1.0)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_lora_below_and_lora_around():
    """LoRA first: as if it were merged. LoRA around the projection afterwards would get the unedited input."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["o_proj"])
    below = get_peft_model(build("llama"), lora, adapter_name="below")
    merged = get_peft_model(build("llama"), lora, adapter_name="below")
    merged.load_state_dict(below.state_dict())
    one = adapted(below.base_model.model)
    two = adapted(merged.merge_and_unload())
    two.load_state_dict({key: value for key, value in one.state_dict().items() if "loreft" in key}, strict=False)
    torch.testing.assert_close(logits(one), logits(two), atol=1e-5, rtol=1e-4)
    model = adapted()
    around = get_peft_model(model.base_model.model, lora, adapter_name="around")
    around.base_model.set_adapter(["around"])
    with pytest.raises(ValueError, match=r"lora.*Linear was put around o_proj, whose input LoReFT edits"):
        logits(around)
    elsewhere = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj"])
    logits(get_peft_model(adapted().base_model.model, elsewhere, adapter_name="elsewhere"))


@pytest.mark.parametrize("first", ["heads", "outputs"])
def test_input_and_output_of_one_module(first):
    outputs = LoReftConfig(task_type="CAUSAL_LM", target_modules=["o_proj"])
    model = get_peft_model(build("llama"), config() if first == "heads" else outputs)
    with pytest.raises(ValueError, match=r"of model\.layers\.0\.self_attn\.o_proj cannot be edited, since another"):
        model.add_adapter("second", outputs if first == "heads" else config())
    assert len(edited_modules(model)) == LAYERS


@pytest.mark.cell("Quantised bases", '`component="heads"` on nf4 and int8 (bitsandbytes)')
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits, tmp_path):
    from transformers import BitsAndBytesConfig

    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **WIDER)).save_pretrained(tmp_path / "base")
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = BitsAndBytesConfig(**(four if bits == 4 else dict(load_in_8bit=True)))

    def base():
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised).eval()

    model = adapted(base())
    expected = logits(model)
    assert (expected - logits(base())).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path / "adapter")), expected)
    model.train()(input_ids=IDS, labels=IDS.masked_fill(torch.arange(9) < 5, -100)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(gate=True), "gate=True: component='heads' has no gate"),
        (dict(r=SIZE + 1), rf"r={SIZE + 1} is larger than a head of model\.layers\.0\.self_attn\.o_proj"),
        (dict(target_modules=["o_proj"]), "cannot be combined with"),
    ],
    ids=str,
)
def test_what_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        get_peft_model(build("llama"), config(**fields))


def test_a_projection_that_is_never_called():
    """torch's own attention takes the weight of its output projection."""
    base = build("llama")
    for block in base.model.layers:
        block.self_attn = torch.nn.MultiheadAttention(HIDDEN, HEADS)
    with pytest.raises(ValueError, match=r"out_proj, whose weight MultiheadAttention takes without calling it"):
        get_peft_model(base, config())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda attention: setattr(attention, "odd", attention._modules.pop("o_proj")), "no output projection by a"),
        (lambda attention: setattr(attention, "num_heads", 5), "says that it has 5 heads"),
    ],
    ids=["no projection", "no heads"],
)
def test_heads_that_are_not_found(change, words):
    base = build("llama")
    change(base.model.layers[1].self_attn)
    with pytest.raises(ValueError, match=rf"component='heads': .*{words}"):
        get_peft_model(base, config())


def test_converters_and_words(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "on the output of each attention head of all layers" in card
    adapter = Adapter.load(str(tmp_path / "adapter"))
    for convert in (to_pyreft, to_easysteer):
        with pytest.raises(ValueError, match="component='heads'"):
            convert(adapter, str(tmp_path / "theirs"))


def test_inspect(tmp_path, capsys):
    from peft_reft_cli import main

    adapted().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "each attention head" in out
    row = re.search(r"model\.layers\.0\.self_attn\.o_proj +(\d+) +(\S+)", out)
    assert int(row[1]) == HEADS * (2 * R * SIZE + R) and float(row[2]) < 1e-5


def test_a_wrong_size_of_the_input():
    """As under tensor parallelism, where a process has some of the heads."""
    model = adapted()
    projection = model.get_base_model().model.layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: (args[0][..., : HIDDEN // 2],), prepend=True)
    with pytest.raises(ValueError, match="size 32, but the module was given 16 of them: tensor parallelism"):
        logits(model)
