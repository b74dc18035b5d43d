"""TRL's GRPO and RLOO, unchanged, with a `LoReftConfig`: rollouts and log-probabilities edit the same tokens."""

import pytest
import torch
from conftest import build, randomise
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from peft_reft import LoReftConfig

from .conftest import PAIRS
from .rollouts import Recorded
from .training import CHECKPOINTING, WARNINGS, arguments, assert_all_moved, logs, trainable

pytestmark = WARNINGS

BOTH = pytest.mark.parametrize(
    "which", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=lambda which: which[0].__name__
)


def alternating(completions, **kwargs):
    """Reward every second answer, so that each group has a better and a worse one."""
    return [float(n % 2) for n in range(len(completions))]


@pytest.fixture
def make(tokenizer, tmp_path, spy):
    def make(which, model=None, peft_config="default", edits=False, watch=True, **kwargs):
        trainer_class, config_class = which
        if peft_config == "default":
            peft_config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2")
        settings = dict(num_generations=2, max_completion_length=5, beta=0.1)
        base = build("llama") if model is None else model
        # Rows end at different lengths: a quarter of all tokens end an answer.
        base.generation_config.eos_token_id = [2, *range(48, 64)]
        trainer = trainer_class(
            base,
            reward_funcs=alternating,
            args=arguments(config_class, tmp_path, **{**settings, **kwargs}),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, _ in PAIRS]),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        if edits:
            randomise(trainer.model)
        if watch:  # the spy reads whole rows
            spy.watch(trainer.model)
        return trainer

    return make


@BOTH
@CHECKPOINTING
@pytest.mark.cell(
    "Trainers: preferences and reinforcement",
    "GRPO, RLOO: rollout and log-probs edit the same tokens of ragged, left-padded prompts",
)
def test_rollout_and_training_edit_the_same_tokens(make, spy, which, checkpointing):
    trainer = make(which, activation_checkpointing=checkpointing, max_steps=3)
    assert_all_moved(trainer.model, trainer.train)
    spy.assert_prompts_edited(spy.rollout)
    assert spy.train == spy.rollout and spy.scored <= spy.rollout
    kl = logs(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)  # the reference is the base model, and the adapter starts as identity
    assert abs(kl[2]) > 1e-7


@BOTH
@CHECKPOINTING
@pytest.mark.cell("Trainers: preferences and reinforcement", "GRPO, RLOO: log-probs of rollout and training agree")
def test_logps_of_rollout_and_training_agree(make, which, checkpointing, monkeypatch):
    """With random weights, training scores the distribution that `generate` sampled from, token by token."""
    trainer = make(which, edits=True, watch=False, activation_checkpointing=checkpointing, max_steps=1)
    recorded = Recorded(monkeypatch, trainer)
    trainer.train()
    assert (
        recorded.compared >= 8 and len({len(written) for _, written, _ in recorded.calls}) > 1
    )  # ragged answers, too
    scored, reference = (
        {tuple(document): logps for document, logps in rows} for rows in (recorded.documents, recorded.reference)
    )
    assert scored.keys() == reference.keys()
    assert max((reference[key] - logps).abs().max() for key, logps in scored.items()) > 1e-2


@BOTH
@pytest.mark.cell(
    "Trainers: preferences and reinforcement", "GRPO, RLOO with continuous batching: log-probs of rollout and training"
)
def test_continuous_batching(make, which, monkeypatch):
    """Rollouts by `generate_batch`: each step's come from the weights that the step before left."""
    sizes = dict(page_size=4, num_blocks=100, max_batch_tokens=32, return_logprobs=True)
    trainer = make(
        which,
        edits=True,
        watch=False,
        max_steps=3,
        learning_rate=0.05,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=sizes,
    )
    recorded = Recorded(monkeypatch, trainer, tolerance=1e-4)
    assert_all_moved(trainer.model, trainer.train)
    assert recorded.compared >= 3 * 8


@BOTH
@pytest.mark.cell("Gradient checkpointing", "GRPO, RLOO")
def test_checkpointing_changes_nothing(make, which):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make(which, edits=True, activation_checkpointing=checkpointing)
        trainer.train()
        results.append((logs(trainer, "loss"), logs(trainer, "kl"), trainable(trainer.model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3, abs=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)
    for name, p in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], p, rtol=1e-3, atol=1e-4, msg=name)


@BOTH
@pytest.mark.cell("Trainers: preferences and reinforcement", "GRPO, RLOO from a trained adapter")
def test_from_a_trained_adapter(make, which, tmp_path, spy):
    first = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2"))
    randomise(first)
    first.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "first", is_trainable=True)
    trainer = make(which, model=model, peft_config=None)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert_all_moved(trainer.model, trainer.train)
    assert logs(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)
    assert spy.train == spy.rollout == spy.scored  # the reference edits, too


def test_several_updates_of_one_rollout(make, spy):
    """Old log-probabilities are computed without gradients; batches are shuffled and split."""
    trainer = make(
        (GRPOTrainer, GRPOConfig),
        num_iterations=2,
        steps_per_generation=2,
        per_device_train_batch_size=4,
        max_steps=4,
    )
    assert_all_moved(trainer.model, trainer.train)
    assert spy.train == spy.rollout == spy.scored
    spy.assert_prompts_edited(spy.rollout)


def test_truncated_answers_may_be_masked(make, spy):
    """A row whose answer is masked has no label. Its prompt is what the mask leaves."""
    trainer = make((GRPOTrainer, GRPOConfig), mask_truncated_completions=True, max_completion_length=2)
    assert_all_moved(trainer.model, trainer.train)
    assert spy.train == spy.rollout


@pytest.mark.cell(
    "Trainers: preferences and reinforcement",
    "GRPO with vLLM weight sync",
    refused="an edit at a few tokens cannot be merged into weights",
)
def test_weights_cannot_be_pushed_to_vllm(make):
    """TRL merges before it pushes weights. If that passed silently, vLLM would roll out the base model."""
    trainer = make((GRPOTrainer, GRPOConfig))
    with pytest.raises(ValueError, match="cannot be merged"):
        trainer.model.merge_adapter()
