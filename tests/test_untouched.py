"""Training in two parts: the untouched part without gradient. Everything equals the ordinary path."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import CAUSAL, VOCAB, build, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from peft_reft import LoReftConfig, LoReftRuntimeConfig, Positions, prompt_lengths
from peft_reft.positions.split import Split, common_beginning, first_edited, leaves_a_beginning
from peft_reft.tuner.beginnings import Beginning, Beginnings
from peft_reft.tuner.forward import ATTRIBUTE
from peft_reft.tuner.layer import LoReftLayer

# transformers 5.23 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

HEADER, USER = [60], [61]
"""Marks of a chat template of one token each."""


def adapted(mode, base=None, kept_mb=0, runtime=None, scale=0.5, **config):
    runtime = runtime or LoReftRuntimeConfig(untouched_prompt=mode, kept_mb=kept_mb)
    config = {"task_type": "CAUSAL_LM", "r": 4, "positions": "l3", **config}
    torch.manual_seed(0)
    model = get_peft_model(build("llama") if base is None else base, LoReftConfig(runtime_config=runtime, **config))
    randomise(model, scale)
    return model.train()


def batch(prompts, answers, side="right", labels=True, seed=0):
    """Rows of random tokens, padded on one side."""
    lengths = [prompt + answer for prompt, answer in zip(prompts, answers)]
    seq = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (len(lengths), seq), generator=generator)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, length) in enumerate(zip(prompts, lengths)):
        start = seq - length if side == "left" else 0
        mask[row, start : start + length] = 1
        targets[row, start + prompt : start + length] = ids[row, start + prompt : start + length]
    made = {"input_ids": ids * mask, "attention_mask": mask}
    return {**made, "labels": targets} if labels else made


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, inputs, loss=None):
    """Outputs and gradients of a step; `loss` of the outputs, or the model's."""
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.loss if loss is None else loss(outputs)).backward()
    return outputs, gradients(model)


def assert_equal(one, other, real, rtol=1e-4, atol=1e-6):
    (outputs, grads), (expected, expected_grads) = one, other
    if expected.loss is not None:
        torch.testing.assert_close(outputs.loss, expected.loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(outputs.logits[real], expected.logits[real], rtol=rtol, atol=10 * atol)
    assert grads.keys() == expected_grads.keys() and grads
    largest = max(grad.abs().max() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=10 * rtol, atol=float(10 * atol * largest), msg=name)


@contextmanager
def watched(model):
    """Tokens that the first edited block was run with: those with gradient, and those without, forward by forward."""
    seen = {True: [], False: []}
    layer = next(module for module in model.modules() if isinstance(module, LoReftLayer))

    def note(module, args, kwargs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen[torch.is_grad_enabled()].append(tuple(hidden.shape[:2]))

    handle = layer.block.register_forward_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def compare(inputs, base=lambda: build("llama"), checkpointing=None, loss=None, rtol=1e-4, atol=1e-6, **config):
    """A step with "on" equals one with "off", and runs fewer tokens with gradient; returns their number."""
    steps, tokens = {}, {}
    for mode in ("off", "on"):
        model = adapted(mode, base(), **config)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        with watched(model) as seen:
            steps[mode] = step(model, inputs, loss)
        tokens[mode] = max(batch * seq for batch, seq in seen[True])
    assert_equal(steps["on"], steps["off"], inputs["attention_mask"].bool(), rtol, atol)
    assert tokens["on"] < tokens["off"]
    return tokens["on"]


# Equal


CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_it_equals_the_ordinary_path(data):
    """Any lengths, either side of padding, specs that leave a beginning, activation checkpointing of both kinds."""
    rows = data.draw(st.integers(1, 4), "rows")
    prompts = data.draw(st.lists(st.integers(6, 20), min_size=rows, max_size=rows), "prompts")
    answers = data.draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows), "answers")
    inputs = batch(prompts, answers, data.draw(st.sampled_from(["left", "right"]), "side"))
    if data.draw(st.booleans(), "positions given"):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    spec = data.draw(st.sampled_from(["l1", "l3", "l2~2", "l2+g", "l1+g2", "g", {"0": "l4", "1-": "l1"}]), "spec")
    tie = data.draw(st.sampled_from(["layer", "group", "model"]), "tie")
    compare(inputs, checkpointing=data.draw(st.sampled_from(CHECKPOINTING)), positions=spec, tie=tie)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_families(family, side):
    """Sliding windows shorter than the prompts, learned positions, positions made from the mask."""

    def base():
        model = build(family)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return model

    compare(batch([20, 11, 16], [4, 3, 6], side), base)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(attention):
    def base():
        model = build("llama")
        model.set_attn_implementation(attention)
        return model

    compare(batch([20, 11, 16], [4, 3, 6]), base)


