"""`vllm_mode="colocate"`: rollouts come from the policy as it is, to the last digit that the engine allows."""

import pytest
from integration.training import WARNINGS, assert_all_moved

from peft_reft import LoReftConfig

from .trainers import PLAIN, Watch, make

pytestmark = WARNINGS

SPECS = {
    "f7+l7": dict(positions="f7+l7", r=4),
    "l7+g": dict(positions="l7+g", r=4),
    "all": dict(positions="all", r=4),
    "bias": dict(positions="f2+l2", intervention="bias"),
}


def config(spec, **more):
    return LoReftConfig(task_type="CAUSAL_LM", **{**SPECS[spec], **more})


@pytest.mark.parametrize("which", ["GRPO", "RLOO"])
def test_each_rollout_comes_from_the_policy(which, folder, tokenizer, tmp_path, monkeypatch):
    with make(which, folder, tokenizer, config("f7+l7"), PLAIN, tmp_path, max_steps=3, learning_rate=0.05) as trainer:
        watch = Watch(trainer, monkeypatch)
        assert_all_moved(trainer.model, trainer.train)
    assert len(watch.different) >= 3 * 4
    assert max(watch.different) < 1e-4
    assert min(watch.from_base) > 1e-2
    assert len(watch.from_last) >= 2 * 4 and min(watch.from_last) > 1e-2
