"""Trainers, unchanged, under their own defaults: two parts give the losses, metrics and weights of one."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from conftest import build, randomise
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_reft import DataCollatorForLoReft, LoReftConfig, LoReftRuntimeConfig
from peft_reft.tuner import two_parts
from peft_reft.tuner.beginnings import Beginnings
from peft_reft.tuner.forward import ATTRIBUTE

from .conftest import PAIRS
from .training import WARNINGS, arguments, checkpoints, trainable

pytestmark = WARNINGS

COMPLETIONS = [completion for _, completion in PAIRS]
LONG = [(f"a b c d e f g h {prompt}", completion) for prompt, completion in PAIRS]

PROMPTS = Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in LONG])
PREFERRED = Dataset.from_list(
    [{"prompt": p, "chosen": f" {c}", "rejected": f" {COMPLETIONS[(n + 1) % 8]}"} for n, (p, c) in enumerate(LONG)]
)
JUDGED = Dataset.from_list(
    [{"prompt": p, "completion": f" {c}", "label": n % 2 == 0} for n, (p, c) in enumerate(LONG)]
)
ONLINE = Dataset.from_list([{"prompt": p} for p, _ in LONG])
CHATS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in LONG]
)


def alternating(completions, **kwargs):
    return [float(n % 2) for n in range(len(completions))]


ROLLOUTS = dict(num_generations=2, max_completion_length=5, beta=0.1)
TRAINERS = {
    "SFT": (SFTTrainer, SFTConfig, PROMPTS, {}, {}),
    "SFT, plain": (SFTTrainer, SFTConfig, PROMPTS, dict(activation_checkpointing=False), {}),
    "SFT, accumulation": (SFTTrainer, SFTConfig, PROMPTS, dict(gradient_accumulation_steps=2), {}),
    "SFT, rows of one step": (SFTTrainer, SFTConfig, PROMPTS, dict(per_device_train_batch_size=1), {}),
    "SFT, whole chats": (SFTTrainer, SFTConfig, CHATS, {}, {}),
    "SFT, DFT loss": (SFTTrainer, SFTConfig, PROMPTS, dict(loss_type="dft"), {}),
    "SFT, evaluation": (SFTTrainer, SFTConfig, PROMPTS, dict(eval_strategy="steps", eval_steps=1), {}),
    "DPO": (DPOTrainer, DPOConfig, PREFERRED, {}, {}),
    "KTO": (KTOTrainer, KTOConfig, JUDGED, {}, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, ONLINE, ROLLOUTS, dict(reward_funcs=alternating)),
    "RLOO": (RLOOTrainer, RLOOConfig, ONLINE, ROLLOUTS, dict(reward_funcs=alternating)),
}


@pytest.fixture
def cuts(monkeypatch):
    """The splits of all forwards that were cut."""
    found = []
    original = two_parts.cut_in_two

    def spied(parts, split, *args):
        found.append(split)
        return original(parts, split, *args)

    monkeypatch.setattr("peft_reft.tuner.untouched.cut_in_two", spied)
    return found


TIMES = ("_runtime", "_per_second", "step_time", "total_flos")


def logged(trainer):
    """All that the trainer logged but times."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_alike(two, one):
    (logs, weights), (expected_logs, expected) = two, one
    assert len(logs) == len(expected_logs) and logs
    for entry, wanted in zip(logs, expected_logs):
        assert entry == pytest.approx(wanted, rel=2e-3, abs=2e-4)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=3e-4, msg=name)


@pytest.mark.parametrize("which", TRAINERS)
@pytest.mark.cell("Training in two parts", "{which}")
def test_a_trainer_of_trl(which, tokenizer, tmp_path, cuts):
    trainer_class, config_class, data, settings, more = TRAINERS[which]
    results = {}
    for mode in ("off", "on"):
        torch.manual_seed(0)
        base = build("llama")
        base.generation_config.eos_token_id = [2, *range(48, 64)]
        runtime = LoReftRuntimeConfig(untouched_prompt=mode)
        positions = "l2" if which != "DPO" else "l2+g"
        arguments_of = {"max_grad_norm": 0.0, "per_device_train_batch_size": 4, "max_steps": 3, **settings}
        if "eval_strategy" in settings:
            more = {**more, "eval_dataset": data}
        trainer = trainer_class(
            base,
            args=arguments(config_class, tmp_path, **arguments_of),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions, runtime_config=runtime),
            **more,
        )
        randomise(trainer.model)
        assert bool(checkpoints(trainer.args)) is (which != "SFT, plain")  # TRL's default is on
        trainer.train()
        assert bool(cuts) is (mode == "on")
        results[mode] = logged(trainer), trainable(trainer.model)
    assert_alike(results["on"], results["off"])


def test_what_was_kept_is_dropped_when_training_ends(tokenizer, tmp_path, monkeypatch):
    sizes = []
    keep = Beginnings.keep

    def spied(beginnings, beginning):
        keep(beginnings, beginning)
        sizes.append(len(beginnings))

    monkeypatch.setattr(Beginnings, "keep", spied)
    system = " ".join("abcdefghij" * 2)
    data = Dataset.from_list([{"prompt": f"{system} {p}", "completion": f" {c}"} for p, c in PAIRS])
    runtime = LoReftRuntimeConfig(untouched_prompt="on")
    trainer = SFTTrainer(
        build("llama"),
        args=arguments(SFTConfig, tmp_path),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoReftConfig(task_type="CAUSAL_LM", r=4, positions="l2", runtime_config=runtime),
    )
    trainer.train()
    assert sizes and sizes[-1] == 1
    assert len(getattr(trainer.model.get_base_model(), ATTRIBUTE).beginnings) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_of_transformers(smoothing, tmp_path, tokenizer, cuts):
    """With label smoothing the labels stay with the Trainer: the collator gives the positions."""
    rows = []
    for prompt, completion in LONG:
        prompt, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {completion}")["input_ids"]
        rows.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})

    def collate(features):
        width = max(len(feature["input_ids"]) for feature in features)
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for feature in features:
            length = len(feature["input_ids"])
            batch["input_ids"].append(feature["input_ids"] + [0] * (width - length))
            batch["labels"].append(feature["labels"] + [-100] * (width - length))
            batch["attention_mask"].append([1] * length + [0] * (width - length))
        return {name: torch.tensor(value) for name, value in batch.items()}

    results = {}
    for mode in ("off", "on"):
        runtime = LoReftRuntimeConfig(untouched_prompt=mode)
        config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="l2", runtime_config=runtime)
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), config)
        randomise(model)
        args = arguments(
            TrainingArguments, tmp_path, label_smoothing_factor=smoothing, per_device_train_batch_size=4, max_steps=3
        )
        trainer = Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForLoReft(collate, config))
        trainer.train()
        assert bool(cuts) is (mode == "on")
        results[mode] = logged(trainer), trainable(trainer.model)
    assert_alike(results["on"], results["off"])
