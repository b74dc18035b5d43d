"""Every family: injection, training, parameter counts, finding blocks; errors that a model can cause."""

import pytest
import torch
from conftest import CAUSAL, DIMENSIONS, HIDDEN, LAYERS, SEQ_CLS, VOCAB, build, randomise
from peft import TaskType, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from peft_reft import LoReftConfig
from peft_reft.edits import rotation
from peft_reft.tuner.checkpointing import WithForward

R = 4


def batch(task="CAUSAL_LM"):
    ids = torch.randint(3, VOCAB, (3, 12))
    if task == "SEQ_CLS":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2])}
    labels = ids.clone()
    labels[:, :7] = -100
    return {"input_ids": ids, "labels": labels}


def one_step(model, inputs):
    """Return the gradients of one step, and the parameters before it."""
    model.train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model(**inputs).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return before, with_gradient


@pytest.mark.parametrize("component", ["block", "attention", "mlp"])
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_train_exactly_the_papers_parameters(family, component):
    model = get_peft_model(build(family), LoReftConfig(task_type="CAUSAL_LM", r=R, component=component))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == LAYERS * (2 * R * HIDDEN + R)
    before, with_gradient = one_step(model, batch())
    assert with_gradient == set(before)
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert still == []


@pytest.mark.parametrize("family", SEQ_CLS)
def test_classifiers_train_their_head_too(family):
    model = get_peft_model(build(family), LoReftConfig(task_type="SEQ_CLS", r=R, positions="f1"))
    before, with_gradient = one_step(model, batch("SEQ_CLS"))
    assert with_gradient == set(before)
    head = [name for name in before if "modules_to_save" in name]
    own = [name for name in before if "loreft_weights" in name]
    assert head and len(own) == 3 * LAYERS and len(head) + len(own) == len(before)
    assert sum(before[name].numel() for name in own) == LAYERS * (2 * R * HIDDEN + R)
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ_CLS])
def test_identity_at_the_start(family):
    task = "SEQ_CLS" if family in SEQ_CLS else "CAUSAL_LM"
    base = build(family)
    inputs = batch(task)
    expected = base(**inputs).logits
    model = get_peft_model(base, LoReftConfig(task_type=task, r=R, init_weights=True)).eval()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("component", ["block", "attention", "mlp"])
@pytest.mark.parametrize("family", CAUSAL)
def test_the_edit_lands_on_the_output_of_that_module_at_those_tokens(family, component):
    """Compared with a copy of the model in which plain hooks, written here, make the edit."""
    config = LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f2+l1", layers=[1], component=component)
    model = get_peft_model(build(family), config).eval()
    randomise(model)
    name = next(n for n, m in model.get_base_model().named_modules() if n.endswith(".loreft")).removesuffix(".loreft")
    R_, W, b = (
        p.detach() for p in model.get_submodule(f"base_model.model.{name}.loreft.loreft_weights.default").parameters()
    )
    ids = torch.randint(3, VOCAB, (2, 9))

    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        view = h.view(2, 9, -1).clone()
        for column in (0, 1, 8):
            token = view[:, column]
            view[:, column] = token + (token @ W.T + b - token @ R_.T) @ R_
        view = view.view_as(h)
        return (view, *output[1:]) if isinstance(output, tuple) else view

    plain = build(family)
    plain.get_submodule(name).register_forward_hook(hook)
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=2e-5, rtol=1e-4)


def test_hidden_states_show_what_the_next_block_gets():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R, init_weights=False)).eval()
    seen = []
    blocks = model.get_base_model().model.layers
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    out = model(input_ids=batch()["input_ids"], output_hidden_states=True)
    for layer in range(LAYERS):
        assert torch.equal(out.hidden_states[layer], seen[layer])


@pytest.mark.parametrize(
    "layers, expected",
    [("all", [0, 1, 2]), ([0, -1], [0, 2]), ("1-", [1, 2]), ("0;2", [0, 2]), (-1, [2]), ("-2--1", [1, 2])],
)
def test_the_chosen_layers_are_edited(layers, expected):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", layers=layers))
    edited = [i for i, block in enumerate(model.get_base_model().model.layers) if hasattr(block, "loreft")]
    assert edited == expected


