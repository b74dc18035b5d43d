"""A Mac's GPU: what torch lacks there, or has slowly, runs on the CPU and comes back without a user's setting."""

import pytest
import torch
from conftest import build, randomise
from peft import get_peft_model
from stand_in import Device, There

from peft_reft import LoReftConfig, LoReftRuntimeConfig
from peft_reft.edits.rotation import orthonormalise
from peft_reft.macs import on_cpu_of_mac
from peft_reft.positions.scans import running_max

MAC = Device("mps", lacking=("linalg_", "geqrf", "cummax", "_cummax"), has_float64=False)


@pytest.fixture
def mac():
    with MAC():
        yield MAC


def test_the_stand_in_lacks_what_a_mac_lacks(mac):
    tensor = torch.randn(3, 2, device=MAC.device)
    assert (
        tensor.device == MAC.device and isinstance(tensor @ tensor.mT, There) and not isinstance(tensor.cpu(), There)
    )
    for lacking in (torch.linalg.qr, lambda x: torch.cummax(x, 1), lambda x: torch.linalg.cholesky(x.mT @ x)):
        with pytest.raises(NotImplementedError, match="not currently implemented"):
            lacking(tensor)
    with pytest.raises(TypeError, match="float64"):
        tensor.double()
    with pytest.raises(RuntimeError, match="same device"):
        tensor + torch.ones(3, 2)


def test_it_runs_on_the_cpu_and_comes_back(mac):
    a = torch.randn(2, 3, 8)
    r, lower = orthonormalise(MAC.take(a))
    assert r.device == lower.device == MAC.device
    expected = orthonormalise(a)
    torch.testing.assert_close((r.cpu(), lower.cpu()), expected, atol=0, rtol=0)
    values = torch.tensor([[-1, 4, -1, 7, -1]])
    assert running_max(MAC.take(values), -1).cpu().tolist() == [[-1, 4, 4, 7, 7]]
    assert on_cpu_of_mac(torch.neg, a).equal(-a)  # elsewhere nothing moves


BATCH = {"input_ids": torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))}
BATCH["attention_mask"] = torch.ones_like(BATCH["input_ids"])
BATCH["labels"] = torch.where(torch.arange(12) < torch.tensor([[7], [5]]), -100, BATCH["input_ids"])


def adapted(**kwargs):
    config = LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **kwargs})
    model = get_peft_model(build("llama"), config)
    randomise(model)
    return model


def train(model, batch):
    loss = model.train()(**batch).loss
    loss.backward()
    return [loss, *[p.grad for p in model.parameters() if p.requires_grad]]


@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "f2+l2"},
        pytest.param({"positions": "all", "intervention": "direft", "gate": True}, marks=pytest.mark.slow),
        {"positions": "l2", "runtime_config": LoReftRuntimeConfig(untouched_prompt="on")},
    ],
    ids=["f2+l2", "all, gated direft", "the untouched prompt"],
)
def test_a_model_trains(settings):
    expected = train(adapted(**settings), BATCH)
    with MAC():
        found = train(MAC.take_module(adapted(**settings)), {name: MAC.take(tensor) for name, tensor in BATCH.items()})
        assert all(tensor.device == MAC.device for tensor in found)
        found = [tensor.cpu() for tensor in found]
    torch.testing.assert_close(found, expected)


def test_a_model_generates():
    prompt = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    settings = dict(max_new_tokens=4, do_sample=False)
    expected = adapted(positions="f2+l2+g1").eval().generate(**prompt, **settings)
    with MAC():
        model = MAC.take_module(adapted(positions="f2+l2+g1")).eval()
        found = model.generate(**{name: MAC.take(tensor) for name, tensor in prompt.items()}, **settings).cpu()
    assert torch.equal(found, expected)
