"""On an accelerator: every tensor is on its device, and the host waits for it no more often than the pages say.

This machine has none; `stand_in.py` plays it. `make test-gpu` runs the like on a card (tests/gpu).
"""

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model
from stand_in import Device

from peft_reft import DataCollatorForLoReft, LoReftConfig, LoReftRuntimeConfig

CARD = Device("cuda")
IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
IDS[:, :24] = IDS[0, :24]  # both rows begin alike
WHOLE = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "labels": torch.where(torch.arange(40) < torch.tensor([[30], [28]]), -100, IDS),
}
REAL = torch.arange(40) >= torch.tensor([[5], [0]])
PADDED = {
    "input_ids": IDS,
    "attention_mask": REAL.long(),
    "labels": torch.where(REAL, WHOLE["labels"], -100),
}
PACKED = {
    "input_ids": IDS,
    "position_ids": torch.arange(40).remainder(20).repeat(2, 1),
    "labels": torch.where(torch.arange(40).remainder(20) < 8, -100, IDS),
}
ON = LoReftRuntimeConfig(untouched_prompt="on")


def config(**kwargs):
    rank = {} if kwargs.get("intervention") == "red" else {"r": 4}
    return LoReftConfig(**{"task_type": "CAUSAL_LM", "positions": "f2+l2", **rank, **kwargs})


def adapted(**kwargs):
    model = get_peft_model(build("llama"), config(**kwargs))
    randomise(model)
    return model


def collated(batch, **kwargs):
    return DataCollatorForLoReft(dict, config(**kwargs))(batch)


def train(model, batch, steps):
    """Losses and gradients of all steps, and what the host read in the last forward and in the last backward."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        CARD.reads.clear()
        loss = model.train()(**batch).loss
        forward = len(CARD.reads)
        loss.backward()
        backward = len(CARD.reads) - forward
        found += [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]
    return [tensor.cpu() for tensor in found], forward, backward


def trained_on_card(model, batch, steps):
    with CARD():
        there = {name: CARD.take(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        return train(CARD.take_module(model), there, steps)


CASES = {
    "f2+l2": ({}, WHOLE, 1),
    "the collator's positions": ({}, collated(WHOLE), 0),
    "padding on the left": ({}, PADDED, 1),
    "packed": ({}, PACKED, 1),
    "packed, the collator's positions": ({}, collated(PACKED), 0),
    "all": ({"positions": "all"}, WHOLE, 0),
    "a gate": ({"gate": True, "positions": "l2+g"}, WHOLE, 1),
    "red": ({"intervention": "red"}, WHOLE, 1),
    "an activation": ({"intervention": "noreft", "act_fn": "relu"}, WHOLE, 1),
    "marks": ({"response_template": [[5]], "instruction_template": [[4]], "positions": "l2"}, WHOLE, 1),
    "subspaces": ({}, {**collated(WHOLE), "subspaces": torch.tensor([[0, 1], [2, -1]])}, 0),
}
QUICK = {"f2+l2", "the collator's positions", "packed"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_training(name):
    settings, batch, reads = CASES[name]
    expected, *_ = train(adapted(**settings), batch, 1)
    _, of_base, _ = trained_on_card(build("llama").requires_grad_(), {n: batch[n] for n in batch if n in PADDED}, 1)
    found, forward, backward = trained_on_card(adapted(**settings), batch, 1)
    torch.testing.assert_close(found, expected)
    assert (forward - of_base * ("attention_mask" in batch), backward) == (reads, 0), CARD.reads


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["shared", "padded"])
def test_training_in_two_parts(padded):
    """Each row's columns and the weights' fingerprint are read; what transformers reads of a mask is on top."""
    batch = PADDED if padded else WHOLE
    expected, *_ = train(adapted(positions="l2"), batch, 2)
    found, forward, _ = trained_on_card(adapted(positions="l2", runtime_config=ON), collated(batch, positions="l2"), 2)
    torch.testing.assert_close(found, expected)
    assert forward <= 2 + padded, CARD.reads


def two_adapters():
    model = adapted()
    model.add_adapter("b", config(positions="l1+g"))
    randomise(model)
    return model


@pytest.mark.parametrize(
    "make, settings",
    [
        (adapted, {}),
        pytest.param(lambda: adapted(positions="all"), {}, marks=pytest.mark.slow),
        pytest.param(adapted, {"num_beams": 2}, marks=pytest.mark.slow),
        pytest.param(two_adapters, {"adapter_names": ["default", "b"]}, marks=pytest.mark.slow),
        pytest.param(adapted, {"cache_implementation": "static", "disable_compile": True}, marks=pytest.mark.slow),
    ],
    ids=["f2+l2", "all", "beams", "an adapter for each row", "static cache"],
)
def test_a_decode_step_waits_for_nothing(make, settings):
    prompt = {name: WHOLE[name][:, :12] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    expected = make().eval().generate(**prompt, **settings)
    reads = []
    with CARD():
        model = CARD.take_module(make()).eval()
        base = model.get_base_model()
        base.register_forward_pre_hook(lambda *_: reads.append(-len(CARD.reads)), prepend=True)
        base.register_forward_hook(lambda *_: reads.append(reads.pop() + len(CARD.reads)))
        found = model.generate(**{name: CARD.take(tensor) for name, tensor in prompt.items()}, **settings).cpu()
    assert torch.equal(found, expected)
    assert len(reads) == 4 and not any(reads[1:]), reads
