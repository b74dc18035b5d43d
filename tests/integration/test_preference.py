"""TRL's trainers on preferences, unchanged, with a `LoReftConfig`."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from contextlib import nullcontext

import pytest
import torch
from conftest import LAYERS, SIZES, build, randomise
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from peft_reft import LoReftConfig

from .conftest import PAIRS
from .spy import expected_offsets
from .training import CHECKPOINTING, WARNINGS, arguments, assert_all_moved, logs, trainable

pytestmark = WARNINGS

COMPLETIONS = [c for _, c in PAIRS]


@pytest.fixture
def preferences():
    """`rejected` is another row's answer; 8 rows."""
    rows = [
        {"prompt": p, "chosen": f" {c}", "rejected": f" {COMPLETIONS[(n + 1) % 8]}"} for n, (p, c) in enumerate(PAIRS)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def judged():
    rows = [{"prompt": p, "completion": f" {c}", "label": n % 2 == 0} for n, (p, c) in enumerate(PAIRS)]
    return Dataset.from_list(rows)


def loreft(task="CAUSAL_LM", **kwargs):
    return LoReftConfig(task_type=task, **{"r": 4, "positions": "f2+l2", **kwargs})


@pytest.fixture
def make(tokenizer, tmp_path, spy):
    def make(trainer, config, data, model=None, peft_config="f2+l2", edits=False, **kwargs):
        if isinstance(peft_config, str):
            peft_config = loreft(positions=peft_config)
        made = trainer(
            build("llama") if model is None else model,
            args=arguments(config, tmp_path, **{"per_device_train_batch_size": 4, **kwargs}),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        if edits:
            randomise(made.model)
        spy.watch(made.model)
        return made

    return make


def logits_of(model):
    ids = torch.arange(3, 43).view(4, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# DPO


@CHECKPOINTING
@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.cell("Trainers: preferences and reinforcement", "DPO, the base as reference, precomputed or not")
def test_dpo_starts_at_its_reference_and_edits_prompts_only(make, preferences, spy, precompute, checkpointing):
    trainer = make(
        DPOTrainer,
        DPOConfig,
        preferences,
        precompute_ref_log_probs=precompute,
        activation_checkpointing=checkpointing,
        max_steps=3,
    )
    assert_all_moved(trainer.model, trainer.train)
    margins = logs(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-6) and all(abs(margin) > 1e-5 for margin in margins[1:])
    assert logs(trainer, "loss")[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    spy.assert_prompts_edited(spy.train)
    # Both answers to a prompt were seen, and a prompt has one set of edited tokens whatever the answer.
    assert len(spy.train) == len({prompt for prompt, _ in spy.train}) == 8
    assert len(set(spy.rows)) == 16


def test_dpo_reference_is_the_base_model(make, preferences):
    """The reference is the base model's output, also beside large edits."""
    trainer = make(DPOTrainer, DPOConfig, preferences, edits=True, activation_checkpointing=False)
    plain = make(DPOTrainer, DPOConfig, preferences, activation_checkpointing=False)
    batch = next(iter(trainer.get_train_dataloader()))
    mine, expected = (
        trainer.compute_ref_log_probs(trainer.model, batch),
        plain.compute_ref_log_probs(plain.model, batch),
    )
    for one, other in zip(mine, expected, strict=True):
        assert torch.equal(one, other)
    trainer.train()
    assert abs(logs(trainer, "rewards/margins")[0]) > 1e-3


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.cell("Trainers: preferences and reinforcement", 'DPO from a trained adapter (copy "ref")')
def test_dpo_from_a_trained_adapter(make, preferences, spy, precompute, tmp_path):
    """TRL copies the adapter's parameters by name to "ref". This copy is the reference and does not move."""
    first = get_peft_model(build("llama"), loreft())
    randomise(first)
    first.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "first", is_trainable=True)
    expected = logits_of(model)
    trainer = make(
        DPOTrainer, DPOConfig, preferences, model=model, peft_config=None, precompute_ref_log_probs=precompute
    )
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert_all_moved(trainer.model, trainer.train)
    margins = logs(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-5) and abs(margins[1]) > 1e-5
    assert (logits_of(trainer.model) - expected).abs().max() > 1e-3
    trainer.model.set_adapter("ref")
    torch.testing.assert_close(logits_of(trainer.model), expected, rtol=1e-5, atol=1e-6)
    spy.assert_prompts_edited(spy.train)


@pytest.mark.cell("Gradient checkpointing", "DPO: two forwards before one backward")
def test_dpo_checkpointing_changes_nothing(make, preferences):
    """The forwards of policy and reference come before one backward."""
    plain = make(DPOTrainer, DPOConfig, preferences, edits=True, activation_checkpointing=False)
    plain.train()
    for reentrant in (False, True):
        settings = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant})
        trainer = make(DPOTrainer, DPOConfig, preferences, edits=True, **settings)
        trainer.train()
        assert logs(trainer, "loss") == pytest.approx(logs(plain, "loss"), rel=1e-5)
        for name, p in trainable(plain.model).items():
            torch.testing.assert_close(trainable(trainer.model)[name], p, rtol=1e-3, atol=1e-5, msg=name)


# KTO


@CHECKPOINTING
@pytest.mark.cell("Trainers: preferences and reinforcement", "KTO")
def test_kto(make, judged, spy, checkpointing):
    trainer = make(KTOTrainer, KTOConfig, judged, activation_checkpointing=checkpointing)
    assert_all_moved(trainer.model, trainer.train)
    assert logs(trainer, "loss")[0] == pytest.approx(0.5, rel=1e-4)  # policy == reference: 1 - sigmoid(0)
    assert logs(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    spy.assert_prompts_edited(spy.train)
    spy.assert_prompts_edited(spy.scored)  # the mismatched answers of the KL term: same prompts, same tokens
    assert spy.scored == spy.train


# ORPO and CPO call the model without labels, and their collators give no `input_ids`. Chats: test_who_knows.py


@pytest.mark.parametrize("which", ["orpo", "cpo"])
@pytest.mark.filterwarnings("ignore:You are about to import from `trl.experimental`")
@pytest.mark.cell(
    "Trainers: preferences and reinforcement",
    "ORPO, CPO on plain text",
    refused="the model gets no labels, so a suffix has no place; a prefix trains",
)
class TestWithoutLabels:
    CLASSES = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}

    def test_a_suffix_is_refused(self, make, preferences, which):
        trainer = make(*self.CLASSES[which], preferences)
        with pytest.raises(ValueError, match="cannot tell where the prompts end"):
            trainer.train()

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_prefix_trains(self, make, preferences, which, count, spy):
        # In the last layer an edit of the first token reaches no answer.
        config = loreft(positions=f"f{count}", layers=list(range(LAYERS - 1)))
        trainer = make(*self.CLASSES[which], preferences, peft_config=config)
        # Every prompt has a first token; whether it has a second, such a batch does not say.
        with pytest.warns(UserWarning, match="cannot tell how long the prompts are") if count > 1 else nullcontext():
            assert_all_moved(trainer.model, trainer.train, edits=3 * (LAYERS - 1))
        assert spy.train and {offsets for _, offsets in spy.train} == {frozenset(range(count))}


# Reward


@CHECKPOINTING
@pytest.mark.cell("Trainers: preferences and reinforcement", "Reward (sequence classification)")
def test_reward(make, preferences, spy, checkpointing):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_labels=1)
    trainer = make(
        RewardTrainer,
        RewardConfig,
        preferences,
        model=LlamaForSequenceClassification(config),
        peft_config=loreft("SEQ_CLS", modules_to_save=["score"]),
        activation_checkpointing=checkpointing,
    )
    assert_all_moved(trainer.model, trainer.train, others=1)
    # A reward model judges prompt and answer together.
    assert all(offsets == expected_offsets(len(tokens)) for tokens, offsets in spy.train)
    assert len(spy.train) == 16
