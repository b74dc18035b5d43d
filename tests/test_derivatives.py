"""Second derivatives, forward mode and transforms of torch.func, against autograd through the formulas in float64."""

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import LoraConfig, get_peft_model
from test_edit import KINDS, make_edits, parameters_of, plainly
from test_interventions import NAMES, D, N, R, assert_close, formula, gram_schmidt, make, skew
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from peft_reft import LoReftConfig
from peft_reft.edits.apply import add_edits, may_change
from peft_reft.edits.intervention import factors_of
from peft_reft.edits.rotation import _Orthonormalise, on_manifold

# torch's own forward mode is compiled by `torch.jit.script`
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning:torch")


def score(edit, upstream):
    """Return a number that is not linear in the edit."""
    return (edit * upstream).sum() + (edit.square() * upstream).sum()


def second(loss, inputs, directions):
    """Return gradients of `loss`, and those of their product with `directions`."""
    first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
    return [*first, *torch.autograd.grad(along, inputs, allow_unused=True, materialize_grads=True)]


def double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_all_close(got, expected, tolerance=1e-4):
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine.detach(), theirs.detach(), tolerance)


# Orthonormal rows.


def test_second_derivative_of_orthonormalise_by_finite_differences():
    torch.manual_seed(0)
    a = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Orthonormalise.apply(x, False), a)
    assert torch.autograd.gradgradcheck(lambda x: _Orthonormalise.apply(x, False), a)


@pytest.mark.parametrize("shape", [(4, 24), (1, 24), (3, 4, 24)])
@pytest.mark.parametrize("pull_back", [False, True])
@pytest.mark.parametrize("orthonormal", [False, True])
def test_second_derivative_of_orthonormalise(shape, pull_back, orthonormal):
    torch.manual_seed(0)
    a, upstream, direction = torch.randn(3, *shape)
    a = gram_schmidt(a.double()).float() if orthonormal else a
    a.requires_grad_()
    got = second(score(on_manifold(a, pull_back), upstream), [a], [direction])
    exact = double([a])  # pulled back or not: the gradient is that at the value that is stored
    expected = second(score(gram_schmidt(exact[0]), upstream.double()), exact, [direction.double()])
    assert_all_close(got, expected)


# Formulas.


def values_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def of_formula(name, values, h, upstream, directions):
    """Return first and second derivatives by autograd, in float64; the last direction is that of h."""
    exact = double([*values.values(), h])
    edit = formula(name, dict(zip(values, exact)), exact[-1])
    return second(score(edit, upstream.double()), exact, [v.double() for v in directions])


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name, count):
    """Hessian-vector products are right, also with parameters off the manifold, as an optimiser's step leaves them."""
    module = skew(make(name, count=count))
    h, upstream = torch.randn(2, *(() if count is None else (count,)), N, D)
    h.requires_grad_()
    inputs = [*module.parameters(), h]
    directions = [torch.randn_like(each) for each in inputs]
    got = second(score(module.edit(h), upstream), inputs, directions)
    assert_all_close(got, of_formula(name, values_of(module), h, upstream, directions))


@pytest.mark.parametrize("name", ["loreft", "consreft", "loreft relu", "red gate"])
def test_second_derivatives_of_several_side_by_side(name):
    modules, h, upstream = [skew(make(name, seed=n), seed=n) for n in range(3)], torch.randn(N, D), torch.randn(N, D)
    inputs = [parameter for module in modules for parameter in module.parameters()]
    directions = [torch.randn_like(each) for each in inputs]
    got = second(sum(score(each.edit(h), upstream) for each in factors_of(modules)), inputs, directions)
    for n, module in enumerate(modules):
        names = len(list(module.parameters()))
        own = [directions[n * names + k] for k in range(names)] + [torch.zeros_like(h)]
        expected = of_formula(name, values_of(module), h, upstream, own)
        mine = [*got[n * names : (n + 1) * names], *got[len(inputs) + n * names : len(inputs) + (n + 1) * names]]
        assert_all_close(mine, [*expected[:names], *expected[names + 1 : -1]])


