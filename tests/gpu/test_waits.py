"""How often the host waits for a card. On a CPU a device is played (`stand_in.py`), whose reads are counted."""

import functools
import warnings

import pytest
import torch
from conftest import build
from peft import PeftModel
from stand_in import Device

from peft_reft import LoReftRuntimeConfig

from .conftest import adapted, batch, collated

CARD = Device("cuda")


class OnCard:
    """A card, whose waits torch reports as warnings."""

    def __init__(self, device):
        self.device = device

    def module(self, module):
        return module.to(self.device)

    def tensor(self, tensor):
        return tensor.to(self.device)

    def waits(self, run):
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing CUDA operation" in str(w.message)]


class Played:
    """A device that is played."""

    def module(self, module):
        return CARD.take_module(module)

    def tensor(self, tensor):
        return CARD.take(tensor)

    def waits(self, run):
        CARD.reads.clear()
        run()
        return list(CARD.reads)


@pytest.fixture
def place(device):
    if device.type == "cuda":
        yield OnCard(device)
        return
    with CARD():
        yield Played()


def waits_of_training(place, model, rows):
    """Waits of a training forward, and of its backward, after one that is not counted."""
    model = place.module(model).train()
    rows = {name: place.tensor(tensor) for name, tensor in rows.items()}
    losses = [model(**rows).loss]
    losses[0].backward()
    forward = place.waits(lambda: losses.append(model(**rows).loss))
    return forward, place.waits(losses[-1].backward)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ours, allowed", [(True, 0), (False, 1)], ids=["the collator's positions", "from the batch"])
def test_training(place, ours, allowed, checkpointing):
    models = [build("llama").requires_grad_(), adapted()]
    for model in models:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base = waits_of_training(place, models[0], batch())
    forward, backward = waits_of_training(place, models[1], collated(batch()) if ours else batch())
    assert len(forward) - len(base[0]) == allowed, forward
    assert len(backward) <= len(base[1]), backward


def test_training_in_two_parts(place):
    """The rows' columns and the weights' fingerprint are read; transformers reads the mask of each part."""
    base, _ = waits_of_training(place, build("llama").requires_grad_(), batch())
    model = adapted(positions="l2", runtime_config=LoReftRuntimeConfig(untouched_prompt="on"))
    forward, backward = waits_of_training(place, model, collated(batch(), positions="l2"))
    assert len(forward) <= 2 + 2 * len(base) and not backward, (forward, backward)


def waits_of_generating(place, model):
    """Waits of each forward of `generate`: the prefill, and three decode steps."""
    base = place.module(model).eval()
    base = base.get_base_model() if isinstance(base, PeftModel) else base
    prompt = {name: place.tensor(batch()[name]) for name in ("input_ids", "attention_mask")}
    forward, found = base.forward, []

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        outputs = []
        found.append(place.waits(lambda: outputs.append(forward(*args, **kwargs))))
        return outputs[0]

    base.forward = counted
    model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return found


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_a_decode_step(place, positions):
    """None of ours: as many as the base's own, which reads its mask."""
    of_base = waits_of_generating(place, build("llama"))
    found = waits_of_generating(place, adapted(positions=positions))
    assert len(found) == 4 and [len(each) for each in found[1:]] == [len(each) for each in of_base[1:]], found
