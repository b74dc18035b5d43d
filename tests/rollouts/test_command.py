"""`peft-reft grpo --use_vllm true`: the command calls `rollouts_in_vllm` itself."""

import json

import trl
from integration.training import WARNINGS
from safetensors.torch import load_file

from peft_reft.cli import train
from peft_reft.integrations.trl import colocated, rollouts_in_vllm
from peft_reft_cli import main

from .trainers import ENGINE, PLAIN, shut_down

pytestmark = WARNINGS


def test_the_command_sends_the_adapter_alone(folder, tmp_path, monkeypatch):
    made, called, sent = [], [], []

    class Kept(trl.GRPOTrainer):
        """So that its engine can be ended."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    def for_tests():
        called.append(True)
        rollouts_in_vllm(**ENGINE)

    def send(inner, self, files):
        sent.append(files)
        inner(self, files)

    monkeypatch.setattr(trl, "GRPOTrainer", Kept)
    monkeypatch.setattr(train, "rollouts_in_vllm", for_tests)
    original = colocated.Colocated.send
    monkeypatch.setattr(colocated.Colocated, "send", lambda self, files: send(original, self, files))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, PLAIN)))
    (tmp_path / "my_rewards.py").write_text(
        "def alternating(completions, **kwargs):\n    return [float(n % 2) for n in range(len(completions))]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = {
        "model_name_or_path": folder,
        "dataset_name": "rows.jsonl",
        "output_dir": "out",
        "reward_funcs": "my_rewards.alternating",
        "use_vllm": "true",
        "vllm_mode": "colocate",
        "num_generations": "2",
        "per_device_train_batch_size": "8",
        "max_completion_length": "4",
        "max_steps": "2",
        "use_cpu": "true",
        "bf16": "false",
        "r": "2",
        "positions": "f2+l2",
    }
    try:
        assert main(["grpo", *(word for name, value in given.items() for word in (f"--{name}", value))]) == 0
    finally:
        for trainer in made:
            shut_down(trainer)
    assert called and len(sent) >= 2
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if name.endswith(".b"))