@pytest.mark.parametrize("name", NAMES)
def test_learning_to_learn(name):
    """A step of gradient descent is differentiated by the weights that it began with (MAML)."""
    module, h, upstream = skew(make(name)), torch.randn(2, N, D), torch.randn(2, N, D)

    def run(edit, weights, upstream):
        first = torch.autograd.grad(score(edit(weights, 0), upstream[0]) / N, [*weights.values()], create_graph=True)
        moved = {key: w - 0.1 * g for (key, w), g in zip(weights.items(), first)}
        return torch.autograd.grad(score(edit(moved, 1), upstream[1]), [*weights.values()])

    def edit(weights, n):
        return functional_call(Edit(module), {f"inner.{key}": w for key, w in weights.items()}, (h[n],))

    got = run(edit, dict(module.named_parameters()), upstream)
    exact = {key: value.double().requires_grad_() for key, value in values_of(module).items()}
    assert_all_close(got, run(lambda w, n: formula(name, w, h[n].double()), exact, upstream.double()), 1e-3)


class Edit(torch.nn.Module):
    """`functional_call` calls a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return self.inner.edit(h)


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_torch_func_are_right(name, count):
    """Gradients, per-example gradients, forward mode, and one over the other are right."""
    module = skew(make(name, count=count))
    lead = () if count is None else (count,)
    h, upstream = torch.randn(2, 5, *lead, N, D)
    before = values_of(module)

    def loss(weights, h, upstream):
        return score(functional_call(Edit(module), {f"inner.{k}": w for k, w in weights.items()}, (h,)), upstream)

    directions = {key: torch.randn_like(value) for key, value in before.items()}
    tangents = [*directions.values(), torch.zeros_like(h[0])]
    of_each = vmap(grad(loss), (None, 0, 0))(before, h, upstream)
    for n in range(len(h)):
        expected = of_formula(name, before, h[n], upstream[n], tangents)
        first, along = expected[: len(before)], expected[len(before) + 1 : -1]
        assert_all_close(grad(loss)(before, h[n], upstream[n]).values(), first)
        assert_all_close([gradient[n] for gradient in of_each.values()], first)
        value, tangent = jvp(lambda w, n=n: loss(w, h[n], upstream[n]), (before,), (directions,))
        assert_close(value, score(formula(name, before, h[n].double()), upstream[n].double()), 1e-4)
        assert_close(tangent, sum((g * v).sum() for g, v in zip(first, tangents)), 1e-4)
        _, moved = jvp(lambda w, n=n: grad(loss)(w, h[n], upstream[n]), (before,), (directions,))
        assert_all_close(moved.values(), along)
    assert all(torch.equal(module.get_parameter(key), value) for key, value in before.items())  # nothing is written to


def test_forward_mode_without_torch_func():
    module, h, upstream = skew(make("loreft")), torch.randn(N, D), torch.randn(N, D)
    exact = {key: value.double().requires_grad_() for key, value in values_of(module).items()}
    direction = torch.randn_like(module.R)
    gradient = torch.autograd.grad(score(formula("loreft", exact, h.double()), upstream.double()), exact["R"])[0]
    with forward_ad.dual_level():
        weights = {f"inner.{key}": value for key, value in values_of(module).items()}
        weights["inner.R"] = forward_ad.make_dual(weights["inner.R"], direction)
        out = score(functional_call(Edit(module), weights, (h,)), upstream)
        assert_close(forward_ad.unpack_dual(out).tangent, (gradient * direction).sum(), 1e-4)


# The function that adds edits.


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_added_edits(kind, in_place):
    generator = torch.Generator().manual_seed(0)
    edits = make_edits(kind, generator)
    leaf = torch.randn(11, 6, generator=generator).requires_grad_()
    upstream = torch.randn(11, 6, generator=generator)
    inputs = [leaf, *parameters_of(edits)]
    directions = [torch.randn(each.shape, generator=generator) for each in inputs]

    def run(function, nonlinear):
        hidden = leaf + 1  # as a block ends
        out = function(hidden)
        return second(score(out, upstream) if nonlinear else (out * upstream).sum(), inputs, directions)

    for nonlinear in (True, False):  # without, second derivatives pass through the gathered tokens alone
        expected = run(lambda flat: plainly(flat, edits), nonlinear)
        got = run(lambda flat: add_edits(flat, edits, in_place and may_change(flat)), nonlinear)
        assert_all_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_added_edits(kind):
    generator = torch.Generator().manual_seed(0)
    edits = make_edits(kind, generator)
    rows, upstream = torch.randn(2, 3, 11, 6, generator=generator)

    def loss(hidden, upstream, add):
        return score(add(hidden * 1.5), upstream)

    def ours(hidden):
        return add_edits(hidden, edits, may_change(hidden))

    of_each = vmap(grad(lambda h, u: loss(h, u, ours)))(rows, upstream)
    for n, hidden in enumerate(rows):
        expected = torch.autograd.grad(
            loss(hidden.requires_grad_(), upstream[n], lambda flat: plainly(flat, edits)), hidden
        )
        assert_all_close([of_each[n]], expected)


# A whole model.


def adapted(config):
    torch.manual_seed(0)
    base = build("llama")
    base.set_attn_implementation("eager")  # whose attention has second derivatives, and a rule for vmap
    model = get_peft_model(base, config).train()
    randomise(model)
    return model


CONFIGS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False),
    "loreft": LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f2+l2"),
    "by group": LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", tie="group"),
    "all": LoReftConfig(task_type="CAUSAL_LM", r=2, positions="all", intervention="nodireft", act_fn="tanh"),
}


def batch():
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :5] = -100
    return ids, labels


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_s_second_derivatives_both_ways(name):
    """`create_graph=True` differentiates what is written by hand, torch.func plain operations."""
    model, (ids, labels) = adapted(CONFIGS[name]), batch()
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    model(input_ids=ids, labels=labels)  # R is on its manifold from here on
    directions = [torch.randn_like(p) for p in parameters]
    got = second(model(input_ids=ids, labels=labels).loss, parameters, directions)

    def loss(*weights):
        return functional_call(model, dict(zip(names, weights)), (), {"input_ids": ids, "labels": labels}).loss

    weights = tuple(p.detach() for p in parameters)
    first, along = jvp(grad(loss, tuple(range(len(weights)))), weights, tuple(directions))
    assert max(each.abs().max() for each in along) > 1e-3
    for mine, theirs in zip(got, [*first, *along], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_s_jacobian_and_hessian(name):
    model, (ids, labels) = adapted(CONFIGS[name]), batch()
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    last = [*weights][-1]

    def loss(weight):
        inputs = {"input_ids": ids, "labels": labels}
        return functional_call(model, {**weights, last: weight}, (), inputs).loss

    one, other = grad(loss)(weights[last]), jacrev(loss)(weights[last])
    torch.testing.assert_close(one, other)
    found = hessian(loss)(weights[last]).reshape(one.numel(), -1)
    torch.testing.assert_close(found, found.T, atol=1e-5, rtol=1e-3)
    direction = torch.randn_like(one)
    along = jvp(grad(loss), (weights[last],), (direction,))[1]
    torch.testing.assert_close(found @ direction.flatten(), along.flatten(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_in_one_pass(kind, in_place):
    """`is_grads_batched=True`, by which `torch.autograd.functional.jacobian(vectorize=True)` computes."""
    generator = torch.Generator().manual_seed(0)
    edits = make_edits(kind, generator)
    leaf = torch.randn(11, 6, generator=generator).requires_grad_()
    inputs = [leaf, *parameters_of(edits)]
    upstream = torch.randn(4, 11, 6, generator=generator)

    def run(function):
        return torch.autograd.grad(function(leaf + 1), inputs, upstream, is_grads_batched=True)

    got = run(lambda flat: add_edits(flat, edits, in_place and may_change(flat)))
    assert_all_close(got, run(lambda flat: plainly(flat, edits)))


@pytest.mark.parametrize("name", NAMES)
def test_many_gradients_of_a_formula_in_one_pass(name):
    module, h, upstream = skew(make(name)), torch.randn(N, D), torch.randn(3, N, D)
    parameters = [*module.parameters()]
    got = torch.autograd.grad(module.edit(h), parameters, upstream, is_grads_batched=True)
    for n, each in enumerate(upstream):
        assert_all_close([gradient[n] for gradient in got], torch.autograd.grad(module.edit(h), parameters, each))