def test_embeddings_instead_of_ids():
    table = torch.randn(VOCAB, 32)
    inputs = batch([20, 11], [4, 3])
    inputs["inputs_embeds"] = table[inputs.pop("input_ids")]
    compare(inputs)


def test_rows_are_cut_one_by_one():
    """The longest rest is run with gradient, not all that stands behind the shortest prompt."""
    inputs = batch([28, 6, 17], [2, 4, 3])
    assert compare(inputs) == 3 * (3 + 4)


def test_a_row_without_an_edit():
    inputs = batch([20, 20], [4, 4])
    inputs["intervention_positions"] = torch.tensor([[17, 18, 19], [-1, -1, -1]])
    compare(inputs)


def test_subspaces():
    inputs = batch([20, 11], [4, 3])
    compare({**inputs, "subspaces": [[0, 2], [1]]})


def test_a_loss_of_ones_own():
    """Label smoothing and `compute_loss_func` read the logits, with gradient."""
    inputs = batch([20, 11], [4, 3])
    targets = inputs["labels"]

    def smoothed(outputs):
        return nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1
        )

    given = {name: value for name, value in inputs.items() if name != "labels"}
    given["intervention_positions"] = torch.tensor([[17, 18, 19], [8, 9, 10]])
    compare(given, loss=smoothed)


def test_shifted_labels_and_counted_items():
    inputs = batch([20, 11], [4, 3])
    shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    compare({**inputs, "shift_labels": shifted, "num_items_in_batch": torch.tensor(9)})


def test_a_chat_that_is_trained_on_whole():
    """Supervised tokens before the first edit: the causal model has to see them, so its backbone is cut."""
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    for row, starts in enumerate([(20, 32), (16, 30)]):
        for at in starts:
            ids[row, at] = HEADER[0]
            ids[row, at + 6] = USER[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    marks = dict(response_template=[HEADER], instruction_template=[USER])
    tokens = compare(inputs, positions="l2", **marks)
    assert tokens == 2 * (40 - 15)


@pytest.mark.parametrize("answers", [[3, 5], [4, 4]], ids=["ragged", "even"])
def test_the_fused_head_of_trl(answers):
    """What trainers read: log-probabilities, entropy, the most likely token, the mask."""
    inputs = batch([20, 20], answers)
    found = {}
    for mode in ("off", "on"):
        base = build("llama")
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        model = adapted(mode, base)
        with watched(model) as seen:
            outputs = model(**inputs, fused_lm_head=True)
        outputs.loss.backward()
        found[mode] = outputs, gradients(model), seen[True]
    (outputs, grads, with_gradient), (expected, expected_grads, _) = found["on"], found["off"]
    assert with_gradient == [(2, 3 + max(answers))]
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_no_more_than_another_batch_does(dtype):
    inputs = batch([20, 11, 16], [4, 3, 6])
    alone = {name: value[:1] for name, value in inputs.items()}

    def logits(mode, given):
        model = adapted(mode, build("llama").to(dtype))
        return model(**given).logits[0, :24].float()

    ordinary = logits("off", inputs)
    changes = (logits("off", alone)[:24] - ordinary).abs().max()
    assert (logits("on", inputs) - ordinary).abs().max() <= 2 * changes + 4 * torch.finfo(dtype).eps
    assert not torch.equal(ordinary, torch.zeros_like(ordinary))


def test_under_autocast():
    inputs = batch([20, 11], [4, 3])
    found = []
    for mode in ("off", "on"):
        model = adapted(mode)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-2, atol=1e-2)
    assert found[1][1].keys() == found[0][1].keys()


