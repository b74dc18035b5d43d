"""Interchange interventions: b + Rᵀ(Rs − Rb), with s from a run on another input."""

import pytest
import torch
from conftest import LAYERS, VOCAB, build
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reft import LoReftConfig, edit_norms, interchange, interchange_accuracy

GENERATOR = torch.Generator().manual_seed(5)
BASE, SOURCE, OTHER = (torch.randint(3, VOCAB, (3, 8), generator=GENERATOR) for _ in range(3))
LAYER, R = 1, 4


def adapted(family="llama", **kwargs):
    fields = {"task_type": "CAUSAL_LM", "intervention": "interchange", "r": R, "positions": "l1", "layers": [LAYER]}
    return get_peft_model(build(family), LoReftConfig(**{**fields, **kwargs})).eval()


@torch.no_grad()
def block_output(model, **kwargs):
    seen = {}
    family = model.get_base_model().config.model_type
    block = model.get_base_model().base_model.get_submodule("h" if family == "gpt2" else "layers")[LAYER]
    handle = block.register_forward_hook(
        lambda module, args, out: seen.update(out=(out[0] if isinstance(out, tuple) else out).clone())
    )
    model(**kwargs)
    handle.remove()
    return seen["out"]


def rotation(model):
    name = next(name for name, _ in model.named_parameters() if name.endswith(".R"))
    return model.get_parameter(name).detach()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["l1", "f2+l2", "p"])
def test_the_subspace_is_the_source_s(family, positions):
    """Edited states equal the formula, token by token, from the hidden states of plain runs."""
    model = adapted(family, positions=positions)
    b, s = block_output(model, input_ids=BASE), block_output(model, input_ids=SOURCE)
    with interchange(model, {"input_ids": SOURCE}):
        out = block_output(model, input_ids=BASE)
    r = rotation(model)
    tokens = {"l1": [7], "f2+l2": [0, 1, 6, 7], "p": list(range(8))}[positions]
    expected = b.clone()
    expected[:, tokens] += (s[:, tokens] @ r.T - b[:, tokens] @ r.T) @ r
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(block_output(model, input_ids=BASE), b)  # outside nothing is exchanged


def test_positions_of_their_own_in_base_and_source():
    """The k-th slot of the source goes to the k-th slot of the base. If either is empty, nothing happens."""
    model = adapted()
    b, s = block_output(model, input_ids=BASE), block_output(model, input_ids=SOURCE)
    there, here = torch.tensor([[1, 5], [0, -1], [2, 3]]), torch.tensor([[2, 7], [4, 6], [-1, 0]])
    with interchange(model, {"input_ids": SOURCE, "intervention_positions": there}):
        out = block_output(model, input_ids=BASE, intervention_positions=here)
    r, expected = rotation(model), b.clone()
    for row, to, frm in [(0, 2, 1), (0, 7, 5), (1, 4, 0), (2, 0, 3)]:
        expected[row, to] += (s[row, frm] - b[row, to]) @ r.T @ r
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_texts_of_different_lengths_and_padding():
    """`l1` names the last real token of each text."""
    model = adapted()
    source = torch.cat([torch.zeros(3, 4, dtype=torch.long), SOURCE], 1)
    mask = (torch.arange(12) >= 4).long().expand(3, -1)
    with interchange(model, {"input_ids": SOURCE}):
        expected = model(input_ids=BASE).logits
    with interchange(model, {"input_ids": source, "attention_mask": mask}):
        torch.testing.assert_close(model(input_ids=BASE).logits, expected, atol=1e-5, rtol=1e-4)


