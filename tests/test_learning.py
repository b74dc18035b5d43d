"""A run that does not learn is told so, at its end; a run that learns never is."""

import math
import warnings
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from conftest import VOCAB, build
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_reft import LoReftConfig
from peft_reft.integrations import not_learning
from peft_reft.integrations.learning import Verdict, judge, judge_classes, judge_finite

STEPS = (60, 100, 200, 400, 1000)


def curve(shape, part):
    """How much of its fall a loss has behind it at parts of a run, from 0 to 1."""
    if shape == "line":
        return part
    if shape == "late":
        return np.maximum(0.0, (part - 0.5) * 2)
    return 1 - np.exp(-part / shape)


def noisy(losses, noise, rng):
    return (losses * (1 + noise * rng.standard_normal(len(losses)))).tolist()


@pytest.mark.parametrize(
    "shape, fall", [(0.03, 0.5), (0.03, 0.9), *product([0.1, 0.3, 1, "line", "late"], [0.1, 0.4, 0.9])]
)
def test_a_run_that_learns_is_never_told_that_it_does_not(shape, fall):
    """Falls from a tenth to nine tenths, early, late or steady, with little or much noise.

    A small fall in the first steps of a noisy run is in no loss. A Trainer sees it without the edits.
    """
    rng = np.random.default_rng(0)
    for _ in range(150):
        steps, noise, start = rng.choice(STEPS), rng.uniform(0.0, min(0.3, fall / 3)), rng.uniform(0.3, 6)
        warmup = round(rng.choice([0, 0.03, 0.1]) * steps)
        clean = start * (1 - fall * curve(shape, np.arange(steps) / steps))
        assert judge(noisy(clean, noise, rng), warmup) is None, (steps, noise, start, warmup)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_a_flat_run_is_told_to_raise_the_rate(noise):
    """With noise one of four may stay silent: it looks as if its first steps had been higher."""
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(60):
        verdict = judge(noisy(np.full(rng.choice(STEPS), 2.0), noise, rng), warmup=6)
        told += verdict is not None
        assert verdict is None or (not verdict.rate_is_too_high and "first quarter" in verdict.why)
    assert told >= (60 if noise == 0 else 45)


def test_a_run_that_begins_converged_is_left_alone():
    rng = np.random.default_rng(0)
    for level in (0.0, 1e-4, 0.01, 0.05):
        for _ in range(20):
            losses = (level * np.exp(0.5 * rng.standard_normal(200))).tolist()
            assert judge(losses, warmup=20) is None
            assert judge_classes(losses, 20, Counter({0: 799, 1: 1}), Counter({0: 800})) is None


def test_all_that_is_learned_in_the_warmup_counts():
    assert judge([2.0 - 0.15 * step for step in range(10)] + [0.5] * 190, warmup=20) is None
    assert judge([2.0] + [0.5] * 199, warmup=20) is None


def test_short_runs_are_not_judged():
    assert judge([2.0] * 59, warmup=10) is None
    assert judge([2.0] * 60, warmup=10) is not None
    assert judge([], warmup=0) is None


def test_a_loss_that_rises_wants_a_lower_rate():
    verdict = judge([2.0] * 10 + [2.0 + 0.1 * step for step in range(90)], warmup=10)
    assert verdict.rate_is_too_high and "2 at the start" in verdict.why
    destroyed = [2.3] * 6 + [8.0] * 14 + [8 - 0.04 * step for step in range(80)]  # it falls, and stays above its start
    assert judge(destroyed, warmup=5).rate_is_too_high


def test_a_flat_loss_behind_a_jump_wants_a_lower_rate():
    assert judge([2.0] * 10 + [9.0] * 6 + [2.0] * 184, warmup=20).rate_is_too_high


def test_a_loss_that_is_no_number_any_more():
    nan = math.nan
    assert judge([2.0, 1.9, *[nan] * 5], warmup=0).why == "its loss is not a finite number since step 3"
    assert judge([2.0, *[math.inf] * 5], warmup=0).rate_is_too_high
    assert judge_finite([2.0, 1.9, *[nan] * 4]) is None
    assert judge_finite([2.0, *[nan] * 9, 1.9]) is None
    assert judge_finite([nan] * 20) is None  # it never was: no learning rate does that
    some = [nan if step % 7 == 3 else 2.0 - 0.01 * step for step in range(150)]
    assert judge(some, warmup=10) is None


def test_a_classifier_that_knows_frequencies_alone():
    half, guesses = Counter({0: 160, 1: 160}), Counter({1: 320})
    losses = [1.5 * 0.9**step + 0.6935 for step in range(80)]  # the head forgets its random start, and that is all
    assert judge(losses, 8) is None
    verdict = judge_classes(losses, 8, half, guesses)
    assert not verdict.rate_is_too_high and "0.6931" in verdict.why and "320" in verdict.why
    assert judge_classes(losses, 8, half, Counter({0: 1, 1: 319})) is None
    assert (
        judge_classes([loss - 0.01 for loss in losses], 8, half, guesses) is None
    )  # below the entropy: it knows more
    assert judge_classes(losses, 8, Counter({1: 320}), guesses) is None
    assert judge_classes(losses, 8, Counter({0: 40, 1: 40}), Counter({1: 80})) is None
    rare = Counter({0: 304, 1: 16})  # 95 % of one class: entropy 0.1985
    assert judge_classes([0.19] * 80, 8, rare, Counter({0: 320})) is None
    assert judge_classes([0.2] * 80, 8, rare, Counter({0: 320})) is not None
    jumped = [0.7] * 8 + [6.0] * 10 + [0.7] * 62
    assert judge_classes(jumped, 8, half, guesses).rate_is_too_high


