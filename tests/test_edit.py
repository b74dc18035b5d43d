"""What edits are computed from, and the autograd function of a layer, against the same lines written for autograd."""

import itertools

import pytest
import torch

from peft_reft.edits.apply import Edit, add_edits, may_change
from peft_reft.edits.factors import Activated, Affine, Difference, ElementwiseFactors, Gate, LowRankFactors

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


def coordinates_of(z, h, n):
    if isinstance(z, Difference):
        return torch.zeros(R) if z.source_hidden is None else z.weight @ z.source_hidden[n] - z.weight @ h
    if isinstance(z, Affine):
        return z.bias if z.weight is None else z.weight @ h + z.bias
    inner = z.function(coordinates_of(z.inside, h, n))
    inner = inner if z.subtracted is None else inner - z.subtracted @ h
    return inner if z.subtracted_bias is None else inner - z.subtracted_bias


def edit_of(factors, h, keep, n=0):
    """The edit of one token h (d,), the n-th, as the types of factors describe it."""
    if isinstance(factors, ElementwiseFactors):
        change = keep * ((0 if factors.scale is None else h * factors.scale) + factors.shift)
    else:
        inner = coordinates_of(factors.coordinates, h, n)
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


def every_form(*lead):
    """All factors that can be built."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*lead, *shape, generator=generator)

    gates = [None, Gate(rand(D), rand(1))]
    affine = [Affine(weight, rand(R)) for weight in (None, rand(R, D))]
    activated = [
        Activated(inside, torch.tanh, subtracted, bias)
        for inside, subtracted, bias in itertools.product(affine, (None, rand(R, D)), (None, rand(R)))
    ]
    difference = [Difference(rand(R, D)), Difference(rand(R, D), rand(TOKENS, D))]
    found = [LowRankFactors(rand(R, D), z, gate=gate) for z in [*affine, *activated, *difference] for gate in gates]
    return found + [ElementwiseFactors(u, rand(D), gate=gate) for u in (None, rand(D)) for gate in gates]


@pytest.mark.parametrize("lead", [(), (3,)])
def test_every_form_computes_all_of_its_terms(lead):
    forms = every_form(*lead)
    assert len({factors.form for factors in forms}) == len(forms)
    h, keep = torch.randn(*lead, TOKENS, D), torch.rand(*lead, TOKENS, 1)
    for factors in forms:
        assert factors.lead == (len(h) if lead else None) and factors.d == D
        assert factors.rank == (R if isinstance(factors, LowRankFactors) else None)
        for given in (None, keep):
            found = factors.edit(h, given)
            for g, one in enumerate(factors.unstack() if lead else [factors]):
                pick = (lambda t, g=g: t[g]) if lead else (lambda t: t)
                for n in range(TOKENS):
                    wanted = edit_of(one, pick(h)[n], 1 if given is None else pick(given)[n], n)
                    torch.testing.assert_close(pick(found)[n], wanted, atol=1e-5, rtol=1e-5)


def test_an_edit_that_says_it_is_affine_is():
    a, b, t = torch.randn(TOKENS, D), torch.randn(TOKENS, D), 0.3
    for factors in every_form():
        if not isinstance(getattr(factors, "coordinates", None), Difference):
            mixed = t * factors.edit(a) + (1 - t) * factors.edit(b)
            affine = torch.allclose(factors.edit(t * a + (1 - t) * b), mixed, atol=1e-4)
            constant = isinstance(getattr(factors, "coordinates", None), Activated) and factors.gate is None
            assert affine == factors.is_affine or (constant and factors.coordinates.inside.weight is None)


def test_stacked_and_taken_apart():
    for one, other in zip(every_form(), every_form()):
        other = other.map(lambda tensor: tensor * 2)
        stacked = type(one).stack([one, other])
        assert one.signature == other.signature != stacked.signature and one.form == stacked.form
        for again, before in zip(stacked.unstack(), (one, other), strict=True):
            assert all(map(torch.equal, again.tensors(), before.tensors()))
        sizes = {"r": R, "d": D, "n": TOKENS, "1": 1}
        assert [list(tensor.shape) for tensor in one.tensors()] == [
            [sizes[size] for size in dimensions] for dimensions in one.dimensions()
        ]


def test_what_cannot_be_computed_cannot_be_built():
    for incomplete in (
        lambda: LowRankFactors(torch.randn(R, D)),
        lambda: LowRankFactors(coordinates=Affine(None, torch.randn(R))),
        lambda: Affine(torch.randn(R, D)),
        lambda: Activated(Affine(None, torch.randn(R))),
        lambda: ElementwiseFactors(torch.randn(D)),
        lambda: Gate(torch.randn(D)),
    ):
        with pytest.raises(TypeError, match="missing"):
            incomplete()


def test_a_source_is_for_interchange_alone():
    source = torch.randn(TOKENS, D)
    for factors in every_form():
        if isinstance(getattr(factors, "coordinates", None), Difference):
            assert factors.with_source_hidden(source).coordinates.source_hidden is source
        else:
            with pytest.raises(TypeError, match="takes no hidden states of a source run"):
                factors.with_source_hidden(source)


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
