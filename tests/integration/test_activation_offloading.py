"""TRL's `activation_offloading`: what autograd saves is moved to the CPU's memory, and comes back in the backward.

TRL moves what is on an accelerator. Here the CPU stands in for one, so TRL's own code copies each tensor, gives its
copy back once, and forgets it: a backward that asked twice for what it saved would raise.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import SIZES, build, randomise
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer import dpo_trainer, kto_trainer, reward_trainer, sft_trainer

from peft_reft import LoReftConfig, LoReftRuntimeConfig

from .conftest import PAIRS
from .training import WARNINGS, arguments, losses, trainable

pytestmark = WARNINGS

OTHERS = "Trainers: preferences and reinforcement"


class Stream(torch.cpu.Stream):
    def synchronize(self):
        pass


class Tracker(dict):
    """Counts the tensors that were copied, among those that autograd saved, and those that came back."""

    copied = came_back = 0

    def __setitem__(self, key, value):
        self.copied += value[1]
        super().__setitem__(key, value)

    def __delitem__(self, key):
        self.came_back += self[key][1]
        super().__delitem__(key)


@pytest.fixture
def trackers(monkeypatch):
    """Return the `Tracker` of each trainer that is made with `activation_offloading=True`."""
    made = []
    stream = Stream()
    device = SimpleNamespace(
        Stream=Stream, stream=torch.cpu.stream, current_stream=lambda: stream, empty_cache=lambda: None
    )

    def on_a_cpu(model):
        with monkeypatch.context() as patched:
            patched.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
            patched.setattr(torch, "get_device_module", lambda *_: device)
            manager = get_act_offloading_ctx_manager(model, use_pin_memory=False, min_offload_size=1)
        manager.tracker = Tracker()
        made.append(manager.tracker)
        return manager

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)  # a CPU has none
    for module in (sft_trainer, dpo_trainer, kto_trainer, reward_trainer):
        monkeypatch.setattr(module, "get_act_offloading_ctx_manager", on_a_cpu)
    return made


TRAINERS = {
    "SFT": (SFTTrainer, SFTConfig, lambda n: {"completion": f" {PAIRS[n][1]}"}),
    "DPO": (DPOTrainer, DPOConfig, lambda n: {"chosen": f" {PAIRS[n][1]}", "rejected": f" {PAIRS[n - 1][1]}"}),
    "KTO": (KTOTrainer, KTOConfig, lambda n: {"completion": f" {PAIRS[n][1]}", "label": n % 2 == 0}),
    "Reward": (RewardTrainer, RewardConfig, lambda n: {"chosen": f" {PAIRS[n][1]}", "rejected": " 0 0"}),
}


def model_of(which):
    if which != "Reward":
        return build("llama")
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))


@pytest.mark.parametrize(
    "which, positions",
    [
        pytest.param("SFT", "f2+l2", marks=pytest.mark.cell("Trainers: SFT", "`activation_offloading=True`")),
        pytest.param("SFT", "l2+g", marks=pytest.mark.cell("Training in two parts", "`activation_offloading=True`")),
        *(
            pytest.param(
                which,
                "f2+l2",
                marks=[pytest.mark.slow, pytest.mark.cell(OTHERS, "{which}: `activation_offloading=True`")],
            )
            for which in ("DPO", "KTO", "Reward")
        ),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_it_changes_nothing(which, positions, checkpointing, trackers, tokenizer, tmp_path):
    trainer, config, answers = TRAINERS[which]
    rows = Dataset.from_list([{"prompt": prompt, **answers(n)} for n, (prompt, _) in enumerate(PAIRS)])
    results = []
    for offloads in (False, True):
        runtime = LoReftRuntimeConfig(untouched_prompt="off" if positions == "f2+l2" else "on")
        task = "SEQ_CLS" if which == "Reward" else "CAUSAL_LM"
        settings = dict(per_device_train_batch_size=4, activation_checkpointing=checkpointing)
        made = trainer(
            model_of(which),
            args=arguments(config, tmp_path, activation_offloading=offloads, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoReftConfig(task_type=task, r=4, positions=positions, runtime_config=runtime),
        )
        randomise(made.model)
        made.train()
        results.append((losses(made), trainable(made.model)))
    (tracker,) = trackers
    assert tracker.copied >= tracker.came_back > 30  # what only metrics read does not come back
    (plain, weights), (offloaded, others) = results
    assert plain == offloaded and weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