IDS = torch.randint(3, VOCAB, (64, 6), generator=torch.Generator().manual_seed(8))
LABELS = IDS.masked_fill(torch.arange(6) < 3, -100)
ROWS = [{"input_ids": row, "labels": labels} for row, labels in zip(IDS[:4], LABELS)]
TEXTS = [{"input_ids": row, "label": number % 3} for number, row in enumerate(IDS)]


def warned_by(trainer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(each.message) for each in caught if "does not learn" in str(each.message)]


def trainer(folder, task="CAUSAL_LM", rows=ROWS, kind=Trainer, model=None, callbacks=(), **settings):
    if model is None:
        config = LoReftConfig(task_type=task, r=2, positions="f2+l2")
        model = get_peft_model(build("llama" if task == "CAUSAL_LM" else "bert"), config)
    settings = {"per_device_train_batch_size": 4, "max_steps": 60, "learning_rate": 1e-9, **settings}
    args = TrainingArguments(
        str(folder), save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, **settings
    )
    return kind(model=model, args=args, train_dataset=rows, callbacks=[*callbacks])


def test_a_trainer_says_it_once_at_the_end(tmp_path):
    (message,) = warned_by(trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2))
    assert message.startswith("LoReFT: this run does not learn: behind the warm-up its loss was 4.")
    assert message.endswith("Raise the learning rate, 1e-09, about threefold: 3e-09.")


def test_a_trainer_that_learns_is_quiet(tmp_path):
    training = trainer(tmp_path, learning_rate=3e-2)
    assert warned_by(training) == []
    assert training.state.log_history[-1]["train_loss"] < 4
    assert warned_by(training) == []  # what goes on from there may be flat
    assert not training.model._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("rate, warns", [(3e-2, False), (1e-9, True)])
def test_what_the_losses_do_not_show_is_seen_without_the_edits(tmp_path, monkeypatch, rate, warns):
    """As if all had been learned in the first steps of a noisy run."""
    monkeypatch.setattr(
        not_learning, "judge", lambda *_: Verdict("it is flat", rate_is_too_high=False, needs_a_look=True)
    )
    training = trainer(tmp_path, learning_rate=rate)
    assert [message[:50] for message in warned_by(training)] == [
        "LoReFT: this run does not learn: it is flat. Raise"
    ] * warns
    assert training.model.training
    assert all(parameter.requires_grad for name, parameter in training.model.named_parameters() if "loreft" in name)


@pytest.mark.slow
def test_a_classifier_of_one_class_is_told(tmp_path):
    model = get_peft_model(build("bert"), LoReftConfig(task_type="SEQ_CLS", r=2, positions="f2+l2"))
    with torch.no_grad():  # any text gets class 1
        head = model.base_model.model.classifier
        for parameter in head.parameters():
            parameter.zero_()
        head.modules_to_save.default.bias.copy_(torch.tensor([0.0, 0.5, 0.0]))
    (message,) = warned_by(trainer(tmp_path, rows=TEXTS, model=model, max_steps=80, per_device_train_batch_size=16))
    assert "Raise the learning rate" in message


@pytest.mark.slow
def test_weights_that_break_are_told_of_in_the_middle(tmp_path):
    said = []

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            said.append(len(caught))
            if state.global_step == 20:
                with torch.no_grad():
                    next(each for name, each in model.named_parameters() if name.endswith(".b")).fill_(math.nan)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=90, callbacks=[Breaks()]).train()
    (message,) = [str(each.message) for each in caught if "does not learn" in str(each.message)]
    assert "not a finite number since step 21" in message and "to a third: 3.3e-10" in message
    assert said[-1] > said[40]  # long before the end


class OwnLoss(Trainer):
    """Trains on something else than the loss that the model returns, as trainers of preferences do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).logits.float().pow(2).mean()


@pytest.mark.slow
def test_what_cannot_be_judged_is_not(tmp_path):
    assert warned_by(trainer(tmp_path, kind=OwnLoss)) == []
    assert warned_by(trainer(tmp_path, max_steps=50, warmup_steps=5)) == []
    assert warned_by(trainer(tmp_path, model=build("llama").train())) == []
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights="paper")
    assert warned_by(trainer(tmp_path, model=get_peft_model(build("llama"), config))) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.cell("Trainers: SFT", "a warning if a run does not learn")
def test_trl_is_told_too(tmp_path, model_id):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "a b c", "completion": " d e"}] * 8)
    args = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=60, learning_rate=1e-9, bf16=False, use_cpu=True, save_strategy="no"
    )
    args.report_to, args.disable_tqdm = [], True
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = trl.SFTTrainer(model_id, args, train_dataset=data, peft_config=config)
    (message,) = warned_by(training)
    assert "Raise the learning rate, 1e-09, about threefold" in message
