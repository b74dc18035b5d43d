"""ZeRO on two CPU processes: the same adapter as in one. `make test-extras` has DeepSpeed."""

import pytest
import torch
from integration import layouts

STAGES = [2, 3]


def train(rank, folder, port, stage):
    layouts.join(rank, port, DS_ACCELERATOR="cpu", LOCAL_SIZE=str(layouts.WORLD))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    model = layouts.adapted()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        # Of parameters this small ZeRO-3 would shard none.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    sharded = all(p.numel() == 0 for p in weights.values())
    for _ in range(layouts.STEPS):
        engine.backward(engine(**layouts.batch(rank)).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(weights.values())):
        adapter = {name: p.detach().clone() for name, p in weights.items()}
    torch.save((sharded, adapter, layouts.sent(model, zero_stage=stage)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "stage",
    [pytest.param(n, marks=pytest.mark.cell("Device layouts", f"DeepSpeed ZeRO-{n}, 2 processes")) for n in STAGES],
)
def test_two_processes_train_as_one(stage, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    processes = torch.multiprocessing.spawn(
        train, args=(str(tmp_path), layouts.free_port(), stage), nprocs=layouts.WORLD, join=False
    )
    assert layouts.finish(processes, 300), "the processes hung"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # see test_distributed.py
    _, expected = layouts.train(layouts.adapted(), layouts.batch())
    for rank in range(layouts.WORLD):
        sharded, adapter, sent = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert sharded == (stage == 3)
        assert adapter.keys() == expected.keys()
        assert sent.keys() == {name.replace(".default", "") for name in adapter}  # for rollouts in vLLM
        for name in adapter:
            if not name.endswith(".R"):  # in a file its rows are orthonormal
                assert torch.equal(sent[name.replace(".default", "")], adapter[name])
        for name, tensor in expected.items():
            torch.testing.assert_close(adapter[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
