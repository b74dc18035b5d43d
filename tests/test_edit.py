"""The autograd function of a layer against the same lines written for autograd."""

import pytest
import torch

from peft_reft.edit import Edit, add_edits, may_change

TOKENS, D, R = 11, 6, 2


def make_edits(kind, generator):
    def rand(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    def keep(*shape):
        return (torch.rand(shape, generator=generator) > 0.3).float()

    rows = torch.randperm(TOKENS, generator=generator)
    return {
        "gathered": [Edit(rows[:5], keep(5, 1), rand(R, D), rand(R, D), rand(R))],
        "grouped": [Edit(rows[:6].view(2, 3), keep(2, 3, 1), rand(2, R, D), rand(2, R, D), rand(2, R))],
        "dense": [Edit(None, keep(TOKENS, 1), rand(R, D), rand(R, D), rand(R))],
        "constant": [Edit(rows[:5], keep(5, 1), None, rand(R, D), rand(R))],
        "dropout": [Edit(rows[:5], keep(5, D) * 2, rand(R, D), rand(R, D), rand(R))],
        "several": [
            Edit(rows[:5], keep(5, 1), rand(R, D), rand(R, D), rand(R)),
            Edit(rows[3:8], keep(5, 1), rand(R, D), rand(R, D), rand(R)),
            Edit(None, keep(TOKENS, 1), None, rand(R, D), rand(R)),
        ],
    }[kind]


def plainly(flat, edits):
    """What `add_edits` says it computes, token by token."""
    out = list(flat)
    for e in edits:
        grouped = e.b.ndim == 3
        rows = torch.arange(TOKENS) if e.rows is None else e.rows
        for g in range(e.b.shape[0] if grouped else 1):
            pick = (lambda t, g=g: t[g]) if grouped else (lambda t: t)
            for at, row in enumerate(pick(rows).tolist()):
                inner = pick(e.bias) if e.a is None else pick(e.a) @ flat[row] + pick(e.bias)
                out[row] = out[row] + pick(e.keep)[at] * (inner @ pick(e.b))
    return torch.stack(out)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["gathered", "grouped", "dense", "constant", "dropout", "several"])
def test_value_and_gradients(kind, in_place):
    generator = torch.Generator().manual_seed(0)
    edits = make_edits(kind, generator)
    leaf = torch.randn(TOKENS, D, generator=generator).requires_grad_()
    upstream = torch.randn(TOKENS, D, generator=generator)
    inputs = [leaf, *(t for e in edits for t in (e.a, e.b, e.bias) if t is not None)]

    def run(function):
        residual = leaf + 1  # as a block ends
        out = function(residual)
        # the residual's own gradient passes through the same sum
        return out, torch.autograd.grad((out * upstream).sum() + out.square().sum(), inputs)

    expected, gradients = run(lambda flat: plainly(flat, edits))
    out, got = run(lambda flat: add_edits(flat, edits, in_place and may_change(flat)))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(got, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_in_place_is_in_place_and_keeps_nothing_but_the_gathered_tokens():
    generator = torch.Generator().manual_seed(0)
    edits = [
        Edit(torch.arange(3), torch.ones(3, 1), *(torch.randn(*s).requires_grad_() for s in ((R, D), (R, D), (R,))))
    ]
    flat = torch.randn(1000, D, generator=generator).requires_grad_() + 0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = add_edits(flat, edits, may_change(flat))
    assert out.data_ptr() == flat.data_ptr()
    assert sum(saved) <= 3 * (D + R + 2) + 2 * R * D


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda x: x + 1, True),
        (lambda x: x * 2, False),  # multiplication may have kept it
        (lambda x: (x + 1)[1:], False),  # shares memory
        (lambda x: x, False),  # a parameter, or a leaf of the user's
        (lambda x: x.detach() + 1, True),  # no gradient, nobody keeps anything
    ],
)
def test_what_may_be_changed(make, expected):
    assert may_change(make(torch.randn(4, 4, requires_grad=True))) is expected


def test_an_output_that_was_kept_is_left_alone():
    """A block that ends by an operation which needs its output again: its gradient must stay right."""
    x = torch.randn(4, D, requires_grad=True)
    edits = [Edit(torch.arange(2), torch.ones(2, 1), None, torch.randn(R, D), torch.randn(R))]
    y = x.exp()
    out = add_edits(y, edits, may_change(y))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], x.detach().exp())


def test_a_module_that_hands_its_input_through():
    """Its output is the caller's own tensor: dropout in eval mode, an identity."""
    given = torch.randn(4, D)
    before = given.clone()
    out = torch.nn.Dropout().eval()(given)
    edits = [Edit(torch.arange(2), torch.ones(2, 1), None, torch.randn(R, D), torch.randn(R))]
    edited = add_edits(out, edits, may_change(out, (given,)))
    assert torch.equal(given, before) and not torch.equal(edited, before)


@pytest.mark.parametrize("in_place", [False, True])
def test_autocast_does_not_lower_the_precision(in_place):
    generator = torch.Generator().manual_seed(0)
    edits = make_edits("several", generator)
    leaf = torch.randn(TOKENS, D, generator=generator).requires_grad_()
    inputs = [leaf, *(t for e in edits for t in (e.a, e.b, e.bias) if t is not None)]

    def run():
        out = add_edits(leaf + 1, edits, in_place)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward too
        got = run()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, exact, strict=True))
