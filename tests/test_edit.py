"""The autograd function of a layer against the same lines written for autograd."""

import pytest
import torch

from peft_reft.edits.apply import Edit, add_edits, may_change
from peft_reft.edits.factors import Activated, Affine, ElementwiseFactors, Gate, LowRankFactors

TOKENS, D, R = 11, 6, 2
CONSTANT = LowRankFactors(torch.randn(R, D), Affine(None, torch.randn(R)))


def make_edits(kind, generator):
    def rand(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    def keep(*shape):
        return (torch.rand(shape, generator=generator) > 0.3).float()

    def low_rank(*lead):
        return LowRankFactors(rand(*lead, R, D), Affine(rand(*lead, R, D), rand(*lead, R)))

    def constant():
        return LowRankFactors(rand(R, D), Affine(None, rand(R)))

    def non_linear(*lead):
        inside = Affine(rand(*lead, R, D), rand(*lead, R))
        gate = Gate(rand(*lead, D), rand(*lead, 1))
        return LowRankFactors(
            rand(*lead, R, D), Activated(inside, torch.tanh, rand(*lead, R, D), rand(*lead, R)), gate=gate
        )

    def elementwise(*lead):
        return ElementwiseFactors(rand(*lead, D), rand(*lead, D))

    rows = torch.randperm(TOKENS, generator=generator)
    return {
        "gathered": [Edit(rows[:5], keep(5, 1), None, low_rank())],
        "grouped": [Edit(rows[:6].view(2, 3), keep(2, 3, 1), None, low_rank(2))],
        "dense": [Edit(None, keep(TOKENS, 1), None, low_rank())],
        "constant": [Edit(rows[:5], keep(5, 1), None, constant())],
        "dropout": [Edit(rows[:5], keep(5, 1), keep(5, D) * 2, low_rank())],
        "subspaces": [Edit(rows[:5], keep(5, R), None, low_rank())],
        "non-linear": [Edit(rows[:5], keep(5, R), keep(5, D) * 2, non_linear())],
        "non-linear, grouped": [Edit(rows[:6].view(2, 3), keep(2, 3, 1), None, non_linear(2))],
        "non-linear, dense": [Edit(None, keep(TOKENS, 1), None, non_linear())],
        "elementwise": [Edit(rows[:5], keep(5, 1), keep(5, D) * 2, elementwise())],
        "elementwise, grouped": [Edit(rows[:6].view(2, 3), keep(2, 3, 1), None, elementwise(2))],
        "several": [
            Edit(rows[:5], keep(5, 1), None, low_rank()),
            Edit(rows[3:8], keep(5, 1), None, low_rank()),
            Edit(rows[2:6], keep(4, 1), None, non_linear()),
            Edit(None, keep(TOKENS, 1), None, constant()),
        ],
    }[kind]


KINDS = [
    *("gathered", "grouped", "dense", "constant", "dropout", "subspaces", "several"),
    *("non-linear", "non-linear, grouped", "non-linear, dense", "elementwise", "elementwise, grouped"),
]


def parameters_of(edits):
    return [tensor for e in edits for tensor in e.factors.tensors()]


def edit_of(factors, h, keep):
    """The edit of one token h (d,), as the types of factors describe it."""
    if isinstance(factors, ElementwiseFactors):
        change = keep * ((0 if factors.scale is None else h * factors.scale) + factors.shift)
    else:
        z, f = factors.coordinates, torch.nn.Identity()
        c, subtracted = torch.zeros(R, D, dtype=h.dtype), 0
        if isinstance(z, Activated):
            c, subtracted, f, z = z.subtracted, z.subtracted_bias, z.function, z.inside
        inner = f((0 if z.weight is None else z.weight @ h) + z.bias) - c @ h - subtracted
        change = (keep * inner) @ factors.basis
    if factors.gate is not None:
        change = change * torch.tanh(factors.gate.weight @ h + factors.gate.bias)
    return change


def plainly(flat, edits):
    """What `add_edits` says it computes, token by token."""
    out = list(flat)
    for e in edits:
        groups = [e.factors] if e.factors.lead is None else e.factors.unstack()
        rows = torch.arange(TOKENS) if e.rows is None else e.rows
        for g, factors in enumerate(groups):
            pick = (lambda t: t) if e.factors.lead is None else (lambda t, g=g: t[g])
            for at, row in enumerate(pick(rows).tolist()):
                change = edit_of(factors, flat[row], pick(e.keep)[at])
                out[row] = out[row] + (change if e.drop is None else change * pick(e.drop)[at])
    return torch.stack(out)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind, in_place):
    generator = torch.Generator().manual_seed(0)
    edits = make_edits(kind, generator)
    leaf = torch.randn(TOKENS, D, generator=generator).requires_grad_()
    upstream = torch.randn(TOKENS, D, generator=generator)
    inputs = [leaf, *parameters_of(edits)]

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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_gradients(kind, in_place):
    generator = torch.Generator().manual_seed(0)
    edits = make_edits(kind, generator)
    flat = torch.randn(TOKENS, D, generator=generator)
    expected = plainly(flat.clone(), edits)
    out = add_edits(flat, edits, in_place)
    assert (out.data_ptr() == flat.data_ptr()) == (in_place and kind != "several")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_in_place_is_in_place_and_keeps_nothing_but_the_gathered_tokens():
    generator = torch.Generator().manual_seed(0)
    edits = [
        Edit(
            torch.arange(3),
            torch.ones(3, 1),
            None,
            LowRankFactors(
                torch.randn(R, D).requires_grad_(), Affine(*(torch.randn(*s).requires_grad_() for s in ((R, D), (R,))))
            ),
        )
    ]
    flat = torch.randn(1000, D, generator=generator).requires_grad_() + 0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = add_edits(flat, edits, may_change(flat))
    assert out.data_ptr() == flat.data_ptr()
    assert sum(saved) <= 3 * (D + R + 2) + 2 * R * D + R


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
    edits = [Edit(torch.arange(2), torch.ones(2, 1), None, CONSTANT)]
    y = x.exp()
    out = add_edits(y, edits, may_change(y))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], x.detach().exp())


def test_a_module_that_hands_its_input_through():
    """Its output is the caller's own tensor: dropout in eval mode, an identity."""
    given = torch.randn(4, D)
    before = given.clone()
    out = torch.nn.Dropout().eval()(given)
    edits = [Edit(torch.arange(2), torch.ones(2, 1), None, CONSTANT)]
    edited = add_edits(out, edits, may_change(out, (given,)))
    assert torch.equal(given, before) and not torch.equal(edited, before)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["gathered", "dense", "several"])
def test_autocast_does_not_lower_the_precision(kind, in_place):
    generator = torch.Generator().manual_seed(0)
    edits = make_edits(kind, generator)
    leaf = torch.randn(TOKENS, D, generator=generator).requires_grad_()
    inputs = [leaf, *parameters_of(edits)]
    affine = all(edit.factors.is_affine for edit in edits)

    def run(autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = add_edits(leaf + 1, edits, in_place)
        # The backward too, where it is written by hand; others run outside of autocast, as torch wants it.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and affine):
            return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(run(True), run(False), strict=True))