def test_subspaces_and_two_sources():
    """Coordinates 0-1 come from one source and 2-3 from another; each row of a batch may name its own."""
    model = adapted()
    r = rotation(model)
    b, s, t = (block_output(model, input_ids=ids) for ids in (BASE, SOURCE, OTHER))
    low, high = r[:2].T @ r[:2], r[2:].T @ r[2:]
    with interchange(model, {"input_ids": SOURCE}, subspaces=[0, 1]):
        with interchange(model, {"input_ids": OTHER}, subspaces=[2, 3]):
            both = block_output(model, input_ids=BASE)
        one = block_output(model, input_ids=BASE)
    with interchange(model, {"input_ids": SOURCE}):
        by_row = block_output(model, input_ids=BASE, subspaces=[[0, 1], [2, 3], []])
    s, t = (s - b)[:, -1], (t - b)[:, -1]
    torch.testing.assert_close((one - b)[:, -1], s @ low, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((both - b)[:, -1], s @ low + t @ high, atol=1e-5, rtol=1e-4)
    expected = torch.stack([s[0] @ low, s[1] @ high, torch.zeros_like(s[2])])
    torch.testing.assert_close((by_row - b)[:, -1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, dict(num_beams=2), dict(use_cache=False)], ids=str)
def test_generate_writes_what_the_source_says(settings):
    """If every layer exchanges all of the last prompt token, `generate` writes the source's first token."""
    model = adapted(r=32, layers="all")
    settings = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, **settings)
    mask = torch.ones_like(BASE)
    expected = model(input_ids=SOURCE).logits[:, -1]
    with interchange(model, {"input_ids": SOURCE}):
        together = model.generate(input_ids=BASE, attention_mask=mask, pad_token_id=0, **settings)
    rows = settings.get("num_beams", 1)
    torch.testing.assert_close(together.logits[0][::rows], expected, atol=1e-5, rtol=1e-4)
    for n in range(3):
        with interchange(model, {"input_ids": SOURCE[n : n + 1]}):
            alone = model.generate(
                input_ids=BASE[n : n + 1], attention_mask=mask[:1], pad_token_id=0, **settings
            ).sequences[0]
        assert alone.tolist() == together.sequences[n].tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_r_is_trained(checkpointing):
    """R gets the gradient that autograd finds through the formula, and nothing else moves."""
    model = adapted(layers=[LAYERS - 1]).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    labels = torch.full_like(BASE, -100)
    labels[:, -1] = BASE[:, -1]
    given = dict(input_ids=BASE, labels=labels, intervention_positions=torch.full((3, 1), 6))
    with interchange(model, {"input_ids": SOURCE, "intervention_positions": torch.full((3, 1), 6)}):
        model(**given).loss.backward()
    (parameter,) = [p for p in model.parameters() if p.requires_grad]
    base = model.get_base_model()

    hidden = {}
    handle = base.model.norm.register_forward_pre_hook(lambda module, args: hidden.update(h=args[0].detach()))
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=BASE)
        b = hidden["h"][:, 6]
        model(input_ids=SOURCE)
        s = hidden["h"][:, 6]
    handle.remove()
    a = parameter.detach().double().requires_grad_()
    r = torch.linalg.solve_triangular(torch.linalg.cholesky(a @ a.T), a, upper=False)
    edited = b.double() + (s.double() - b.double()) @ r.T @ r
    norm, head = base.model.norm, base.lm_head
    normed = (
        edited * torch.rsqrt(edited.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight.double()
    )
    nn.functional.cross_entropy(normed @ head.weight.double().T, BASE[:, -1]).backward()
    torch.testing.assert_close(parameter.grad.double(), a.grad, atol=1e-5, rtol=1e-3)


def test_a_run_within_a_context_is_not_mistaken_for_the_source():
    model = adapted()
    with interchange(model, {"input_ids": SOURCE}):
        first = model(input_ids=BASE).logits
        model(input_ids=OTHER)
        assert torch.equal(model(input_ids=BASE).logits, first)


def test_beside_an_adapter_of_another_kind():
    """The source run edits with that adapter, too."""
    model = adapted(r=32, layers=[LAYERS - 1])
    tuned = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1", layers=[0], init_weights=False)
    model.add_adapter("tuned", tuned)
    model.base_model.set_adapter(["default", "tuned"])
    expected = model(input_ids=SOURCE).logits[:, -1]
    with interchange(model, {"input_ids": SOURCE}):
        torch.testing.assert_close(model(input_ids=BASE).logits[:, -1], expected, atol=1e-5, rtol=1e-4)


class Block(nn.Sequential):
    """A user's own module, which says how large its output is."""

    out_features = 16


def test_a_classifier_and_a_network_without_tokens():
    """The hidden states of a user's own network count as tokens: (batch, 1, d)."""
    torch.manual_seed(0)
    network = nn.Sequential(Block(nn.Linear(6, 16), nn.ReLU()), Block(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 2))
    fields = dict(intervention="interchange", target_modules="1", positions="f1", r=16)
    model = get_peft_model(network, LoReftConfig(**fields))
    base, source = torch.randn(2, 5, 1, 6)
    with interchange(model, {"input": source}):
        everything = model(base)
    torch.testing.assert_close(everything, model(source), atol=1e-5, rtol=1e-4)
    bert = get_peft_model(
        build("bert"), LoReftConfig(task_type="SEQ_CLS", intervention="interchange", positions="f1", r=32, layers=[-1])
    ).eval()
    with interchange(bert, {"input_ids": SOURCE}):
        out = bert(input_ids=BASE).logits
    torch.testing.assert_close(out, bert(input_ids=SOURCE).logits, atol=1e-5, rtol=1e-4)


def test_saved_and_loaded(tmp_path):
    model = adapted()
    with interchange(model, {"input_ids": SOURCE}):
        expected = model(input_ids=BASE).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    with interchange(loaded, {"input_ids": SOURCE}):
        assert torch.equal(loaded(input_ids=BASE).logits, expected)


def test_without_a_source_nothing_is_edited():
    model = adapted()
    with model.disable_adapter():
        expected = model(input_ids=BASE).logits
    assert torch.equal(model(input_ids=BASE).logits, expected)


def test_what_cannot_be_exchanged_raises():
    plain = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="no active adapter with intervention='interchange'"), interchange(plain, {}):
        pass
    with pytest.raises(ValueError, match="has no LoReFT adapter"), interchange(build("llama"), {}):
        pass
    with pytest.raises(ValueError, match="has no LoReFT adapter"):
        edit_norms(build("llama"), {})
    model = adapted()
    with interchange(model, {"input_ids": SOURCE[:2]}), pytest.raises(ValueError, match=r"2 positions.*has\s+3"):
        model(input_ids=BASE)
    with pytest.raises(ValueError, match="adapter_names has 'default'"):
        model(input_ids=BASE, adapter_names=["default"] * 3)
    with pytest.raises(RuntimeError), interchange(model, {"input_ids": SOURCE}):  # a failure leaves no source behind
        raise RuntimeError
    test_without_a_source_nothing_is_edited()


def test_accuracy_counts_rows_whose_labels_are_all_right():
    logits = torch.eye(4)[torch.tensor([1, 2, 3])]
    assert interchange_accuracy(logits, torch.tensor([1, 2, 0])) == pytest.approx(2 / 3)
    # Of a causal language model: the logits of a token tell the next; a row is right if all its labels are.
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])
    logits = torch.eye(4)[tokens.roll(-1, 1)]
    labels = torch.tensor([[-100, -100, 2, 3], [-100, -100, 1, 3]])
    assert interchange_accuracy(logits, labels) == 0.5