def test_ranks_by_layer(tmp_path):
    config = LoReftConfig(task_type="CAUSAL_LM", r={"0": 2, "1-2": 5, "-1": 7}, layers=[0, 1])
    with pytest.raises(ValueError, match=r"r=\{'0': 2, '1-2': 5, '-1': 7\} gives layer 2 two ranks"):
        get_peft_model(build("llama"), config)
    config = LoReftConfig(task_type="CAUSAL_LM", r={"0": 2, "2": 7})
    with pytest.raises(ValueError, match=r"no rank for layers \[1\]"):
        get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match=r"r=33 is larger than the hidden size 32 of model\.layers\.1"):
        get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r={"0": 2, "1-": 33}))
    config = LoReftConfig(task_type="CAUSAL_LM", r={"0": 2, "1-": 5}, positions={"0": "f1", "1-": "l1"})
    model = get_peft_model(build("llama"), config)
    found = [block.loreft.loreft_weights.default.W.shape for block in model.get_base_model().model.layers]
    assert found == [(2, HIDDEN), (5, HIDDEN), (5, HIDDEN)]
    assert model.get_nb_trainable_parameters()[0] == 12 * (2 * HIDDEN + 1)


def test_target_modules_and_exclude_modules():
    config = LoReftConfig(
        task_type="CAUSAL_LM", r=R, target_modules=["self_attn.o_proj"], exclude_modules=["layers.1.self_attn.o_proj"]
    )
    model = get_peft_model(build("llama"), config)
    edited = [name for name, _ in model.get_base_model().named_modules() if name.endswith(".loreft")]
    assert edited == [f"model.layers.{i}.self_attn.o_proj.loreft" for i in (0, 2)]
    config = LoReftConfig(task_type="CAUSAL_LM", r=R, exclude_modules=["layers.1"])
    model = get_peft_model(build("llama"), config)
    edited = [name for name, _ in model.get_base_model().named_modules() if name.endswith(".loreft")]
    assert edited == [f"model.layers.{i}.loreft" for i in (0, 2)]


def test_a_linear_target_has_the_size_of_its_output():
    config = LoReftConfig(task_type="CAUSAL_LM", r=R, target_modules=r"model\.layers\.\d\.mlp\.up_proj")
    model = get_peft_model(build("llama"), config)
    assert model.get_base_model().model.layers[0].mlp.up_proj.loreft.loreft_weights.default.R.shape == (R, 48)


@pytest.mark.parametrize(
    "tie, shape, modules",
    [
        ("layer", (R, HIDDEN), 3),
        ("group", (2, R, HIDDEN), 3),
        ("position", (5, R, HIDDEN), 3),
        ("model", (R, HIDDEN), 1),
    ],
)
def test_tie_says_which_tokens_share_weights(tie, shape, modules):
    """`tie` decides which tokens share weights: the edit of each token is the formula with its own weights."""
    config = LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f3+l2", tie=tie, init_weights=False)
    model = get_peft_model(build("llama"), config).eval()
    randomise(model)
    layers = [block.loreft for block in model.get_base_model().model.layers]
    weights = [layer.loreft_weights["default"] for layer in layers]
    assert weights[0].R.shape == shape
    assert len({id(w) for w in weights}) == modules
    assert model.get_nb_trainable_parameters()[0] == modules * weights[0].R[..., 0, 0].numel() * (2 * R * HIDDEN + R)
    inputs, outputs = [], []
    block = model.get_base_model().model.layers[1]
    h = torch.randn(2, 9, HIDDEN)
    block.forward = lambda hidden_states, *args, **kwargs: inputs.append(h) or h.clone()
    block.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(input_ids=torch.randint(3, VOCAB, (2, 9)))
    expected = h.clone()
    for slot, column in enumerate([0, 1, 2, 7, 8]):
        which = {"group": (0 if slot < 3 else 1,), "position": (slot,)}.get(tie, ())
        r, w, b = (getattr(weights[1], name)[which] for name in ("R", "W", "b"))
        token = h[:, column]
        expected[:, column] = token + (token @ w.T + b - token @ r.T) @ r
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_falls_on_the_edit_alone_and_in_training_alone(dropout):
    config = LoReftConfig(task_type="CAUSAL_LM", r=R, dropout=dropout, layers=[-1], component="block")
    model = get_peft_model(build("llama"), config)
    randomise(model)
    inputs = batch()
    model.train()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits) == (dropout == 0)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    with model.disable_adapter():
        base = model(**inputs, output_hidden_states=True).hidden_states
    model.train()
    edited = model(**inputs, output_hidden_states=True).hidden_states
    untouched = ~torch.isin(torch.arange(12), torch.tensor([*range(3), *range(3, 7)]))
    assert torch.equal(edited[-1][:, untouched], base[-1][:, untouched])


