"""The maths: formulas and gradients against float64, orthonormality, precision, and writes to parameters."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_reft.edits.families import ACTIVATIONS
from peft_reft.edits.formulas import INTERVENTIONS
from peft_reft.edits.intervention import Intervention, factors_of
from peft_reft.edits.rotation import _Orthonormalise, orthonormalise

D, R, N = 24, 4, 7
PLAIN = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"]
# A name, and what is added to it.
NAMES = [
    *PLAIN,
    *("red", "bias", "loreft relu", "noreft tanh", "direft gelu", "nodireft silu"),
    *("loreft gate", "consreft gate", "red gate", "bias gate", "nodireft relu gate"),
]
ROTATED = [name for name in PLAIN if "R" in INTERVENTIONS[name].parameter_shapes]
FUNCTIONS = {"relu": lambda x: x.clamp_min(0), "tanh": torch.tanh, "silu": lambda x: x * torch.sigmoid(x)}
FUNCTIONS["gelu"] = lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2


def gram_schmidt(a):
    """R = L⁻¹A with L the Cholesky factor of AAᵀ: another way to the same matrix, differentiable."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky(a @ a.mT), a, upper=False)


def formula(name, parameters, h):
    """Φ(h) − h as the papers write it, for rows h; `parameters` by name."""
    name, *added = name.split()
    p = {
        key: value.to(h.dtype).unsqueeze(-2) if key.islower() else value.to(h.dtype)
        for key, value in parameters.items()
    }
    f = next((FUNCTIONS[each] for each in added if each in FUNCTIONS), lambda x: x)
    if "R" in p:
        p["R"] = gram_schmidt(p["R"])
    change = {
        "loreft": lambda: (f(h @ p["W"].mT + p["b"]) - h @ p["R"].mT) @ p["R"],
        "noreft": lambda: (f(h @ p["W1"].mT + p["b"]) - h @ p["W2"].mT - p.get("p", 0)) @ p["W2"],
        "direft": lambda: f(h @ p["W"].mT + p["b"]) @ p["R"],
        "nodireft": lambda: f(h @ p["W1"].mT + p["b"]) @ p["W2"],
        "consreft": lambda: (p["b"] - h @ p["R"].mT) @ p["R"],
        "lobireft": lambda: p["b"].expand(*h.shape[:-1], -1) @ p["R"],
        "red": lambda: h * p["s"] + p["b"] - h,
        "bias": lambda: p["b"].expand_as(h),
    }[name]()
    return torch.tanh((p["v"] * h).sum(-1, keepdim=True) + p["c"]) * change if "gate" in added else change


def make(name, d=D, r=R, count=None, init=False, seed=0):
    torch.manual_seed(seed)
    name, *added = name.split()
    act_fn = next((each for each in added if each in FUNCTIONS), None)
    return INTERVENTIONS[name](d, r, count, init, act_fn, "gate" in added)


