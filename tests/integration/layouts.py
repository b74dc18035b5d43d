"""Scenarios that two gloo processes run for `test_distributed.py`. Each rank writes its results to a file."""

import contextlib
import os
import socket
import time
import traceback
from types import SimpleNamespace

import torch
import torch.distributed as dist
from conftest import VOCAB, build, randomise
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from peft_reft import LoReftConfig, LoReftRuntimeConfig
from peft_reft.integrations.trl.policy import Policy

WORLD, STEPS, PROMPTS = 2, 5, (7, 4)


def batch(rank=None):
    """Return two rows for a rank. Ranks have equally many supervised tokens, so that the mean of means is the mean."""
    ids = torch.randint(3, VOCAB, (2 * WORLD, 12), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, : PROMPTS[row % 2]] = -100
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return rows if rank is None else {name: value[2 * rank : 2 * rank + 2] for name, value in rows.items()}


NOTHING = torch.full((2, 4), -1)


def adapted(**kwargs):
    config = LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **kwargs})
    model = get_peft_model(build("llama"), config)
    randomise(model)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sent(model, fsdp_version=None, zero_stage=0):
    """The tensors that TRL's rollouts in vLLM are sent, by the keys of a file."""
    plugin = None if fsdp_version is None else SimpleNamespace(fsdp_version=fsdp_version)
    deepspeed = None if not zero_stage else SimpleNamespace(zero_stage=zero_stage)
    state = SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=plugin)
    generation = object.__new__(VLLMGeneration)  # its constructor makes an engine
    generation.accelerator = SimpleNamespace(state=state, device=torch.device("cpu"))
    generation._dist = DistributedBackend(generation.accelerator)
    return load(Policy.of(model).files(generation).weights)


def train(model, inputs, call=None, steps=STEPS):
    """Train; return the whole gradients of the first step, and the whole adapter after the last."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model.train()
    first = None
    for _ in range(steps):
        (call or model)(**inputs).loss.backward()
        if first is None:
            first = {name: whole(p.grad).clone() for name, p in trainable.items()}
        optimizer.step()
        optimizer.zero_grad()
    names = {name: name.replace("_checkpoint_wrapped_module.", "") for name in trainable}
    return {names[n]: g for n, g in first.items()}, {names[n]: whole(p.detach()) for n, p in trainable.items()}


def ddp(rank, tie="layer"):
    model = adapted(tie=tie)
    return train(model, batch(rank), DistributedDataParallel(model))


def ddp_tied(rank):
    return ddp(rank, tie="model")


def ddp_nothing(rank):
    model = adapted()
    inputs = batch(rank) | ({"intervention_positions": NOTHING} if rank == 1 else {})
    return train(model, inputs, DistributedDataParallel(model))


def ddp_checkpointing(rank):
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return train(model, batch(rank), DistributedDataParallel(model))


def shard(base):
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base)


def fsdp(rank, checkpointing=None, **kwargs):
    model = adapted(**kwargs)
    base = model.get_base_model()
    if checkpointing == "transformers":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif checkpointing == "torch":
        blocks = {id(block) for block in base.model.layers}
        apply_activation_checkpointing(base, check_fn=lambda module: id(module) in blocks)
        assert any(isinstance(module, CheckpointWrapper) for module in base.modules())
    shard(base)
    gradients, adapter = train(model, batch(rank))
    model.eval()
    with torch.no_grad():
        logits = model(**batch()).logits
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    full = {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in full.items()}
    saved = get_peft_model_state_dict(model, state_dict=full) if rank == 0 else {}
    return gradients, adapter, logits, saved, sent(model, fsdp_version=2)


def fsdp1_sent(rank):
    """The first FSDP, whose blocks hold flat parameters."""
    model = adapted()
    base = model.get_base_model()
    for n, block in enumerate(base.model.layers):
        base.model.layers[n] = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))
    return (sent(model, fsdp_version=1),)


def fsdp_checkpointing(rank):
    return fsdp(rank, "transformers")


def fsdp_torch_checkpointing(rank):
    return fsdp(rank, "torch")


def fsdp_nothing(rank):
    model = adapted()
    shard(model.get_base_model())
    return train(model, batch(rank) | ({"intervention_positions": NOTHING} if rank == 1 else {}))


TWO_PARTS = dict(positions="l2", runtime_config=LoReftRuntimeConfig(untouched_prompt="on"))


def ddp_untouched(rank):
    model = adapted(**TWO_PARTS)
    return train(model, batch(rank), DistributedDataParallel(model))


def fsdp_untouched(rank):
    return fsdp(rank, **TWO_PARTS)


def fsdp_untouched_checkpointing(rank):
    return fsdp(rank, "transformers", **TWO_PARTS)


def fsdp_untouched_torch_checkpointing(rank):
    return fsdp(rank, "torch", **TWO_PARTS)


def fsdp_untouched_nothing(rank):
    """The second rank has no untouched token, and runs as many forwards all the same."""
    model = adapted(**TWO_PARTS)
    shard(model.get_base_model())
    first = torch.tensor([[0, 1]] * 2)
    return train(model, batch(rank) | ({"intervention_positions": first} if rank == 1 else {}))


def fsdp_untouched_supervised(rank):
    """The second rank is trained on every token, also on those before the first edited one."""
    model = adapted(**TWO_PARTS)
    shard(model.get_base_model())
    inputs = batch(rank) | {"intervention_positions": torch.tensor([[5, 6], [2, 3]])}
    if rank == 1:
        inputs["labels"] = inputs["input_ids"].clone()
    return train(model, inputs)


def tensor_parallel(rank):
    """Run the base model's own plan on two ranks. Between blocks each rank has the whole hidden states."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(os.environ["TP_FOLDER"], tp_plan="auto")
    assert any(isinstance(p, DTensor) or p.shape[0] < 48 for n, p in base.named_parameters() if "up_proj" in n)
    build("llama")  # the random numbers that `adapted` takes
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2"))
    randomise(model)
    gradients, adapter = train(model, batch())
    with torch.no_grad():
        logits = whole(model.eval()(**batch()).logits)
    return gradients, adapter, logits


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(processes, seconds):
    """Wait for all `processes` (of `spawn`); False if some did not end in time. Raises what one of them raised."""
    end = time.monotonic() + seconds
    try:
        while not (done := processes.join(timeout=1)) and time.monotonic() < end:
            pass
        return done
    finally:
        for process in processes.processes:
            process.kill()


def join(rank, port, **environment):
    """Set what a launcher tells a process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"LOCAL_RANK": str(rank), **environment}
    torch.set_num_threads(1)


def run(rank, folder, port, scenarios):
    join(rank, port, TP_FOLDER=f"{folder}/base")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for name in scenarios:
        torch.manual_seed(0)
        try:
            result = globals()[name](rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, f"{folder}/{name}-{rank}.pt")
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    dist.destroy_process_group()