@pytest.mark.parametrize(
    "task, expected", [(None, True), (TaskType.CAUSAL_LM, True), (TaskType.FEATURE_EXTRACTION, False)]
)
def test_labels_mark_prompts_in_causal_language_models_only(task, expected):
    model = get_peft_model(
        build("llama"), LoReftConfig(task_type=task, r=R, positions="l1", init_weights=False)
    ).eval()
    randomise(model)
    inputs = batch()
    with_labels = model.base_model(**inputs).logits
    without = model.base_model(input_ids=inputs["input_ids"]).logits
    assert torch.equal(with_labels, without) != expected


def test_bf16_base_keeps_its_type_and_the_edit_is_computed_in_fp32():
    model = get_peft_model(build("llama").bfloat16(), LoReftConfig(task_type="CAUSAL_LM", r=R)).eval()
    randomise(model)
    assert {p.dtype for n, p in model.named_parameters() if "loreft" in n} == {torch.float32}
    out = model(input_ids=batch()["input_ids"], output_hidden_states=True)
    assert {h.dtype for h in out.hidden_states} == {torch.bfloat16}
    layer = model.get_base_model().model.layers[0].loreft
    h = torch.randn(5, HIDDEN).bfloat16()
    edit = layer.loreft_weights["default"].edit(h)
    assert edit.dtype == torch.float32
    assert torch.equal(edit, layer.loreft_weights["default"].edit(h.float()))


def test_inputs_may_be_positional():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R, init_weights=False)).eval()
    ids, mask = batch()["input_ids"], torch.ones(3, 12, dtype=torch.long)
    mask[:, :4] = 0
    assert torch.equal(model.base_model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)


def error(base, **kwargs):
    names = {name for name, _ in base.named_modules()}
    attributes = set(base.__dict__)
    with pytest.raises(ValueError) as caught:
        get_peft_model(base, LoReftConfig(**{"task_type": "CAUSAL_LM", **kwargs}))
    assert {name for name, _ in base.named_modules()} == names, "a failed injection must leave nothing behind"
    assert set(base.__dict__) == attributes
    return str(caught.value)


def test_layer_out_of_range():
    message = error(build("llama"), layers=[0, 3])
    assert "layers=[0, 3]" in message and "3 layers" in message and "0 to 2" in message


def test_rank_above_the_hidden_size():
    message = error(build("llama"), r=33)
    assert "r=33" in message and "32" in message and "model.layers.0" in message


def test_mapping_that_names_a_layer_twice_or_leaves_one_out():
    assert "layer 1 two specs" in error(build("llama"), positions={"0-1": "f1", "1-2": "l1"})
    assert "[2]" in error(build("llama"), positions={"0-1": "f1"}, layers=[0, 2])


def test_no_blocks_found_lists_the_candidates():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = build("llama").config
            self.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def forward(self, x):
            return x

    message = error(Odd(), task_type=None)
    assert "stages (5 x Linear)" in message and "target_modules" in message


