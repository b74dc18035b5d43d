"""A training run warns, by name, of trainable tensors that got no gradient in its first step."""

import warnings

import pytest
import torch
from conftest import VOCAB, build
from peft import get_peft_model
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from peft_reft import LoReftConfig
from peft_reft.integrations.trainer_checks import CheckGradients, warn_of_missing_gradients

IDS = torch.randint(3, VOCAB, (4, 6), generator=torch.Generator().manual_seed(8))
LABELS = IDS.masked_fill(torch.arange(6) < 3, -100)
ROWS = [{"input_ids": row, "labels": labels} for row, labels in zip(IDS, LABELS)]
HEAD_TOO = r".*layers\.\d+|lm_head"


def adapted(targets=None):
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", init_weights="paper", target_modules=targets)
    return get_peft_model(build("llama"), config)


class WithoutHead(Trainer):
    """Its loss multiplies by the head's weight itself, as fused losses do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        scores = hidden @ model.get_output_embeddings().weight.T
        return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def trainer(model, folder, kind=Trainer, **settings):
    settings = dict(per_device_train_batch_size=2, max_steps=3, use_cpu=True, report_to="none", **settings)
    args = TrainingArguments(output_dir=str(folder), save_strategy="no", disable_tqdm=True, **settings)
    own = [CheckGradients] if CheckGradients not in DEFAULT_CALLBACKS else []  # injection adds it there
    return kind(model=model, args=args, train_dataset=ROWS, callbacks=own)


def test_unmoved_tensors_are_named():
    model = adapted(HEAD_TOO)
    hidden = model(input_ids=IDS, labels=LABELS, output_hidden_states=True).hidden_states
    hidden[-1].sum().backward()
    with pytest.warns(UserWarning, match="^LoReFT: 3 of 12 trainable tensors got no gradient") as warned:
        warn_of_missing_gradients(model)
    message = str(warned[0].message)
    assert "base_model.model.lm_head.loreft.loreft_weights.default.R" in message and "layers.0" not in message


def test_nothing_is_said_of_what_moves():
    model = adapted()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    warn_of_missing_gradients(model)
    warn_of_missing_gradients(build("llama"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_says_it_once(tmp_path, accumulate):
    settings = dict(gradient_accumulation_steps=accumulate)
    training = trainer(adapted(HEAD_TOO), tmp_path, WithoutHead, **settings)
    with pytest.warns(UserWarning, match="lm_head.loreft") as warned:
        training.train()
    assert sum("got no gradient" in str(each.message) for each in warned) == 1
    with warnings.catch_warnings(record=True) as warned:  # a second run tells again
        warnings.simplefilter("always")
        training.train()
    assert sum("got no gradient" in str(each.message) for each in warned) == 1


def test_a_trainer_of_all_targets_is_quiet(tmp_path):
    trainer(adapted(HEAD_TOO), tmp_path).train()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_where_gradients_are_elsewhere_nothing_is_said(monkeypatch, name):
    model, check = adapted(), CheckGradients()
    state = TrainerState(is_world_process_zero=True)
    check.on_train_begin(None, state, None)
    with monkeypatch.context() as patch:
        patch.setenv(name, "true")
        check.on_pre_optimizer_step(None, state, None, model=model)
    check.on_train_begin(None, state, None)
    state.is_world_process_zero = False
    check.on_pre_optimizer_step(None, state, None, model=model)
    check.on_train_begin(None, state, None)
    state.is_world_process_zero = True
    with pytest.warns(UserWarning, match="9 of 9"):
        check.on_pre_optimizer_step(None, state, None, model=model)
