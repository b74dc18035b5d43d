"""Subspaces: examples that use disjoint rows of one R, in training and in use."""

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model

from peft_reft import DataCollatorForLoReft, LoReftConfig

R = 4
IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
FORMULAS = [
    *(dict(intervention=name) for name in ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")),
    *(dict(intervention="nodireft", act_fn="tanh"), dict(gate=True)),
]
PLACES = [
    ("f2+l2", "layer"),
    ("f1+l2", "group"),
    ("f1+l2", "position"),
    ("f2+l2", "model"),
    ("all", "layer"),
    ("p+g", "group"),
]


def adapted(layers=(1,), **kwargs):
    fields = {"task_type": "CAUSAL_LM", "r": R, "positions": "f2+l2", "layers": list(layers), **kwargs}
    model = get_peft_model(build("llama"), LoReftConfig(**fields)).eval()
    randomise(model)
    return model


@torch.no_grad()
def block_output(model, **kwargs):
    """Return what the edited block returns."""
    seen = {}
    block = model.get_base_model().model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: seen.update(out=output.clone()))
    model(input_ids=IDS, attention_mask=MASK, **kwargs)
    handle.remove()
    return seen["out"]


@pytest.mark.parametrize(("positions", "tie"), PLACES)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_the_edit_is_the_sum_of_those_of_disjoint_subspaces(formula, positions, tie):
    """Bᵀz is a sum over the rows of B: what rows 0-1 add and what rows 2-3 add make the whole edit."""
    model = adapted(**formula, positions=positions, tie=tie, layers=(1,))
    with model.disable_adapter():
        base = block_output(model)
    whole = block_output(model) - base
    low, high = (block_output(model, subspaces=rows) - base for rows in ([0, 1], [2, 3]))
    torch.testing.assert_close(low + high, whole, atol=1e-5, rtol=1e-4)
    assert low.abs().max() > 1e-3 and high.abs().max() > 1e-3 and not torch.allclose(low, high, atol=1e-3)
    assert torch.equal(block_output(model, subspaces=[]), base)
    torch.testing.assert_close(block_output(model, subspaces=[3, 1, 0, 2]) - base, whole, atol=1e-5, rtol=1e-4)


def test_an_edit_within_a_subspace_by_the_formula():
    """The edit is Rᵀ m ⊙ (Wh + b − Rh), with m = 1 on the rows that were named."""
    model = adapted(positions="l1")
    with model.disable_adapter():
        h = block_output(model)
    weights = dict(model.get_base_model().model.layers[1].loreft.loreft_weights["default"].named_parameters())
    r, w, b = (weights[name].detach() for name in ("R", "W", "b"))
    m = torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = h.clone()
    expected[:, -1] += ((h[:, -1] @ w.T + b - h[:, -1] @ r.T) * m) @ r
    torch.testing.assert_close(block_output(model, subspaces=[0, 2]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lists", "tensor"])
def test_each_row_has_its_own_subspaces(kind):
    model = adapted(layers=(0, 1, 2))
    rows = [[0, 1], [2], []]
    given = rows if kind == "lists" else torch.tensor([[0, 1], [-1, 2], [-1, -1]])
    together = model(input_ids=IDS, subspaces=given).logits
    for row, own in enumerate(rows):
        alone = model(input_ids=IDS[row : row + 1], subspaces=own).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, dict(num_beams=2), dict(use_cache=False)], ids=str)
@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_generate_edits_within_each_rows_subspaces(settings, positions):
    """Rows of a batch equal each row alone, also with beams."""
    model = adapted(layers=(0, 1, 2), positions=positions)
    rows = [[0, 1], [2, 3], [0, 1, 2, 3]]
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, **settings)
    together = model.generate(input_ids=IDS, attention_mask=MASK, subspaces=rows, **settings)
    alone = [
        model.generate(input_ids=IDS[n : n + 1], attention_mask=MASK[:1], subspaces=own, **settings)[0]
        for n, own in enumerate(rows)
    ]
    assert together.tolist() == [row.tolist() for row in alone]
    whole = model.generate(input_ids=IDS, attention_mask=MASK, **settings)
    assert whole[2].tolist() == together[2].tolist() and whole.tolist() != together.tolist()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # transformers 5.23's new name for it
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_only_the_rows_in_use(checkpointing):
    model = adapted(layers=(0, 1), intervention="noreft").train()  # (an orthonormal R moves as a whole)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    labels = IDS.clone()
    labels[:, :5] = -100
    model(input_ids=IDS, labels=labels, subspaces=[0, 1]).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad[:2].abs().max() > 0, name
            assert torch.count_nonzero(parameter.grad[2:]) == 0, name


def test_training_a_rotation_keeps_the_subspaces_apart():
    """R is orthonormal as a whole: rows 2-3 stay orthogonal to rows 0-1, whichever are trained."""
    model = adapted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = IDS.clone()
    labels[:, :5] = -100
    for step in range(6):
        model(input_ids=IDS, labels=labels, subspaces=[[0, 1], [2, 3]][step % 2]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    r = model.get_base_model().model.layers[1].loreft.loreft_weights["default"].rotation().detach()
    torch.testing.assert_close(r @ r.T, torch.eye(R), atol=1e-5, rtol=0)


def test_the_collator_takes_them_from_the_examples():
    def collate(examples):
        return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}

    collator = DataCollatorForLoReft(collate, LoReftConfig(task_type="CAUSAL_LM", positions="l1", r=R))
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "subspaces": [0, 1]},
        {"input_ids": [5, 6, 8], "labels": [-100, -100, 8], "subspaces": [2]},
    ]
    batch = collator(examples)
    assert batch["subspaces"].tolist() == [[0, 1], [2, -1]]
    assert "subspaces" in examples[0]
    adapted()(**batch)


@pytest.mark.parametrize(
    ("subspaces", "words"),
    [
        ([0, 4], r"rows 0 to 4 of R; allowed: 0 to 3"),
        ([-2], r"rows -2"),
        ([[0], [1]], r"2 rows for a batch of 3"),
        ("0-3", r"subspaces='0-3': expected row indices"),
        ([0.5], r"expected row indices"),
        ([[0], 1, [2]], r"expected row indices"),
        (torch.tensor([0, 1]), r"\(batch, n\)"),
    ],
    ids=str,
)
def test_subspaces_that_do_not_fit_raise(subspaces, words):
    model = adapted()
    with pytest.raises(ValueError, match=words):
        model(input_ids=IDS, subspaces=subspaces)
    assert torch.isfinite(model(input_ids=IDS).logits).all()


def test_a_formula_without_a_rank_has_none():
    with pytest.raises(ValueError, match="no rank"):
        adapted(intervention="red", r=8)(input_ids=IDS, subspaces=[0])
