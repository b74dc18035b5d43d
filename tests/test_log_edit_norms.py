"""`LogEditNorms` logs how much each layer edits, to every reporter, and leaves the training as it is."""

import math
import pickle

import numpy as np
import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from peft_reft import LoReftConfig, edit_norms
from peft_reft.integrations.edit_norms import LogEditNorms

IDS = torch.randint(3, VOCAB, (8, 6), generator=torch.Generator().manual_seed(8))
LABELS = IDS.masked_fill(torch.arange(6) < 3, -100)
ROWS = [{"input_ids": row, "labels": labels} for row, labels in zip(IDS, LABELS)]
pytestmark = [  # names that newer versions of transformers replace
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*` is deprecated:FutureWarning"),
]
KEYS = [f"edit_norm/model.layers.{layer}" for layer in range(3)]


def adapted(**fields):
    config = LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "positions": "f1+l2", **fields})
    model = get_peft_model(build("llama"), config)
    randomise(model)
    return model


def trainer(model, folder, *callbacks, **settings):
    settings = dict(dict(per_device_train_batch_size=2, max_steps=4, logging_steps=1, report_to="none"), **settings)
    args = TrainingArguments(output_dir=str(folder), save_strategy="no", use_cpu=True, disable_tqdm=True, **settings)
    return Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=list(callbacks))


def trained(folder, *callbacks, **settings):
    torch.manual_seed(3)
    model = adapted(dropout=0.2)  # random numbers must fall as they do without the callback
    training = trainer(model, folder, *callbacks, **settings)
    training.train()
    return model, training.state.log_history


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["stored", "recomputed", "recomputed, reentrant"])
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_weights_are_bit_equal_with_and_without_it(tmp_path, accumulate, reentrant):
    settings = dict(gradient_accumulation_steps=accumulate, logging_steps=2, learning_rate=1e-2)
    if reentrant is not None:
        kind = {"use_reentrant": reentrant}
        settings.update(gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    plain, without = trained(tmp_path, **settings)
    watched, logs = trained(tmp_path, LogEditNorms(), **settings)
    start = adapted().state_dict()
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[key]), key
    assert any(not torch.equal(start[key], tensor) for key, tensor in plain.state_dict().items())
    assert [log["loss"] for log in logs[:2]] == [log["loss"] for log in without[:2]]
    assert all(set(KEYS) <= set(log) for log in logs[:2]) and not any(set(KEYS) & set(log) for log in without)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_is_the_mean_over_the_edited_tokens_of_the_step(tmp_path, accumulate, checkpointing):
    """The last micro-batch has one row of one token to edit at its end, so a mean of means would be another number."""
    model = adapted()
    settings = dict(max_steps=1, learning_rate=0.0, gradient_checkpointing=checkpointing)
    settings.update(per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate)
    training = trainer(model, tmp_path, LogEditNorms(), **settings)
    training.train_dataset = [*ROWS[:7], {**ROWS[7], "labels": torch.cat([IDS[7][:1] * 0 - 100, IDS[7][1:]])}]
    training.train()
    labels = LABELS.clone()
    labels[7, 1:] = IDS[7, 1:]
    norms = edit_norms(model, {"input_ids": IDS, "labels": labels})
    expected = np.nanmean(norms.reshape(3, -1), axis=1)
    assert (~np.isnan(norms[0, 7])).sum() == 1
    [log] = [log for log in training.state.log_history if "loss" in log]
    np.testing.assert_allclose([log[key] for key in KEYS], expected, rtol=1e-5)


def test_every_reporter_gets_them_with_the_loss(tmp_path, monkeypatch):
    """A reporter is called before the callbacks that a user gives."""
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append((state.global_step, dict(logs)))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "ours", Reporter)
    settings = dict(report_to=["ours"], logging_steps=2, eval_strategy="steps", eval_steps=1)
    training = trainer(adapted(), tmp_path, LogEditNorms(), **settings)
    training.train()
    with_loss = [(step, logs) for step, logs in reported if "loss" in logs]
    assert [step for step, _ in with_loss] == [2, 4]
    for _, logs in with_loss:
        assert all(isinstance(logs[key], float) and math.isfinite(logs[key]) and logs[key] > 0 for key in KEYS)
    others = [logs for _, logs in reported if "loss" not in logs]
    assert len(others) == 5  # four evaluations, and the summary
    assert not any(key.startswith("edit_norm") for logs in others for key in logs)
    assert [log for log in training.state.log_history if KEYS[0] in log] == [
        {**logs, "step": step} for step, logs in with_loss
    ]


class Watched(TrainerCallback):
    """Notes before each step's optimizer whether the layers have hooks."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = [module for name, module in model.named_modules() if name.endswith(".loreft")]
        self.steps.append(any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(logging_steps=2), [False, True, False, True]),
        (dict(logging_steps=3, logging_first_step=True), [True, False, True, False]),
        (dict(logging_strategy="epoch"), [True] * 4),
    ],
    ids=str,
)
def test_only_steps_that_are_logged_are_watched(tmp_path, settings, expected):
    watched, model = Watched(), adapted()
    training = trainer(model, tmp_path, LogEditNorms(), watched, **settings)
    training.train()
    assert watched.steps == expected
    logs = [log for log in training.state.log_history if "loss" in log]
    assert logs and all(set(KEYS) <= set(log) for log in logs)
    pickle.dumps(model)  # no hook is left


@pytest.mark.filterwarnings("ignore:LoReFT. 9 of 9 trainable tensors got no gradient:UserWarning")
def test_a_step_without_an_edit_says_so(tmp_path):
    model = adapted()
    model.base_model.disable_adapter_layers()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    training = trainer(model, tmp_path, LogEditNorms(), max_steps=1)
    with pytest.warns(UserWarning, match="no layer was seen to edit a token in step 1"):
        training.train()
    assert not set(KEYS) & set(training.state.log_history[0])


def test_what_cannot_be_watched(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoReFT adapter"):
        trainer(build("llama"), tmp_path, LogEditNorms()).train()
    with pytest.raises(ValueError, match="torch_compile=True"):
        training = trainer(adapted(), tmp_path, LogEditNorms())
        training.args.torch_compile = True
        training.train()


def test_under_trl(tmp_path, tokenizer):
    """The adapter is made by the trainer; TRL's own metrics stay; sampling within a step does not count."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    common = dict(output_dir=str(tmp_path), bf16=False, report_to="none", use_cpu=True, logging_steps=1, max_steps=2)
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1", init_weights="paper")
    given = dict(peft_config=config, processing_class=tokenizer, callbacks=[LogEditNorms()])
    rows = Dataset.from_list([{"prompt": "a b c", "completion": " d e"}] * 4)
    training = SFTTrainer(model=build("llama"), args=SFTConfig(**common), train_dataset=rows, **given)
    training.train()
    assert {*KEYS, "loss", "mean_token_accuracy"} <= set(training.state.log_history[0])

    args = GRPOConfig(**common, num_generations=2, per_device_train_batch_size=2, max_completion_length=4)
    prompts = Dataset.from_list([{"prompt": "a b c"}] * 4)
    seen = []
    watcher = LogEditNorms()
    add = watcher._add
    watcher._add = lambda name, norms: (seen.append(tuple(norms.shape)), add(name, norms))
    given["callbacks"] = [watcher]
    training = GRPOTrainer(
        model=build("llama"),
        reward_funcs=lambda completions, **kwargs: [float(len(completion)) for completion in completions],
        args=args,
        train_dataset=prompts,
        **given,
    )
    training.train()
    assert len(seen) == 6 and {shape[0] for shape in seen} == {2}  # two steps of three layers: none of `generate`
    assert {*KEYS, "loss", "reward"} <= set(training.state.log_history[0])
