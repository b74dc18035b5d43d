"""Device maps, DDP and FSDP2 on a card, with one process."""

import pytest
import torch
from conftest import LAYERS, build
from integration import layouts
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from .conftest import adapted, assert_close, batch, step


@pytest.mark.parametrize("kind", ["auto", "every second block on the CPU"])
def test_device_map(kind, device, tmp_path):
    build("llama").save_pretrained(tmp_path)
    parts = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{n}" for n in range(LAYERS))]
    by_hand = {f"model.{part}": "cpu" if part.endswith(".1") else device for part in parts}
    by_hand["lm_head"] = device
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto" if kind == "auto" else by_hand)
    base.generation_config.eos_token_id = None
    model, expected = adapted(base).eval(), adapted().eval()
    prompt = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    there = {name: tensor.to(device) for name, tensor in prompt.items()}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**there, **settings).cpu(), expected.generate(**prompt, **settings))
    assert_close(step(model, batch(device=device)), step(expected, batch()), 1e-4)


@pytest.fixture
def process_group(device):
    backend = "nccl" if device.type == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{layouts.free_port()}"
    distributed.init_process_group(backend, init_method=address, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.filterwarnings("ignore")  # torch's and NCCL's own
def test_one_process_of_several(kind, checkpointing, device, process_group):
    gradients, weights = layouts.train(adapted(), batch())
    model = adapted().to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kind == "fsdp2":
        layouts.shard(model.get_base_model())
    call = DistributedDataParallel(model) if kind == "ddp" else None
    found = layouts.train(model, batch(device=device), call)
    on_cpu = [{name: tensor.detach().cpu() for name, tensor in each.items()} for each in found]
    assert_close(on_cpu[0], gradients, 1e-4)
    assert_close(on_cpu[1], weights, 1e-2)
