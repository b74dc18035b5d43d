"""transformers' `Trainer` on classifiers: the edit is on the first token, the head trains along."""

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS, SEQ_CLS, VOCAB, build, randomise
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from peft_reft import DataCollatorForLoReft, LoReftConfig

from .training import arguments, losses, moved, trainable

R = 2
CONFIG = dict(task_type="SEQ_CLS", positions="f1", r=R)


def rows(n=24):
    """Make rows of 5 to 10 tokens; the first one tells the class."""
    generator = torch.Generator().manual_seed(5)
    words = [torch.randint(10, VOCAB, (4 + i % 6,), generator=generator).tolist() for i in range(n)]
    return [{"input_ids": [3 + i % 3, *words[i]], "label": i % 3} for i in range(n)]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture(params=SEQ_CLS)
def family(request):
    return request.param


@pytest.fixture
def make(family, tokenizer, tmp_path):
    def make(base=None, edits=False, config=None, collate=False, **kwargs):
        config = LoReftConfig(**{**CONFIG, **(config or {})})
        model = get_peft_model(build(family) if base is None else base, config)
        if edits:
            randomise(model)
        collator = DataCollatorWithPadding(tokenizer)
        return Trainer(
            model,
            args=arguments(TrainingArguments, tmp_path, **{"max_steps": 3, **kwargs}),
            train_dataset=rows(),
            eval_dataset=rows(7),
            data_collator=DataCollatorForLoReft(collator, config) if collate else collator,
            compute_metrics=accuracy,
        )

    return make


def logits_of(model, tokenizer):
    batch = DataCollatorWithPadding(tokenizer)([{"input_ids": row["input_ids"]} for row in rows(7)])
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.cell("Trainers: transformers", "SEQ_CLS")
def test_adapter_and_head_train_and_nothing_else(make):
    trainer = make()
    before = trainable(trainer.model)
    interventions = {name for name in before if "loreft_weights" in name}
    assert sum(before[name].numel() for name in interventions) == LAYERS * (2 * R * HIDDEN + R)
    assert interventions != set(before)
    assert all(".classifier.modules_to_save.default." in name for name in set(before) - interventions)
    assert moved(trainer.model, trainer.train) == set(before)


def test_training_learns_and_metrics_say_so(make):
    trainer = make(max_steps=30)
    assert trainer.evaluate()["eval_accuracy"] < 0.6
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0 and losses(trainer)[-1] < 0.9 * losses(trainer)[0]


def test_metrics_are_those_of_the_edited_model(make, tokenizer):
    trainer = make(edits=True, per_device_eval_batch_size=7)
    logits, labels = logits_of(trainer.model, tokenizer), np.array([row["label"] for row in rows(7)])
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(float((logits.argmax(-1).numpy() == labels).mean()))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    with trainer.model.disable_adapter():
        assert abs(trainer.evaluate()["eval_loss"] - expected) > 1e-4


def test_only_the_first_token_is_edited(make, family):
    """The last block's output changes at the first real token of each row, with padding on either side."""
    model = make(edits=True, config=dict(layers=[-1])).model.eval()
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for mask, firsts in [(right, [0, 0]), (right.flip(1), [2, 0])]:
        batch = dict(input_ids=ids * mask, attention_mask=mask, output_hidden_states=True)
        with torch.no_grad():
            edited = model(**batch).hidden_states[-1]
            with model.disable_adapter():
                plain = model(**batch).hidden_states[-1]
        changed = (edited != plain).any(-1)
        assert changed.nonzero().tolist() == [[row, first] for row, first in enumerate(firsts)]


def test_the_collator_changes_no_bit(make):
    """A classifier has one label a row, which says nothing of prompts."""
    config = dict(positions="f1+l2")
    assert trained(make(edits=True, config=config)) == trained(make(edits=True, config=config, collate=True))


def trained(trainer):
    trainer.train()
    return losses(trainer), trainer.evaluate()["eval_loss"]


@pytest.mark.cell("Gradient checkpointing", "sequence classification")
def test_checkpointing_changes_nothing(make):
    plain = make(edits=True, config=dict(positions="f1+l2"))
    plain.train()
    for reentrant in (False, True):
        trainer = make(
            edits=True,
            config=dict(positions="f1+l2"),
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        # The dropout of BERT draws the same numbers again when it recomputes, so losses can be compared.
        trainer.train()
        assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
        for name, p in trainable(plain.model).items():
            torch.testing.assert_close(trainable(trainer.model)[name], p, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.cell("Trainers: transformers", "SEQ_CLS with label smoothing")
def test_label_smoothing_needs_no_collator(make):
    """Label smoothing keeps the labels from the model, and a classifier needs none to find its prompts."""
    trainer = make(edits=True, config=dict(positions="f1+l1"), label_smoothing_factor=0.1)
    assert moved(trainer.model, trainer.train) == set(trainable(trainer.model))


@pytest.mark.cell("Trainers: transformers", "SEQ_CLS: adapter and head saved and loaded")
def test_adapter_and_head_are_saved_and_loaded(make, family, tokenizer, tmp_path):
    base, saved = tmp_path / "base", tmp_path / "saved"
    build(family).save_pretrained(base)
    load_base = AutoModelForSequenceClassification.from_pretrained
    trainer = make(base=load_base(base))
    trainer.train()
    trainer.save_model(str(saved))
    expected = logits_of(trainer.model, tokenizer)
    loaded = PeftModel.from_pretrained(load_base(base), saved)
    assert torch.equal(logits_of(loaded, tokenizer), expected)
    assert torch.equal(
        logits_of(AutoPeftModelForSequenceClassification.from_pretrained(saved, num_labels=3), tokenizer), expected
    )
    head = {n: p for n, p in trainer.model.named_parameters() if ".classifier.modules_to_save." in n}
    assert head and all(torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in head.items())
    assert (logits_of(load_base(base), tokenizer) - expected).abs().max() > 1e-3


@pytest.mark.cell("Trainers: transformers", "SEQ_CLS: resume bit-equal")
def test_resuming_goes_on_as_if_never_stopped(make, tmp_path):
    straight = make(max_steps=4)
    straight.train()
    make(max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run")).train()
    resumed = make(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(straight)
    for name, p in trainable(straight.model).items():
        assert torch.equal(trainable(resumed.model)[name], p), name
