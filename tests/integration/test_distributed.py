"""Two processes on one CPU (gloo) get the gradients and the adapter of one process."""

import forked
import pytest
import torch
from conftest import build
from peft import PeftModel
from safetensors.torch import save_file

from peft_reft import LoReftConfig

from . import layouts

SCENARIOS = [
    "ddp",
    "ddp_tied",
    "ddp_checkpointing",
    "ddp_nothing",
    "fsdp",
    "fsdp_checkpointing",
    "fsdp_torch_checkpointing",
    "fsdp_nothing",
    "fsdp1_sent",
    "tensor_parallel",
    "ddp_untouched",
    "fsdp_untouched",
    "fsdp_untouched_checkpointing",
    "fsdp_untouched_torch_checkpointing",
    "fsdp_untouched_nothing",
    "fsdp_untouched_supervised",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a function from a scenario to what each rank returned. A rank's error fails the test that asks."""
    folder = tmp_path_factory.mktemp("ranks")
    build("llama").save_pretrained(folder / "base")
    processes = torch.multiprocessing.start_processes(
        layouts.run,
        args=(str(folder), layouts.free_port(), SCENARIOS),
        nprocs=layouts.WORLD,
        join=False,
        start_method=forked.METHOD,
    )
    done = layouts.finish(processes, 300)

    def results(name):
        files = [folder / f"{name}-{rank}.pt" for rank in range(layouts.WORLD)]
        assert all(file.exists() for file in files), f"{name} or one before it hung" if not done else name
        found = [torch.load(file, weights_only=True) for file in files]
        assert not any(isinstance(result, str) for result in found), "\n".join(map(str, found))
        return found

    return results


def assert_close(actual, expected, rtol=1e-4, atol=1e-6):
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("ddp", marks=pytest.mark.cell("Device layouts", "DDP, 2 processes")),
        pytest.param("ddp_tied", marks=pytest.mark.cell("Device layouts", 'DDP, `tie="model"`')),
        pytest.param("ddp_checkpointing", marks=pytest.mark.cell("Device layouts", "DDP, gradient checkpointing")),
        pytest.param("fsdp", marks=pytest.mark.cell("Device layouts", "FSDP2")),
        pytest.param(
            "fsdp_checkpointing", marks=pytest.mark.cell("Device layouts", "FSDP2, transformers' checkpointing")
        ),
        pytest.param(
            "fsdp_torch_checkpointing", marks=pytest.mark.cell("Device layouts", "FSDP2, torch's checkpoint wrapper")
        ),
    ],
)
def test_two_processes_train_as_one(results, scenario, monkeypatch):
    # Where processes train together the parameter of R may be a shard, which no forward may write to: it is brought
    # back to the manifold for computing alone, and takes a slightly other path. The same rule for the one process.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = layouts.adapted(tie="model" if scenario == "ddp_tied" else "layer")
    gradients, adapter = layouts.train(model, layouts.batch())
    for found in results(scenario):
        assert_close(found[0], gradients)
        assert_close(found[1], adapter, atol=1e-4)


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("ddp_untouched", marks=pytest.mark.cell("Training in two parts", "DDP, 2 processes")),
        pytest.param("fsdp_untouched", marks=pytest.mark.cell("Training in two parts", "FSDP2")),
        pytest.param(
            "fsdp_untouched_checkpointing",
            marks=pytest.mark.cell("Training in two parts", "FSDP2, transformers' checkpointing"),
        ),
        pytest.param(
            "fsdp_untouched_torch_checkpointing",
            marks=pytest.mark.cell("Training in two parts", "FSDP2, torch's checkpoint wrapper"),
        ),
    ],
)
def test_two_processes_train_in_two_parts_as_one_does_in_one(results, scenario, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    gradients, adapter = layouts.train(layouts.adapted(positions="l2"), layouts.batch())
    for found in results(scenario):
        assert_close(found[0], gradients)
        assert_close(found[1], adapter, atol=1e-4)


def test_a_rank_without_an_untouched_token_holds_up_no_other(results, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    positions = torch.tensor([[5, 6], [2, 3], [0, 1], [0, 1]])
    inputs = layouts.batch() | {"intervention_positions": positions}
    gradients, adapter = layouts.train(layouts.adapted(positions="l2"), inputs)
    for found in results("fsdp_untouched_nothing"):
        assert_close(found[0], gradients)
        assert_close(found[1], adapter, atol=1e-4)


def test_ranks_run_as_many_forwards_whatever_is_supervised(results):
    """One process alone would cut its backbone instead, which another rank would wait for."""
    first, second = results("fsdp_untouched_supervised")
    assert_close(second[0], first[0])
    assert_close(second[1], first[1])


@pytest.mark.cell("Device layouts", "DDP and FSDP2, a rank whose batch edits nothing")
@pytest.mark.parametrize("scenario", ["ddp_nothing", "fsdp_nothing"])
def test_a_rank_that_edits_nothing_holds_up_no_other(results, scenario):
    gradients, _ = layouts.train(layouts.adapted(), layouts.batch(0))
    first, second = results(scenario)
    assert_close(first[0], {name: gradient / layouts.WORLD for name, gradient in gradients.items()})
    assert_close(second[0], first[0])
    assert_close(second[1], first[1])


@pytest.mark.cell("Device layouts", "FSDP2: full state dict saved, loaded in one process")
@pytest.mark.parametrize("scenario", ["fsdp", "fsdp_checkpointing", "fsdp_torch_checkpointing"])
def test_a_sharded_adapter_is_saved_whole(results, scenario, tmp_path):
    _, _, logits, saved, _ = results(scenario)[0]
    names = {name.replace(".default", "") for name in layouts.train(layouts.adapted(), layouts.batch(), steps=1)[1]}
    assert set(saved) == names
    for name, tensor in saved.items():
        if name.endswith(".R"):
            torch.testing.assert_close(tensor @ tensor.mT, torch.eye(4), atol=1e-5, rtol=0)
    LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2").save_pretrained(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in saved.items()}, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**layouts.batch()).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.cell("Device layouts", "FSDP2: what rollouts in vLLM are sent")
@pytest.mark.parametrize("scenario", ["fsdp", "fsdp_torch_checkpointing"])
def test_every_rank_sends_the_whole_adapter(results, scenario):
    first, second = results(scenario)
    assert_close(first[4], first[3], rtol=0, atol=0)
    assert_close(second[4], first[3], rtol=0, atol=0)


@pytest.mark.cell("Device layouts", "FSDP1: what rollouts in vLLM are sent")
def test_every_rank_of_fsdp1_sends_the_whole_adapter(results):
    expected = layouts.sent(layouts.adapted())
    for found in results("fsdp1_sent"):
        assert_close(found[0], expected, rtol=0, atol=0)


@pytest.mark.cell("Device layouts", 'tensor parallel (`tp_plan="auto"`)')
def test_tensor_parallel_plans_are_left_alone(results, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = layouts.adapted()
    gradients, adapter = layouts.train(model, layouts.batch())
    with torch.no_grad():
        logits = model.eval()(**layouts.batch()).logits
    for found in results("tensor_parallel"):
        assert_close(found[0], gradients)
        assert_close(found[1], adapter, atol=1e-4)
        torch.testing.assert_close(found[2], logits, atol=1e-4, rtol=1e-4)