class Attending(nn.Module):
    """A user's own network, without a config that says sizes: ids (batch, seq) to (batch, seq, 3)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = Conv1D(3, 8)

    def forward(self, ids):
        x = self.table(ids)
        return self.inner(self.attention(x, x, x)[0].contiguous())


@pytest.mark.parametrize("name, d", [("table", 8), ("attention", 8), ("inner", 3)])
def test_modules_that_say_the_size_of_their_output_need_no_config(name, d):
    network, ids = Attending(), torch.randint(0, VOCAB, (2, 5))
    before = network(ids)
    config = LoReftConfig(target_modules=[name], positions="all", r=d, init_weights=False)
    model = get_peft_model(network, config)
    assert {p.shape[-1] for n, p in model.named_parameters() if n.endswith("default.W")} == {d}
    changed = (model(ids) - before).abs().amax(-1)
    assert changed.shape == (2, 5) and (changed > 1e-6).all()


def test_targets_that_match_nothing():
    assert "nothing_like_this" in error(build("llama"), target_modules=["nothing_like_this"])


def test_unknown_component_of_a_block():
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32
        )
    )
    block = next(m for n, m in vision.named_modules() if n.endswith("layers.0"))
    block.strange = block._modules.pop("mlp")
    message = error(vision, task_type=None, component="mlp")
    assert "component='mlp'" in message and "strange" in message


def test_of_encoder_and_decoder_the_encoder_is_edited():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2)
    )
    model = get_peft_model(t5, LoReftConfig(task_type="SEQ_2_SEQ_LM", r=R))
    edited = [name for name, _ in model.get_base_model().named_modules() if name.endswith(".loreft")]
    assert edited == ["encoder.block.0.loreft", "encoder.block.1.loreft"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_target_outside_the_encoder_and_the_decoder_is_refused():
    sizes = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes, tie_word_embeddings=False))
    message = error(t5, task_type="SEQ_2_SEQ_LM", target_modules=["decoder.block.0", "lm_head"])
    assert "names lm_head, in neither" in message


def test_a_part_of_the_model_called_by_itself():
    """The backbone gets token ids and reads them. A block gets hidden states alone, and raises."""
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).eval()
    randomise(model)
    base, ids = model.get_base_model(), batch()["input_ids"]
    with torch.no_grad():
        hidden = base.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(base.lm_head(hidden), model(input_ids=ids).logits)
        torch.testing.assert_close(base.forward(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(RuntimeError, match="outside a forward of its model"):
        base.model.layers[0].loreft(torch.randn(1, 3, base.config.hidden_size))


def test_training_without_labels_raises_unless_only_the_beginning_matters():
    inputs = {"input_ids": batch()["input_ids"]}
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).train()
    with pytest.raises(ValueError, match="DataCollatorForLoReft"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    model(**inputs, intervention_positions=torch.zeros(3, 1, dtype=torch.long))
    first = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f2")).train()
    with pytest.warns(UserWarning, match="LoReFT was given no labels in training"):
        first(**inputs)
    get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R, positions="all")).train()(**inputs)


def test_training_data_without_a_prompt_raises():
    ids = batch()["input_ids"]
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).train()
    with pytest.raises(ValueError, match=r"nothing would train.*completion"):
        model(input_ids=ids, labels=ids)
    labels = ids.clone()
    labels[0, :4] = -100
    model(input_ids=ids, labels=labels)  # one row of the batch is enough
    get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R, positions="all")).train()(
        input_ids=ids, labels=ids
    )


def test_padding_is_no_prompt():
    """axolotl pads packed rows by tokens whose positions count from 0, and gives no mask."""
    ids, position_ids = torch.tensor([[5, 6, 7, 8, 0, 0, 0]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).train()
    labels = ids.masked_fill(ids == 0, -100)
    with pytest.raises(ValueError, match="nothing would train"):
        model(input_ids=ids, position_ids=position_ids, labels=labels)
    labels[0, :2] = -100
    model(input_ids=ids, position_ids=position_ids, labels=labels)


def test_rows_that_start_mid_document_raise():
    ids = batch()["input_ids"]
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).train()
    labels = ids.clone()
    labels[:, 2:7] = -100
    with pytest.raises(ValueError, match="middle of a document"):
        model(input_ids=ids, labels=labels)
    labels[:, :7] = -100
    with pytest.raises(ValueError, match="middle of a document"):
        model(input_ids=ids, labels=labels, position_ids=torch.arange(5, 17).expand(3, -1))


@pytest.mark.parametrize(
    "positions, words",
    [
        (torch.zeros(2, 4, dtype=torch.long), "2 rows for a batch of 3"),
        (torch.zeros(3, 4), "integer tensor"),
        (torch.full((3, 1), 12), "0 to 11"),
        (torch.full((3, 1), -2), "-1 for none"),
        ([[0]] * 3, "list"),
    ],
)
def test_bad_explicit_positions(positions, words):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).eval()
    with pytest.raises(ValueError, match=words):
        model(input_ids=batch()["input_ids"], intervention_positions=positions)


def test_explicit_positions_that_do_not_fit_untied_groups():
    config = LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f2+l2", tie="group")
    model = get_peft_model(build("llama"), config).eval()
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        model(input_ids=batch()["input_ids"], intervention_positions=torch.zeros(3, 3, dtype=torch.long))


def test_a_four_dimensional_mask_raises():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).eval()
    with pytest.raises(ValueError, match="attention mask of shape"):
        model(input_ids=batch()["input_ids"], attention_mask=torch.zeros(3, 1, 12, 12))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # transformers 5.23's new name for it
@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.cell("Gradient checkpointing", "a training loop of your own")
def test_gradient_checkpointing_changes_no_gradient(checkpointing):
    """Two forwards with different prompts come before one backward, as in DPO. Each recomputes its own prompts."""

    def run(checkpointing):
        model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R)).train()
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
            model.enable_input_require_grads()
        torch.manual_seed(0)
        first, second = batch(), batch()
        second["labels"][:, :10] = -100
        (model(**first).loss + 2 * model(**second).loss).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        model = model.unload()
        assert not any(isinstance(f, WithForward) for m in model.modules() for f in vars(m).values())
        return gradients

    for plain, recomputed in zip(run(None), run(checkpointing)):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_each_of_several_groups_is_trained_by_its_own_tokens_alone():
    """Open-ended groups are computed one by one. The second edits generated tokens alone, and here there are none."""
    config = LoReftConfig(task_type="CAUSAL_LM", r=R, positions="p+g", tie="group", layers=[0])
    model = get_peft_model(build("llama"), config).eval()
    randomise(model)
    model(input_ids=batch()["input_ids"]).logits.square().sum().backward()
    for name in ("W", "b"):
        gradient = model.get_base_model().model.layers[0].loreft.loreft_weights["default"].get_parameter(name).grad
        assert gradient[0].abs().max() > 0 and torch.count_nonzero(gradient[1]) == 0


@pytest.mark.parametrize("tie", ["layer", "model"])
def test_one_decomposition_a_training_forward(monkeypatch, tie):
    """All layers share one decomposition."""
    shapes = []
    original = rotation.orthonormalise
    monkeypatch.setattr(rotation, "orthonormalise", lambda a: shapes.append(tuple(a.shape)) or original(a))
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f2+l2", tie=tie))
    shapes.clear()
    ids = batch()["input_ids"]
    labels = ids.clone()
    labels[:, :6] = -100
    model.train()(input_ids=ids, labels=labels)
    assert shapes == [(LAYERS, R, HIDDEN) if tie == "layer" else (R, HIDDEN)]


def test_each_tower_is_edited_at_its_own_positions():
    """A model of texts and images: 7 tokens of two texts, 17 patches of three images."""
    sizes = dict(DIMENSIONS, num_hidden_layers=2)
    tokens = dict(vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = CLIPConfig(
        text_config=sizes | tokens, vision_config=dict(sizes, image_size=32, patch_size=8), projection_dim=16
    )
    targets = r".*encoder\.layers\.0"
    model = get_peft_model(CLIPModel(config), LoReftConfig(r=2, positions="f2+l2", target_modules=targets)).eval()
    randomise(model)
    seen = {}
    base = model.get_base_model()
    for tower in (base.text_model, base.vision_model):
        tower.encoder.layers[0].register_forward_hook(
            lambda block, args, output: seen.setdefault(block, []).append(
                output[0] if type(output) is tuple else output
            )
        )
    inputs = dict(input_ids=torch.randint(3, 64, (2, 7)), pixel_values=torch.randn(3, 3, 32, 32))
    with torch.no_grad():
        model(**inputs)
        with model.disable_adapter():
            model(**inputs)
        base.get_text_features(input_ids=inputs["input_ids"])
        base.get_image_features(pixel_values=inputs["pixel_values"])
    for tower, columns in ((base.text_model, [0, 1, 5, 6]), (base.vision_model, [0, 1, 15, 16])):
        together, plain, alone = seen[tower.encoder.layers[0]]
        assert (together != plain).any(-1)[0].nonzero().flatten().tolist() == columns
        assert torch.equal(together, alone)
