"""What the tests of a card share. `make test-gpu` runs them; with PEFT_REFT_GPU_DEVICE=cpu they need no card."""

import os

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model

from peft_reft import DataCollatorForLoReft, LoReftConfig

VARIABLE = "PEFT_REFT_GPU_DEVICE"


def pytest_configure(config):
    name = os.environ.get(VARIABLE, "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"No card is found. {VARIABLE}=cpu runs the logic of these tests on the CPU.")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))  # kernels and drivers have their own to say


def pytest_report_header():
    return f"card: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "card: none, on the CPU"


@pytest.fixture(scope="session")
def device():
    return torch.device(os.environ.get(VARIABLE, "cuda"))


@pytest.fixture(autouse=True)
def _compiles_anew():
    torch._dynamo.reset()


PROMPTS = (15, 13)


def batch(seed=0, device="cpu", seq=20):
    """Two rows of prompt and answer."""
    ids = torch.randint(3, VOCAB, (2, seq), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(seq) < torch.tensor(PROMPTS).unsqueeze(1), -100, ids)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in rows.items()}


def config(**kwargs):
    rank = {} if kwargs.get("intervention") == "red" else {"r": 4}
    return LoReftConfig(**{"task_type": "CAUSAL_LM", "positions": "f2+l2", **rank, **kwargs})


def adapted(base=None, autocast_adapter_dtype=True, **kwargs):
    """A tiny Llama with an adapter whose edits can be seen."""
    base = build("llama") if base is None else base
    model = get_peft_model(base, config(**kwargs), autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(model)
    return model


def collated(rows, **kwargs):
    """`rows` with the collator's positions."""
    return DataCollatorForLoReft(dict, config(**kwargs))(rows)


def step(model, rows):
    """Loss and gradients of a training step, on the CPU in fp32."""
    model.zero_grad()
    loss = model.train()(**rows).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.detach().float().cpu() for name, tensor in {"loss": loss, **found}.items()}


def assert_close(found, expected, relative):
    """Each tensor differs by at most that share of the largest number of the expected one."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= relative * tensor.abs().max() + 1e-7, name
