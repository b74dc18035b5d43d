"""Each formula against one forward and backward of the authors' classes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_reft.edits.formulas import INTERVENTIONS

NUMBERS = load_file(Path(__file__).parent / "interventions.safetensors")


def close(got, expected):
    return (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


VARIANTS = [
    *(f"{name}.plain" for name in ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")),
    *(f"{name}.relu" for name in ("loreft", "noreft", "direft", "nodireft")),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward(variant):
    reference = {key.rpartition(".")[2]: value for key, value in NUMBERS.items() if key.startswith(f"{variant}.")}
    name, _, added = variant.partition(".")
    act_fn = None if added == "plain" else added
    theirs = {  # our parameter: their value of it, their gradient of it (R's they have in another parametrisation)
        "R": lambda: (reference["R"].T, None),
        "W": lambda: (reference["W"], reference["grad_W"]),
        "W1": lambda: (reference["W"], reference["grad_W"]),
        "W2": lambda: (reference["proj_weight"], reference["grad_proj_weight"]),
        # NoReFT's projection has a bias of its own, which the formula subtracts: without f, their b − p is our b.
        "b": lambda: (
            reference["b"] - (reference["proj_bias"] if variant == "noreft.plain" else 0),
            reference["grad_b"],
        ),
        "p": lambda: (reference["proj_bias"], reference["grad_proj_bias"]),
    }
    d, r = reference["h"].shape[-1], len(reference["b"])
    module = INTERVENTIONS[name](d, r, act_fn=act_fn)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(theirs[key]()[0])
    h = reference["h"].clone().requires_grad_()
    out = h + module.edit(h)
    assert close(out, reference["out"])
    assert not close(h, reference["out"])
    out.backward(reference["grad_out"])
    assert close(h.grad, reference["grad_h"])
    for key, parameter in module.named_parameters():
        if key != "R":
            assert close(parameter.grad, theirs[key]()[1]), key
    if variant == "noreft.plain":
        assert close(-module.b.grad, reference["grad_proj_bias"])
    with torch.no_grad():
        assert close(h + module.edit(h), reference["out"])