def test_two_forwards_before_one_backward():
    one, two = batch([20, 11], [4, 3]), batch([15, 18], [5, 2], seed=1)
    found = {}
    for mode in ("off", "on"):
        model = adapted(mode)
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (model(**one).loss - model(**two).loss).backward()
        found[mode] = gradients(model)
    for name, grad in found["off"].items():
        torch.testing.assert_close(found["on"][name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_frozen_lora_beside_it_belongs_to_the_base():
    inputs = batch([20, 11], [4, 3])

    def base():
        model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return model.requires_grad_(False).base_model.model

    compare(inputs, base)


# Chosen


@pytest.mark.parametrize(
    "spec, leaves", [("l7", True), ("l2~3", True), ("g", True), ("l1+g4", True), ("f1+l7", False), ("p", False)]
)
def test_which_specs_leave_a_beginning(spec, leaves):
    assert leaves_a_beginning(Positions.parse(spec).groups) is leaves


def trained_embeddings(model):
    model.get_input_embeddings().requires_grad_(True)


def noisy(model):
    model.get_input_embeddings().neftune_noise_alpha = 5.0


def with_states(model):
    model.config.output_hidden_states = True


IMPOSSIBLE = {
    "first tokens": (dict(positions="f2+l2"), {}, None, "name the first tokens of a prompt"),
    "whole prompt": (dict(positions="all"), {}, None, "name the first tokens of a prompt"),
    "a cache wanted": ({}, dict(use_cache=True), None, "use_cache=True"),
    "hidden states wanted": ({}, dict(output_hidden_states=True), None, "output_hidden_states=True"),
    "hidden states in the config": ({}, {}, with_states, "output_hidden_states=True in the model's config"),
    "tuples wanted": ({}, dict(return_dict=False), None, "return_dict=False"),
    "packed": ({}, dict(attention_mask=None, position_ids=torch.arange(24).expand(2, -1)), None, "packed"),
    "embeddings trained": ({}, {}, trained_embeddings, "embed_tokens.weight is trained, too"),
    "noise": ({}, {}, noisy, "NEFTune"),
    "interchange": (dict(intervention="interchange"), {}, None, "interchange"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_where_it_cannot_apply_on_raises_and_auto_takes_the_ordinary_path(name):
    config, more, change, reason = IMPOSSIBLE[name]
    inputs = {**batch([20, 20], [4, 4]), **more}
    steps = {}
    for mode in ("off", "auto", "on"):
        model = adapted(mode, **config)
        if change is not None:
            change(model.get_base_model())
        torch.manual_seed(0)
        if mode == "on":
            with pytest.raises(ValueError, match=f"untouched_prompt='on'.*{reason}"):
                model(**inputs)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # without a word
            with watched(model) as seen:
                steps[mode] = model(**inputs)
        assert not seen[False]
    loss = [output[0] if isinstance(output, tuple) else output.loss for output in steps.values()]
    assert torch.equal(*loss)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_classifier_has_no_untouched_prompt(mode):
    """The whole sequence is its prompt, and every token reads all others."""
    runtime = LoReftRuntimeConfig(untouched_prompt=mode)
    config = LoReftConfig(task_type="SEQ_CLS", r=4, positions="l3", runtime_config=runtime)
    model = get_peft_model(build("roberta"), config).train()
    inputs = {"input_ids": torch.randint(3, 60, (2, 20)), "labels": torch.tensor([0, 2])}
    if mode == "auto":
        model(**inputs).loss.backward()
    else:
        with pytest.raises(ValueError, match="the model is no causal language model"):
            model(**inputs)


def test_a_family_that_cannot_go_on_from_keys_and_values():
    """A state-space layer reads its own state. The ordinary path is taken, and `on` says why."""
    from integration.causal_families import build as of_family

    inputs = batch([20, 12], [4, 3])
    with pytest.raises(ValueError, match="JambaForCausalLM cannot go on from keys and values"):
        adapted("on", of_family("jamba"))(**inputs)
    steps = []
    for mode in ("off", "auto"):
        model = adapted(mode, of_family("jamba"))
        steps.append(step(model, inputs))
    assert_equal(steps[1], steps[0], inputs["attention_mask"].bool())


def test_auto_needs_something_to_gain():
    long, short = batch([40, 40], [4, 4]), batch([8, 8], [30, 30])
    for inputs, cut in ((long, True), (short, False)):
        model = adapted("auto")
        with watched(model) as seen:
            model(**inputs)
        assert (seen[True] == [(2, 3 + 4)]) is cut


def test_auto_leaves_the_cache_to_a_loop_of_ones_own():
    """A model in training mode, whose caller goes on from the cache that the first forward returns."""
    model = adapted("auto")
    prompt = torch.randint(3, 60, (1, 20))
    with prompt_lengths([20]):
        outputs = model(input_ids=prompt)
        without = model(input_ids=prompt, use_cache=False)
    assert outputs.past_key_values.get_seq_length() == 20 and without.past_key_values is None
    torch.testing.assert_close(without.logits, outputs.logits, rtol=1e-4, atol=1e-5)


def test_evaluation_and_generation_are_not_cut():
    model = adapted("on").eval()
    inputs = batch([20, 20], [4, 4])
    with watched(model) as seen, torch.no_grad():
        model(**inputs)
    assert seen[False] == [(2, 24)]
    with watched(model) as seen:
        model(**inputs)
    assert seen[True] == [(2, 24)]


@pytest.mark.parametrize("head", ["trained", "logits_to_keep"])
def test_a_head_that_needs_every_token_leaves_the_backbone_to_be_cut(head):
    def base():
        model = build("llama")
        if head == "trained":
            model.lm_head.requires_grad_(True)
        return model

    inputs = batch([20, 20], [4, 4])
    if head == "logits_to_keep":
        del inputs["labels"]
        inputs["logits_to_keep"] = 5
        inputs["attention_mask"] = torch.ones(2, 24, dtype=torch.long)
        found = []
        for mode in ("off", "on"):
            model = adapted(mode, base())
            with watched(model) as seen:
                outputs = model(**inputs)
            outputs.logits.square().sum().backward()
            found.append((outputs.logits.detach(), gradients(model), seen[True]))
        assert found[1][2] == [(2, 7)]
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
        for name, grad in found[0][1].items():
            torch.testing.assert_close(found[1][1][name], grad, rtol=1e-3, atol=1e-4, msg=name)
    else:
        assert compare(inputs, base) == 2 * 7


@pytest.mark.parametrize("field, value", [("untouched_prompt", "yes"), ("kept_mb", -1), ("kept_device", 0)])
def test_values_that_are_not_allowed(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        LoReftRuntimeConfig(**{field: value})


def test_the_setting_is_not_saved(tmp_path):
    adapted("on").save_pretrained(tmp_path)
    assert "runtime_config" not in (tmp_path / "adapter_config.json").read_text()
    assert LoReftConfig.from_pretrained(str(tmp_path)).runtime_config == LoReftRuntimeConfig()


# Nothing is left behind


def test_an_error_in_the_second_part_leaves_nothing():
    model = adapted("on")
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = batch([20, 11], [4, 3])
    expected = step(model, inputs)

    def fail(module, args, output):
        if torch.is_grad_enabled():
            raise KeyboardInterrupt

    handle = base.model.norm.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert not any("_can_checkpoint_with_cache" in block.__dict__ for block in base.model.layers)
    assert all(block.gradient_checkpointing for block in base.model.layers)
    assert_equal(step(model, inputs), expected, inputs["attention_mask"].bool())


def test_the_trial_draws_no_random_numbers():
    model = adapted("on")
    torch.manual_seed(3)
    model(**batch([20, 11], [4, 3]))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


# What autograd keeps


class Counted:
    """Bytes that autograd keeps, each storage once."""

    def __init__(self):
        self.storages = {}

    def pack(self, tensor):
        self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


@pytest.mark.parametrize("heads", [2, 8], ids=["shared key heads", "own key heads"])
def test_what_is_saved_grows_with_the_edited_part(heads):
    """448 tokens of prompt and 64 of answer: at most a fifth of the ordinary path's."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=heads,
    )  # fmt: skip
    base = LlamaForCausalLM(config).requires_grad_(False)
    inputs = batch([448], [64])
    saved, steps = {}, {}
    for mode in ("off", "on"):
        model = adapted(mode, copy.deepcopy(base), positions="l7")
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        counted = Counted()
        with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda tensor: tensor):
            outputs = model(**inputs)
        counted.storages = {at: tensor for at, tensor in counted.storages.items() if at not in own}
        saved[mode] = counted.bytes
        outputs.loss.backward()
        steps[mode] = outputs, gradients(model)
    assert saved["on"] <= 0.2 * saved["off"]
    assert_equal(steps["on"], steps["off"], inputs["attention_mask"].bool())


# Beginnings that rows share


def sharing(prompts, answers, shared=20, seed=0, first=50):
    inputs = batch(prompts, answers, seed=seed)
    inputs["input_ids"][:, :shared] = torch.arange(shared) % 7 + first
    prompt = torch.tensor(prompts).unsqueeze(1)
    column = torch.arange(inputs["input_ids"].shape[1])
    inputs["labels"] = torch.where(column < prompt, -100, inputs["labels"])
    return inputs


PROMPTS, ANSWERS = [30, 26, 28], [4, 3, 6]


@pytest.mark.parametrize("kept_mb", [0, 64])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_shared_beginning_is_run_once_for_the_batch(kept_mb, checkpointing):
    inputs = sharing(PROMPTS, ANSWERS)
    compare(inputs, checkpointing=checkpointing, kept_mb=kept_mb)
    model = adapted("on", kept_mb=kept_mb)
    model(**inputs)  # with the trial
    for _ in range(2):
        with watched(model) as seen:
            model(**inputs)
        alone = [(1, 20)] if not kept_mb else []
        assert seen[False] == [*alone, (3, 30 - 3 - 20)]


def test_the_rest_of_the_prompt_may_be_shared_whole():
    inputs = sharing([23, 23], [4, 6], shared=20)
    inputs["intervention_positions"] = torch.tensor([[20, 21, 22]] * 2)
    compare(inputs, kept_mb=64)


def test_another_step_takes_as_much_as_is_the_same():
    model = adapted("on", kept_mb=64)
    with watched(model) as seen:
        model(**sharing(PROMPTS, ANSWERS, shared=22))
    assert (1, 22) in seen[False]
    with watched(model) as seen:
        one = step(model, sharing(PROMPTS, ANSWERS, shared=20, seed=1))
    assert seen[False] == [(3, 7)]
    inputs = sharing(PROMPTS, ANSWERS, shared=20, seed=1)
    assert_equal(one, step(adapted("off"), inputs), inputs["attention_mask"].bool())


def test_one_row_a_step_shares_with_the_step_before():
    """Micro-batches of one row, each with the same system prompt."""
    model = adapted("on", kept_mb=64)
    for seed in range(2):
        model(**sharing([30], [4], seed=seed))
    with watched(model) as seen:
        one = step(model, sharing([30], [4], seed=2))
    assert seen[False] == [(1, 7)]
    assert_equal(one, step(adapted("off"), sharing([30], [4], seed=2)), torch.ones(1, 34, dtype=torch.bool))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(1.5),
        lambda weight: weight.detach().numpy().__imul__(1.5),
        lambda weight: weight.detach().mul_(1.5),
    ],
    ids=["data", "NumPy", "in place"],
)
def test_weights_that_change_are_noticed(change):
    base = build("llama")
    model = adapted("on", base, kept_mb=64)
    inputs = sharing(PROMPTS, ANSWERS)
    model(**inputs)
    change(base.model.layers[0].mlp.up_proj.weight)
    one = step(model, inputs)
    changed = build("llama")
    change(changed.model.layers[0].mlp.up_proj.weight)
    assert_equal(one, step(adapted("off", changed), inputs), inputs["attention_mask"].bool())


def test_beginnings_that_stand_at_other_columns_are_not_shared():
    """Padded on the left, the same tokens have other positions in each row."""
    inputs = batch([30, 26], [4, 4], "left")
    for row, start in enumerate([0, 4]):
        inputs["input_ids"][row, start : start + 20] = torch.arange(20) + 3
    compare(inputs, kept_mb=64)


def test_a_model_that_drops_is_not_shared():
    base = build("gpt2")
    model = adapted("on", base, kept_mb=64)
    with watched(model) as seen:
        model(**sharing(PROMPTS, ANSWERS))
    assert (1, 20) not in seen[False]
    assert len(getattr(base, ATTRIBUTE).beginnings) == 0


def beginning(ids, size=100):
    states = [(torch.zeros(1, 1, len(ids), size), torch.zeros(1, 1, len(ids), size))]
    return Beginning("key", tuple(ids), states, torch.zeros(1, len(ids), 0))


def test_the_limit_holds_and_what_was_not_used_goes_first():
    one = beginning(range(10))
    kept = Beginnings(limit=2 * one.bytes)
    for start in (0, 100):
        kept.keep(beginning(range(start, start + 10)))
    assert kept.find("key", tuple(range(10)))[1] == 10  # now it was used last
    kept.keep(beginning(range(200, 210)))
    assert len(kept) == 2 and kept.bytes <= kept.limit
    assert kept.find("key", tuple(range(100, 110))) is None
    assert kept.find("key", tuple(range(5)))[1] == 5
    assert kept.find("other", tuple(range(10))) is None
    kept.keep(beginning(range(300, 400)))  # larger than the limit by itself
    assert kept.find("key", tuple(range(300, 400))) is None and len(kept) == 2


def test_beginnings_may_be_kept_elsewhere():
    kept = Beginnings(limit=10**6, device="meta")
    kept.keep(beginning(range(4)))
    found, _ = kept.find("key", tuple(range(4)))
    assert found.states[0][0].is_meta and found.output.is_meta


# Index arithmetic


@given(data=st.data())
def test_split_by_hand(data):
    """What is taken of each part is what plain slices take, and joining puts it back."""
    seq = data.draw(st.integers(2, 9))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, seq), min_size=3, max_size=3).map(sorted), min_size=1, max_size=4)
    )
    start, cut, stop = (torch.tensor(column) for column in zip(*rows))
    split = Split.at(start, cut, stop, seq)
    table = torch.arange(len(rows) * seq).reshape(-1, seq)
    parts = []
    for part, (first, last) in ((split.untouched, (0, 1)), (split.rest, (1, 2))):
        taken = part.take(table, -1)
        for row, bounds in enumerate(rows):
            expected = table[row, bounds[first] : bounds[last]].tolist()
            assert taken[row].tolist() == expected + [-1] * (part.width - len(expected))
        parts.append(taken)
    if split.untouched.width + split.rest.width == 0:
        return
    joined = split.join(*parts)
    for row, (first, _, last) in enumerate(rows):
        assert joined[row, first:last].tolist() == table[row, first:last].tolist()


def test_first_edited_and_common_beginning():
    stop = torch.tensor([6, 5])
    slots = [torch.tensor([[4, -1], [-1, -1]]), torch.tensor([[3], [-1]])]
    assert first_edited(slots, stop).tolist() == [3, 5]
    assert common_beginning([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_beginning([[1, 2]]) == 2