def parameters_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def skew(module, seed=1):
    """Move R off the manifold, as an optimiser's step does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def orthonormality(r):
    return (r.double() @ r.double().mT - torch.eye(r.shape[-2], dtype=torch.float64)).abs().max().item()


def assert_close(got, expected, tolerance=1e-5):
    """Within `tolerance` of the size of what is expected."""
    expected = expected.double()
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


# Formulas and gradients.


def test_every_formula_is_written_out():
    """All but `interchange`, which needs a source run: test_interchange.py."""
    written_out = {name.split()[0] for name in NAMES}
    assert written_out == set(INTERVENTIONS) - {"interchange"}, (
        "NAMES, `formula` and `test_number_of_parameters` need each formula"
    )


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_formula(name, count):
    module = skew(make(name, count=count))
    h = torch.randn(*(() if count is None else (count,)), N, D)
    expected = formula(name, parameters_of(module), h.double())
    with torch.no_grad():
        assert_close(module.edit(h), expected)
    assert_close(module.edit(h).detach(), expected)  # in training; pulls R back
    with torch.no_grad():
        assert_close(module.edit(h), formula(name, parameters_of(module), h.double()))


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, count):
    module = make(name, count=count)
    h = torch.randn(*(() if count is None else (count,)), N, D, requires_grad=True)
    upstream = torch.randn(h.shape)
    module.edit(h).backward(upstream)
    exact = {key: value.double().requires_grad_() for key, value in parameters_of(module).items()}
    h64 = h.detach().double().requires_grad_()
    formula(name, exact, h64).backward(upstream.double())
    if h64.grad is None:  # the edit does not depend on h
        assert name in ("lobireft", "bias") and h.grad is None
    else:
        assert_close(h.grad, h64.grad)
    for key, parameter in module.named_parameters():
        assert_close(parameter.grad, exact[key].grad)


@pytest.mark.parametrize("name", ROTATED)
def test_gradients_of_parameters_stored_in_bf16(name):
    """Those stay off the manifold; their gradient is that of the orthonormalised matrix all the same."""
    module, h, upstream = skew(make(name)).to(torch.bfloat16), torch.randn(N, D), torch.randn(N, D)
    module.edit(h).backward(upstream)
    exact = {key: value.double().requires_grad_() for key, value in parameters_of(module).items()}
    formula(name, exact, h.double()).backward(upstream.double())
    for key, parameter in module.named_parameters():
        assert_close(parameter.grad, exact[key].grad, 1e-2)


@pytest.mark.parametrize("shape", [(4, 24), (1, 24), (24, 24), (3, 4, 24)])
def test_gradient_of_orthonormalise_off_the_manifold(shape):
    torch.manual_seed(0)
    a = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(shape)
    before = a.detach().clone()
    _Orthonormalise.apply(a, False)[0].backward(upstream)
    assert torch.equal(a.detach(), before)
    exact = before.double().requires_grad_()
    gram_schmidt(exact).backward(upstream.double())
    assert_close(a.grad, exact.grad, 2e-4 if shape[-1] == shape[-2] else 2e-5)


def test_gradient_of_orthonormalise_by_finite_differences():
    torch.manual_seed(0)
    a = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Orthonormalise.apply(x, False), a)


@pytest.mark.parametrize("name", ROTATED)
def test_two_forwards_before_one_backward(name):
    """DPO, accumulation, checkpointing: gradients add, though each forward writes R back."""
    h = torch.randn(2, N, D)
    module, reference = skew(make(name)), skew(make(name))
    (module.edit(h[0]).square().sum() + module.edit(h[1]).square().sum()).backward()
    for part in h:
        reference.edit(part).square().sum().backward()
    for key, parameter in module.named_parameters():
        assert_close(parameter.grad, reference.get_parameter(key).grad)


# Orthonormality.


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTATED)
def test_r_stays_orthonormal_in_training(name, dtype, count):
    module = make(name, count=count).to(dtype)
    h = torch.randn(*(() if count is None else (count,)), N, D)
    target = torch.randn(h.shape)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    start, losses = module.rotation().detach().clone(), []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (module.edit(h) + h - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert orthonormality(module.rotation().detach()) <= 1e-5
    assert (module.rotation() - start).abs().max() > 0.1  # it has gone somewhere
    assert losses[-1] < losses[0]
    assert module.R.dtype == dtype


def test_a_training_forward_leaves_an_orthonormal_parameter():
    """What is saved is the R that computed; a frozen or bf16 one is not written to."""
    module = skew(make("loreft"))
    module.edit(torch.randn(N, D))
    assert orthonormality(module.R.detach()) <= 1e-5
    assert torch.equal(module.R, module.rotation())
    frozen = skew(make("loreft")).requires_grad_(False)
    low = skew(make("loreft")).to(torch.bfloat16)
    for unchanged in (frozen, low):
        before = parameters_of(unchanged)
        unchanged.edit(torch.randn(N, D))
        assert all(torch.equal(unchanged.get_parameter(key), value) for key, value in before.items())


sizes = st.tuples(st.integers(1, 48), st.integers(0, 150)).map(lambda t: (t[0], t[0] + t[1]))
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=60)
@given(sizes, seeds, st.sampled_from([(), (3,)]), st.booleans())
def test_an_orthonormal_matrix_comes_back_bit_for_bit(size, seed, lead, double):
    """However it was made: by us, or elsewhere and rounded to float32. So reloading is exact."""
    a = torch.randn(*lead, *size, generator=torch.Generator().manual_seed(seed))
    if double:
        r = torch.linalg.qr(a.double().mT)[0].mT.float()
    else:
        r, _ = orthonormalise(a)
    again, lower = orthonormalise(r)
    assert torch.equal(again, r)
    assert torch.equal(lower, torch.eye(size[0]).expand(lower.shape))


@settings(deadline=None, max_examples=60)
@given(sizes.filter(lambda size: size[1] >= size[0] + 5), seeds, st.sampled_from([(), (3,)]))
def test_orthonormalise_is_gram_schmidt(size, seed, lead):
    a = torch.randn(*lead, *size, generator=torch.Generator().manual_seed(seed))
    before = a.clone()
    r, lower = orthonormalise(a)
    assert torch.equal(a, before)
    assert r.shape == a.shape and lower.shape == (*lead, size[0], size[0])
    assert orthonormality(r) <= 1e-5
    assert (lower.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert torch.equal(lower, lower.tril())
    assert_close(lower @ r, a)
    assert_close(r, gram_schmidt(a.double()), 1e-3)


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
def test_ill_conditioned_matrices(condition):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 8, dtype=torch.float64))[0] for n in (8, 64))
    a = (left * torch.logspace(0, -torch.tensor(condition).log10().item(), 8, dtype=torch.float64)) @ right.mT
    r, lower = orthonormalise(a.float())
    assert orthonormality(r) <= 1e-5
    assert (lower.diagonal() > 0).all()
    assert_close(lower @ r, a)
    assert_close(r, gram_schmidt(a), 1e-6 * condition)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_does_not_matter(scale):
    a = torch.randn(4, 24)
    assert_close(orthonormalise(scale * a)[0], orthonormalise(a)[0])


# Construction.


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_number_of_parameters(name, count):
    name, *added = name.split()
    each = {"consreft": R * D + R, "lobireft": R * D + R, "red": 2 * D, "bias": D}.get(name, 2 * R * D + R)
    each += (D + 1) * ("gate" in added) + R * (name == "noreft" and "tanh" in added)
    module = make(" ".join([name, *added]), count=count)
    assert sum(parameter.numel() for parameter in module.parameters()) == each * (count or 1)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("consreft", "loreft relu", "direft gelu")])
def test_identity_at_the_start(name, count):
    """Exactly: not one bit of the model's output may change, in training and without gradients."""
    module = make(name, count=count, init=True)
    h = torch.randn(*(() if count is None else (count,)), N, D)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert torch.count_nonzero(module.edit(h)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_identity_start_can_learn(name):
    """A start at which every gradient is zero would never leave it."""
    module = make(name, init=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module.edit(torch.randn(N, D)).backward(torch.randn(N, D))
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_consreft_starts_by_zeroing_its_subspace():
    module = make("consreft", init=True)
    h = torch.randn(N, D)
    with torch.no_grad():
        assert_close((h + module.edit(h)) @ module.R.T, torch.zeros(N, R))


@pytest.mark.parametrize("name", ["loreft relu", "direft gelu"])
def test_an_activation_on_a_rotation_starts_as_the_paper(name):
    """Rᵀf(Wh + b) is nowhere zero, and with W = 0 it would never learn where f is flat at 0."""
    assert make(name, init=True).edit(torch.randn(N, D)).abs().max() > 1e-3


@pytest.mark.parametrize("act_fn", list(ACTIVATIONS))
def test_every_activation(act_fn):
    module = INTERVENTIONS["nodireft"](D, R, act_fn=act_fn, init_weights="paper")
    module.edit(torch.randn(N, D)).sum().backward()
    assert sum(parameter.numel() for parameter in module.parameters()) == 2 * R * D + R
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("init", ["paper", False])
@pytest.mark.parametrize("name", PLAIN)
def test_other_starts_edit(name, init):
    """As `nn.Linear` and `torch.rand` start, in the authors' code; R orthonormal."""
    module = make(name, d=64, r=16, init=init)
    bound = 1 if name in ("consreft", "lobireft") else 64**-0.5
    for key, parameter in module.named_parameters():
        if key == "R":
            assert orthonormality(parameter.detach()) <= 1e-5
        else:
            assert 0.5 * bound < parameter.abs().max() <= bound
            assert (parameter.min() >= 0) == (bound == 1)
    assert module.edit(torch.randn(N, 64)).abs().max() > 1e-3


@pytest.mark.parametrize("count", [None, 3])
def test_interventions_start_different_from_each_other(count):
    first, second = make("loreft", count=count, seed=0), make("loreft", count=count, seed=1)
    assert not torch.equal(first.R, second.R)
    if count:
        assert not torch.equal(first.R[0], first.R[1])


def test_full_rank_is_allowed():
    module = make("loreft", d=6, r=6)
    assert orthonormality(module.rotation().detach()) <= 1e-5


def test_on_the_meta_device_nothing_is_computed():
    with torch.device("meta"):
        module = make("loreft")
    assert all(parameter.is_meta for parameter in module.parameters())


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Intervention(D, R)


# Precision.


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_lower_the_precision(name, grad):
    module, h = make(name), torch.randn(N, D)
    with torch.set_grad_enabled(grad):
        expected = module.edit(h)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = module.edit(h)
            assert torch.is_autocast_enabled("cpu")
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_lower_the_precision_of_gradients(name):
    modules, h = [make(name), make(name)], torch.randn(N, D)
    modules[0].edit(h).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edit = modules[1].edit(h)
    edit.sum().backward()  # outside of autocast, as torch wants it
    for exact, got in zip(modules[0].parameters(), modules[1].parameters()):
        assert torch.equal(exact.grad, got.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_other_types(name, dtype):
    """The edit is computed in float32 of the input as it is, whatever its type."""
    module, h = make(name), torch.randn(N, D).to(dtype)
    got = module.edit(h)
    assert got.dtype == torch.float32
    assert torch.equal(got, module.edit(h.float()))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_stored_in_bf16_compute_in_float32(name):
    module = make(name).to(torch.bfloat16)
    h = torch.randn(N, D)
    got = module.edit(h)
    assert got.dtype == torch.float32
    assert_close(got.detach(), formula(name, parameters_of(module), h.double()))


# Several side by side.


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_several_equal_as_many_alone(name, grad):
    together = make(name, count=3)
    alone = [make(name) for _ in range(3)]
    with torch.no_grad():
        for which, module in enumerate(alone):
            for key, parameter in module.named_parameters():
                parameter.copy_(together.get_parameter(key)[which])
    h, upstream = torch.randn(3, N, D), torch.randn(3, N, D)
    with torch.set_grad_enabled(grad):
        got = together.edit(h)
        assert got.shape == h.shape
        for which, module in enumerate(alone):
            assert_close(got[which].detach(), module.edit(h[which]).detach(), 1e-6)
    if grad:
        got.backward(upstream)
        for which, module in enumerate(alone):
            module.edit(h[which]).backward(upstream[which])
            for key, parameter in module.named_parameters():
                assert_close(together.get_parameter(key).grad[which], parameter.grad)


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_factors_computed_side_by_side(name, count):
    """Values, gradients, and what is written back, as one by one."""
    several, alone = ([skew(make(name, count=count)) for _ in range(3)] for _ in range(2))
    for n, module in enumerate([*several, *alone]):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1 + n % 3)
    together, one_by_one = factors_of(several), [factors_of([module])[0] for module in alone]
    for mine, expected in zip(together, one_by_one, strict=True):
        assert mine.signature == expected.signature
        for got, wanted in zip(mine.tensors(), expected.tensors(), strict=True):
            assert_close(got, wanted)
    for factors in (together, one_by_one):
        tensors = [(n, tensor) for n, each in enumerate(factors) for tensor in each.tensors()]
        sum(((n + 1) * tensor.square()).sum() for n, tensor in tensors).backward()
    for mine, expected in zip(several, alone, strict=True):
        for key, parameter in mine.named_parameters():
            assert_close(parameter, expected.get_parameter(key))
            assert_close(parameter.grad, expected.get_parameter(key).grad)


# Parameters are written to in many ways; what was computed before is never used again.


def through_numpy(parameter, other):
    parameter.detach().numpy()[...] = other.detach().numpy()


WRITES = {
    "copy_": lambda parameter, other: parameter.copy_(other),
    "data": lambda parameter, other: parameter.data.copy_(other),
    "data, in place": lambda parameter, other: parameter.data.add_(other.data - parameter.data),
    "data, another tensor": lambda parameter, other: setattr(parameter, "data", other.detach().clone()),
    "numpy": through_numpy,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("write", [*WRITES, "load_state_dict", "assign", "optimizer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_write_is_seen(name, write, mode):
    """Weight averages, evolution strategies and optimisers in C write where autograd does not see it."""
    module, other, h = make(name).eval(), make(name, seed=1), torch.randn(N, D)
    if mode is torch.enable_grad:
        module.requires_grad_(False)
    with mode():
        before = module.edit(h)
    with torch.no_grad():
        if write == "load_state_dict":
            module.load_state_dict(other.state_dict())
        elif write == "assign":
            module.load_state_dict(other.state_dict(), assign=True)
        elif write == "optimizer":
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter)
            torch.optim.SGD(module.parameters(), lr=0.5).step()
        else:
            for key, parameter in module.named_parameters():
                WRITES[write](parameter, other.get_parameter(key))
    with mode():
        after = module.edit(h)
    assert not torch.allclose(before, after, atol=1e-3)
    assert_close(after, formula(name, parameters_of(module), h.double()))


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_type_and_back_is_seen(name):
    module, h = make(name).requires_grad_(False), torch.randn(N, D)
    module.edit(h)
    module.to(torch.bfloat16)
    module.to(torch.float32)
    assert_close(module.edit(h), formula(name, parameters_of(module), h.double()))


def test_a_change_of_a_parameter_made_in_inference_mode_is_seen():
    with torch.inference_mode():
        module, h = make("loreft"), torch.randn(N, D)
        before = module.edit(h)
        module.W.add_(1)
        after = module.edit(h)
        assert not torch.allclose(before, after, atol=1e-2)
        assert_close(after, formula("loreft", parameters_of(module), h.double()))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name, grad):
    """deepcopy, pickle and torch.save, after forwards of either kind; a copy goes its own way."""
    module, h = make(name), torch.randn(N, D)
    with torch.set_grad_enabled(grad):
        module.edit(h)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        expected = module.edit(h)
        for other in copies:
            assert type(other) is type(module)
            assert torch.equal(other.edit(h), expected)
            for parameter in other.parameters():
                parameter.mul_(2)
            assert not torch.allclose(other.edit(h), expected)
        assert torch.equal(module.edit(h), expected)


def test_inference_mode():
    module, h = make("loreft"), torch.randn(N, D)
    with torch.no_grad():
        expected = module.edit(h)
    with torch.inference_mode():
        assert torch.equal(module.edit(h), expected)
    module.edit(h).sum().backward()  # what inference mode computed must not be used in training
    assert module.W.grad is not None


def test_state_dict_has_the_parameters_and_nothing_else():
    for name, kind in INTERVENTIONS.items():
        module = make(name)
        with torch.no_grad():
            module.edit(torch.randn(N, D))
        assert [*module.state_dict()] == [*kind.parameter_shapes]


def test_interchange_puts_the_subspace_of_the_source_in():
    """b + Rᵀ(Rs − Rb): in the subspace the source, beside it the base."""
    module = INTERVENTIONS["interchange"](D, R)
    base, source = torch.randn(N, D), torch.randn(N, D)
    with torch.no_grad():
        out = base + module.edit(base, source)
        assert_close(out @ module.R.T, source @ module.R.T)
        beside = torch.eye(D) - module.R.T @ module.R
        assert_close(out @ beside, base @ beside)
        assert torch.count_nonzero(module.edit(base)) == 0
    assert sum(parameter.numel() for parameter in module.parameters()) == R * D


# Replicas of `nn.DataParallel`, whose weights are plain attributes that autograd computed.


@pytest.fixture
def replicate(monkeypatch):
    """torch's own, with the broadcast to GPUs replaced by a copy that autograd sees."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copy_to_each(tensors, devices, detach=False):
        return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copy_to_each)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional=True: device)
    return module.replicate


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_replicas(name, count, replicate):
    """They compute the same, and gradients arrive at the parameters; nothing is written to a replica."""
    module = skew(make(name, count=count))
    h = torch.randn(2, *(() if count is None else (count,)), N, D)
    upstream, before = torch.randn(h.shape), parameters_of(module)
    exact = {key: value.double().requires_grad_() for key, value in before.items()}
    formula(name, exact, h.double()).backward(upstream.double())
    first, second = replicate(module, [0, 1])
    assert first.trains and second.trains and first.signature == second.signature != module.signature
    both = [factors_of([first])[0], factors_of([second])[0]]
    for n, together in enumerate(factors_of([first, second])):
        for one, other in zip(both[n].tensors(), together.tensors(), strict=True):
            assert_close(one.detach(), other.detach())
    for n, replica in enumerate((first, second)):
        replica.edit(h[n]).backward(upstream[n])
    for key, parameter in module.named_parameters():
        assert_close(parameter.grad, exact[key].grad, 1e-4)
        assert torch.equal(parameter, before[key])
    with torch.no_grad():
        for replica in replicate(module, [0, 1], detach=True):
            assert not replica.trains
            assert torch.equal(replica.edit(h[0]), module.edit(h[0]))


@pytest.mark.parametrize("name", [name for name, formula in INTERVENTIONS.items() if not formula.takes_act_fn])
def test_an_activation_is_refused_if_the_formula_has_no_place_for_it(name):
    with pytest.raises(ValueError, match=r"act_fn='relu': .* has no Wh"):
        INTERVENTIONS[name](d=8, r=2, act_fn="relu")
