"""TRL's `SFTTrainer`, unchanged, with a `LoReftConfig`."""

import json
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, build, randomise
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTConfig, SFTTrainer

from peft_reft import DataCollatorForLoReft, LoReftConfig

from .training import arguments, checkpoints, losses, moved, trainable

pytestmark = [
    # transformers 5.23, about TRL 1.16's own default
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

R = 4


class Watch(TrainerCallback):
    """Keeps the gradients of every step; stops training after step `stop`."""

    def __init__(self, stop=None):
        self.gradients, self.stop = [], stop

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in trained.items()})

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop


@pytest.fixture
def make(tokenizer, tmp_path):
    """make(data, loreft=dict(...), **SFTConfig fields) returns an SFTTrainer whose adapter edits enough to see."""

    def make(data, base=None, loreft=None, collate=False, edits=True, watch=None, trainer=None, **kwargs):
        config = LoReftConfig(task_type="CAUSAL_LM", **dict(dict(r=R, positions="f2+l2"), **(loreft or {})))
        settings = dict(max_steps=3, per_device_train_batch_size=4, max_grad_norm=0.0)  # gradients as they are
        sft = SFTTrainer(
            build("llama") if base is None else base,
            args=arguments(SFTConfig, tmp_path, **{**settings, **kwargs}),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[watch or Watch()],
            **(trainer or {}),
        )
        if edits:
            randomise(sft.model)
        if collate:
            sft.data_collator = DataCollatorForLoReft(sft.data_collator, config)
        return sft

    return make


def assert_same(actual, expected):
    """Assert equality to the last bit."""
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_close(actual, expected, rtol=1e-4):
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def run(trainer):
    """Train; return the losses, the gradients of every step, and the trained adapter."""
    trainer.train()
    (watch,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
    return losses(trainer), watch.gradients, trainable(trainer.model)


def batch_of(trainer):
    """Return the first batch, as the trainer feeds it."""
    return next(iter(trainer.get_train_dataloader()))


def logits_of(model):
    ids = torch.arange(3, 43).view(4, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# Training


@pytest.mark.cell("Trainers: SFT", "prompt-completion, text")
def test_only_the_adapter_trains_and_all_of_it_moves_from_its_first_step(make, pairs):
    trainer = make(pairs, edits=False, max_steps=1)
    assert checkpoints(trainer.args)  # TRL's default
    before = trainable(trainer.model)
    assert len(before) == 3 * LAYERS and all(".loreft.loreft_weights.default." in name for name in before)
    assert sum(p.numel() for p in before.values()) == LAYERS * (2 * R * HIDDEN + R)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if name not in before}
    assert moved(trainer.model, trainer.train) == set(before)
    assert_same({name: p for name, p in trainer.model.named_parameters() if name in base}, base)


CHECKPOINTING = {
    "TRL's default": {},
    "reentrant": dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}),
    "not reentrant": dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}),
}


@pytest.mark.parametrize("positions", ["f2+l2", "all", {"0": "f2", "1-": "l3"}], ids=str)
@pytest.mark.cell("Gradient checkpointing", "SFT, reentrant or not")
def test_checkpointing_changes_nothing(make, pairs, positions):
    loreft = dict(positions=positions)
    plain = run(make(pairs, loreft=loreft, activation_checkpointing=False, max_steps=2))
    for name, settings in CHECKPOINTING.items():
        trainer = make(pairs, loreft=loreft, max_steps=2, **settings)
        assert checkpoints(trainer.args), name
        checkpointed = run(trainer)
        torch.testing.assert_close(checkpointed[0], plain[0], rtol=1e-6, atol=0)
        for mine, expected in zip(checkpointed[1], plain[1], strict=True):
            assert_close(mine, expected, rtol=1e-5)
            assert all(g.abs().max() > 0 for g in mine.values()), name


def test_training_learns(make, pairs):
    """The adapter learns the answers, although the frozen small head bounds the loss from below."""
    trainer = make(
        pairs,
        edits=False,
        max_steps=15,
        per_device_train_batch_size=8,
        learning_rate=5e-2,
        lr_scheduler_type="constant",
    )
    trainer.train()
    accuracy = [entry["mean_token_accuracy"] for entry in trainer.state.log_history if "loss" in entry]
    assert accuracy[0] < 0.1 and accuracy[-1] > 0.3
    assert all(later < earlier for earlier, later in zip(losses(trainer), losses(trainer)[1:]))


@pytest.mark.parametrize("positions", ["f2+l2", "l1+g2", "all", {"0-1": "f2", "2-": "l3"}], ids=str)
def test_the_collator_changes_no_bit(make, pairs, positions):
    loreft = dict(positions=positions)
    plain = run(make(pairs, loreft=loreft, max_steps=4))
    trainer = make(pairs, loreft=loreft, max_steps=4, collate=True)
    assert "intervention_positions" in batch_of(trainer)
    collated = run(trainer)
    assert len(plain[0]) == 4 and collated[0] == plain[0]
    assert_same(collated[2], plain[2])


def test_the_loss_is_that_of_the_edited_prompt(make, pairs):
    """TRL reports the loss that the model returns when called by hand. Other positions have another loss."""
    trainer = make(pairs, max_steps=1, activation_checkpointing=False)
    batch = batch_of(trainer)
    with torch.no_grad():
        by_hand = trainer.model(**batch).loss.item()
        shifted = DataCollatorForLoReft(lambda rows: dict(batch), trainer.model.peft_config["default"])(None)
        positions = shifted.pop("intervention_positions")
        elsewhere = trainer.model(**shifted, intervention_positions=(positions - 1).clamp_min(-1)).loss.item()
        with trainer.model.disable_adapter():
            without = trainer.model(**batch).loss.item()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(by_hand, rel=1e-5)
    assert min(abs(by_hand - elsewhere), abs(by_hand - without), abs(elsewhere - without)) > 1e-3


@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.cell("Trainers: SFT", "gradient accumulation")
def test_gradient_accumulation(make, pairs, collate):
    whole = run(make(pairs, collate=collate, per_device_train_batch_size=8))
    parts = make(pairs, collate=collate, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    accumulated = run(parts)
    assert parts.state.global_step == 3
    torch.testing.assert_close(accumulated[0], whole[0], rtol=1e-5, atol=0)
    for mine, expected in zip(accumulated[1], whole[1], strict=True):
        assert_close(mine, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.cell("Dtypes", "bf16 base, SFT")
def test_bf16_base(make, pairs, autocast, tmp_path):
    trainer = make(pairs, base=build("llama").to(torch.bfloat16), bf16=autocast)
    assert {p.dtype for p in trainable(trainer.model).values()} == {torch.float32}
    assert moved(trainer.model, trainer.train) == set(trainable(trainer.model))
    assert all(0 < loss < 10 for loss in losses(trainer))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(build("llama").to(torch.bfloat16), tmp_path / "saved")
    assert torch.equal(logits_of(loaded), logits_of(trainer.model))
    for name, p in loaded.named_parameters():
        if name.endswith(".R"):
            torch.testing.assert_close(p @ p.T, torch.eye(R), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "loreft", [dict(dropout=0.3), dict(tie="position"), dict(tie="model"), dict(intervention="direft")], ids=str
)
def test_other_settings_train(make, pairs, loreft):
    trainer = make(pairs, loreft=loreft, max_steps=1)
    assert moved(trainer.model, trainer.train) == set(trainable(trainer.model))


@pytest.mark.parametrize("collate", [False, True], ids=["alone", "collator"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dict(loss_type="dft"), marks=pytest.mark.cell("Trainers: SFT", "`loss_type='dft'`")),
        pytest.param(dict(neftune_noise_alpha=5.0), marks=pytest.mark.cell("Trainers: SFT", "NEFTune")),
    ],
    ids=str,
)
def test_losses_and_noise_of_trl(make, pairs, settings, collate):
    """They change the loss and not the positions: the edits of prompts still decide it."""
    plain, other = make(pairs), make(pairs, collate=collate, **settings)
    assert_same(trainable(other.model), trainable(plain.model))
    batch = batch_of(other)
    if "loss_type" in settings:  # NEFTune's noise is of the embeddings
        with torch.no_grad():
            found = other.compute_loss(other.model.eval(), dict(batch))
            batch.pop("intervention_positions", None)
            logits = plain.model.eval()(**batch).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        chosen = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)[labels != -100]
        torch.testing.assert_close(found, -(chosen.exp() * chosen).mean())
    other.model.train()
    curve, gradients, _ = run(other)
    assert curve != run(plain)[0]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0].values())


# Kinds of data


@pytest.mark.cell("Trainers: SFT", "prompt-completion, conversational (the chat template adds tokens)")
def test_conversations_of_one_turn(make, chat_pairs, tokenizer):
    """The edited tokens stand around the user's words."""
    plain = run(make(chat_pairs))
    trainer = make(chat_pairs, collate=True)
    batch = batch_of(trainer)
    edited = batch["input_ids"].gather(1, batch["intervention_positions"])
    frame = tokenizer.convert_tokens_to_ids(["<|im_start|>", "user", "<|im_start|>", "assistant"])
    assert edited.tolist() == [frame] * 4
    assert run(trainer)[0] == plain[0]


def test_a_collator_whose_config_is_not_the_adapters(make, chats):
    """It gets the marks that the trainer finds. Labels of several turns alone would not suffice."""
    trainer = make(chats, assistant_only_loss=True)
    own = LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f2+l2")
    trainer.data_collator = DataCollatorForLoReft(trainer.data_collator, own)
    assert run(trainer)[0] == run(make(chats, assistant_only_loss=True))[0]
    assert own.response_template == trainer.model.peft_config["default"].response_template != []


@pytest.mark.cell("Trainers: SFT", "multi-turn chats (`assistant_only_loss=True`)")
def test_chats_of_several_turns(make, chats):
    """`l` edits before every answer of the assistant, `f` only at the start of the chat."""
    plain = run(make(chats, assistant_only_loss=True))
    trainer = make(chats, assistant_only_loss=True, collate=True)
    assert run(trainer)[0] == plain[0]
    batch = batch_of(trainer)
    at = batch["intervention_positions"].unflatten(1, (-1, 4))
    answers = (batch["labels"][:, 1:] != -100) & (batch["labels"][:, :-1] == -100)
    assert set(answers.sum(1).tolist()) == {2, 3}
    for row in range(len(at)):
        begins = answers[row].nonzero().flatten() + 1
        filled = at[row][: len(begins)]
        assert filled[0, :2].tolist() == [0, 1] and (filled[1:, :2] == -1).all()
        assert torch.equal(filled[:, 2:], torch.stack([begins - 2, begins - 1], 1))
        assert (at[row][len(begins) :] == -1).all()


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of SmolLM2-135M-Instruct. It does not mark the answers, and TRL has no copy of it that does."""
MARKED = Path(__file__).parents[2] / "examples" / "smollm2_training.jinja"
"""The same with marks; docs/trainers.md gives it to TRL."""


def test_answers_alone_on_smollm2s_template(make, chat_pairs, tokenizer):
    """With the template that the page gives, `messages` train the tokens that `prompt` and `completion` train."""
    tokenizer.chat_template = SMOLLM2
    # As SmolLM2's tokenizer does, make a token of the line break, which ends an answer.
    splits = [Split(" ", "removed"), Split("\n", "isolated")]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splits)
    messages = chat_pairs.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"]
    )
    with pytest.raises(ValueError, match="chat template"):  # TRL's, without the file
        make(messages, assistant_only_loss=True)
    expected = make(chat_pairs)
    trainer = make(messages, assistant_only_loss=True, chat_template_path=str(MARKED))
    batch, batch_expected = batch_of(trainer), batch_of(expected)
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name], batch_expected[name]), name
    first = batch["labels"][0]
    assert tokenizer.decode(first[first != -100]).endswith("<|im_end|> <unk>"), "the line break is trained on"
    assert (first == -100).any()
    losses, _, trained = run(trainer)
    losses_expected, _, trained_expected = run(expected)
    assert losses == losses_expected
    assert_same(trained, trained_expected)


def test_the_marked_template_writes_smollm2s_text(chats, tokenizer):
    system = [{"role": "system", "content": "x y"}]
    for messages in (*chats["messages"], system + chats["messages"][0], chats["messages"][1][:1]):
        for generates in (False, True):
            texts = [
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=generates
                )
                for template in (SMOLLM2, MARKED.read_text(encoding="utf-8"))
            ]
            assert texts[0] == texts[1]


@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("texts", {}),
        ("texts", dict(activation_checkpointing=False)),
        ("pairs", dict(completion_only_loss=False)),
    ],
    ids=str,
)
@pytest.mark.cell(
    "Trainers: SFT",
    "plain text, `completion_only_loss=False`",
    refused="every token is supervised, so no row has a prompt to edit",
)
def test_language_modelling_data_is_refused(make, request, data, settings, collate):
    trainer = make(request.getfixturevalue(data), collate=collate, **settings)
    with pytest.raises(ValueError, match="nothing would train") as error:
        trainer.train()
    assert "completion_only_loss=True" in str(error.value) and "assistant_only_loss=True" in str(error.value)


@pytest.mark.parametrize("collate", [False, True], ids=["alone", "collator"])
@pytest.mark.cell("Trainers: SFT", "multi-turn chats, every token trained on (TRL's default for `messages`)")
def test_chats_that_are_trained_on_whole(make, chats, collate):
    """The headers mark their prompts: the edited tokens are those of `assistant_only_loss=True`."""
    trainer = make(chats, collate=collate)
    batch = batch_of(trainer)
    assert (batch["labels"][batch["attention_mask"].bool()] != -100).all()
    assert moved(trainer.model, trainer.train) == set(trainable(trainer.model))
    answers = batch_of(make(chats, assistant_only_loss=True))
    with torch.no_grad():
        found, expected = (trainer.model.eval()(**given).logits for given in (batch, answers))
        with trainer.model.disable_adapter():
            without = trainer.model(**batch).logits
    real = answers["attention_mask"].bool()
    assert torch.equal(batch["input_ids"], answers["input_ids"])
    assert torch.equal(found[real], expected[real]) and (found - without)[real].abs().max() > 1e-2


@pytest.mark.cell("Trainers: SFT", 'plain text with `positions="all"`')
def test_language_modelling_data_trains_where_generated_tokens_are_edited(make, texts):
    trainer = make(texts, loreft=dict(positions="all"))
    assert moved(trainer.model, trainer.train) == set(trainable(trainer.model))


@pytest.mark.parametrize("settings", [dict(packing=True), dict(padding_free=True, max_length=None)], ids=str)
@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.cell(
    "Trainers: SFT", "plain text, packed", refused="every token is supervised, so no row has a prompt to edit"
)
def test_language_modelling_data_is_refused_when_packed(make, texts, settings, collate):
    """In packed rows TRL masks the first label of each document, which then seems to have a prompt of one token."""
    trainer = make(texts, collate=collate, **{"max_length": 32, **settings})
    with pytest.raises(ValueError, match="nothing would train"):
        trainer.train()


# Packing


@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.parametrize("positions", ["f2+l2", "all", {"0": "f2", "1-": "l3"}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [dict(packing=True, packing_strategy="bfd", max_length=32), dict(padding_free=True, max_length=None)],
    ids=["bfd", "padding_free"],
)
@pytest.mark.cell("Trainers: SFT", '`packing_strategy="bfd"`, `padding_free=True`')
def test_packed_equals_padded(make, pairs, settings, positions, collate):
    """Each batch holds all eight rows, so that packed and padded batches have the same documents in some order."""
    loreft = dict(positions=positions)
    padded = run(make(pairs, loreft=loreft, per_device_train_batch_size=8))
    trainer = make(pairs, loreft=loreft, per_device_train_batch_size=8, collate=collate, **settings)
    batch = batch_of(trainer)
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    packed = run(trainer)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=0)
    for mine, expected in zip(packed[1], padded[1], strict=True):
        assert_close(mine, expected, rtol=1e-3)


@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.cell("Trainers: SFT", "multi-turn chats, packed")
def test_packed_chats_equal_padded(make, chats, collate):
    settings = dict(assistant_only_loss=True, per_device_train_batch_size=8)
    padded = run(make(chats, **settings))
    packed = run(make(chats, collate=collate, packing=True, packing_strategy="bfd", max_length=96, **settings))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=0)


LONG = [{"prompt": "a b c", "completion": " 1 2 3 4 5 6"}, {"prompt": "d e f", "completion": " 7 8 9 0 1 2"}] * 4


@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.cell(
    "Trainers: SFT", '`packing_strategy="wrapped"`', refused="a row starts inside a document, whose prompt is lost"
)
def test_rows_that_start_inside_an_answer_are_refused(make, collate):
    trainer = make(Dataset.from_list(LONG), collate=collate, packing=True, packing_strategy="wrapped", max_length=16)
    labels = [row["labels"] for row in trainer.train_dataset]
    assert any(row[0] != -100 and -100 in row for row in labels)  # a row with a lost prompt
    with pytest.raises(ValueError, match=r"middle of a document.*packing_strategy='bfd'"):
        trainer.train()


@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.cell(
    "Trainers: SFT", '`packing_strategy="bfd_split"`', refused="a row starts inside a document, whose prompt is lost"
)
def test_split_documents_are_refused(make, collate):
    """`bfd_split` puts the rest of a long document into a row without its prompt."""
    trainer = make(Dataset.from_list(LONG), collate=collate, packing=True, packing_strategy="bfd_split", max_length=7)
    assert any(row["labels"][0] != -100 for row in trainer.train_dataset)
    with pytest.raises(ValueError, match=r"middle of a document.*packing_strategy='bfd'"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:LoReFT. truncation_mode='keep_end' cuts the beginning:UserWarning")
@pytest.mark.cell("Trainers: SFT", "truncation from the left (`truncation_mode='keep_end'`)")
@pytest.mark.parametrize("collate", [False, True], ids=["alone", "collator"])
def test_truncation_from_the_left(make, pairs, collate):
    """Every forward takes what is left of a prompt for the prompt. A row cut inside its answer has none."""
    assert run(make(pairs, max_length=8, truncation_mode="keep_end", collate=collate))[0]
    with pytest.raises(ValueError, match="No row of this training batch has a token for LoReFT to edit"):
        make(pairs.select([2]), max_length=3, truncation_mode="keep_end", collate=collate).train()


@pytest.mark.cell("Trainers: SFT", "truncation (`max_length`)")
def test_truncation_keeps_the_prompt(make, pairs):
    plain = run(make(pairs, max_length=8))
    assert run(make(pairs, max_length=8, collate=True))[0] == plain[0]


# Forwards without labels

SMOOTHING = pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning")
LOSS_FUNC = pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")


def squared(outputs, labels, num_items_in_batch=None):
    """A user's own loss: the mean square of the logits that predict supervised tokens."""
    return outputs.logits[:, :-1][labels[:, 1:] != -100].square().mean()


WITHOUT_LABELS = [
    pytest.param(dict(label_smoothing_factor=0.1), marks=SMOOTHING, id="label smoothing"),
    pytest.param(dict(trainer=dict(compute_loss_func=squared)), marks=LOSS_FUNC, id="compute_loss_func"),
]


@pytest.mark.parametrize("settings", WITHOUT_LABELS)
@pytest.mark.cell(
    "Trainers: SFT",
    "label smoothing, `compute_loss_func`, without our collator",
    refused="labels do not reach the model, so the end of the prompt is unknown",
)
def test_without_labels_and_collator_training_is_refused(make, pairs, settings):
    with pytest.raises(ValueError, match="DataCollatorForLoReft"):
        make(pairs, **settings).train()


@pytest.mark.parametrize("settings", WITHOUT_LABELS)
@pytest.mark.cell("Trainers: SFT", "label smoothing, `compute_loss_func`, with `DataCollatorForLoReft`")
def test_without_labels_the_collator_has_the_positions(make, pairs, settings):
    trainer = make(pairs, collate=True, max_steps=2, **settings)
    batch = batch_of(trainer)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        outputs = trainer.model(**plain)  # sees the labels, so it finds the prompts itself
        if "trainer" in settings:
            expected = squared(outputs, batch["labels"])
        else:
            expected = LabelSmoother(epsilon=0.1)(outputs, batch["labels"], shift_labels=True)
    assert moved(trainer.model, trainer.train) == set(trainable(trainer.model))
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


@SMOOTHING
def test_without_labels_a_prefix_alone_needs_no_collator(make, pairs):
    """The first tokens of a prompt do not depend on its end, unless the prompt is shorter than the prefix."""
    loreft = dict(positions="f1")
    plain = run(make(pairs, loreft=loreft, label_smoothing_factor=0.1))
    assert run(make(pairs, loreft=loreft, label_smoothing_factor=0.1, collate=True))[0] == plain[0]
    with pytest.warns(UserWarning, match="cannot tell how long the prompts are"):
        run(make(pairs, loreft=dict(positions="f2"), label_smoothing_factor=0.1))


@pytest.mark.cell("Trainers: SFT", "evaluation")
def test_evaluation(make, pairs):
    """If labels reach the model, the collator changes nothing."""
    results = []
    for collate in (False, True):
        trainer = make(pairs, collate=collate, trainer=dict(eval_dataset=pairs.select(range(5))))
        results.append(trainer.evaluate()["eval_loss"])
    assert results[0] == results[1]
    with trainer.model.disable_adapter():
        assert abs(trainer.evaluate()["eval_loss"] - results[0]) > 1e-3


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
@pytest.mark.parametrize("collate", [False, True], ids=["alone", "collator"])
@pytest.mark.cell("Trainers: SFT", "`compute_metrics`")
def test_metrics_are_of_edited_prompts(make, pairs, collate):
    """TRL computes the logits of an evaluation without labels. What the loss's forward found is remembered."""
    seen = []

    def compute_metrics(prediction):
        seen.append(torch.from_numpy(prediction.predictions))
        return {}

    data = pairs.select(range(4))
    options = dict(eval_dataset=data, compute_metrics=compute_metrics)
    trainer = make(data, collate=collate, per_device_eval_batch_size=4, trainer=options)
    trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        expected = trainer.model.eval()(**{n: batch[n] for n in ("input_ids", "attention_mask", "labels")}).logits
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


# Saving


@pytest.mark.parametrize(
    "loreft", [dict(), dict(tie="group"), dict(tie="position", dropout=0.2), dict(tie="model"), dict(r=1)], ids=str
)
@pytest.mark.cell("Trainers: SFT", "resume: losses and adapter bit-equal")
def test_resuming_goes_on_as_if_never_stopped(make, pairs, loreft, tmp_path):
    settings = dict(loreft=loreft, max_steps=4, edits=False)
    straight = run(make(pairs, **settings))
    stopped = make(
        pairs, watch=Watch(stop=2), save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"), **settings
    )
    first = run(stopped)
    assert stopped.state.global_step == 2 and first[0] == straight[0][:2]
    resumed = make(pairs, output_dir=str(tmp_path / "run"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == straight[0] and len(straight[0]) == 4
    assert_same(trainable(resumed.model), straight[2])


@pytest.mark.parametrize("positions", ["f2+l2", {"0": "f2", "1-": "l3"}], ids=str)
@pytest.mark.cell("Trainers: SFT", "save, load, `AutoPeftModelForCausalLM`")
def test_saved_and_loaded(make, pairs, tokenizer, tmp_path, positions):
    base, saved = tmp_path / "base", tmp_path / "saved"
    build("llama").save_pretrained(base)
    trainer = make(pairs, base=AutoModelForCausalLM.from_pretrained(base), loreft=dict(positions=positions))
    trainer.train()
    trainer.save_model(str(saved))
    expected = logits_of(trainer.model)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved)
    assert torch.equal(logits_of(loaded), expected)
    assert not trainable(loaded)  # for inference
    with loaded.disable_adapter():
        assert (logits_of(loaded) - expected).abs().max() > 1e-2
        assert torch.equal(logits_of(loaded), logits_of(AutoModelForCausalLM.from_pretrained(base)))
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(saved)), expected)
    assert AutoPeftModelForCausalLM.from_pretrained(saved).peft_config["default"].positions == positions

    saved_config = json.loads((saved / "adapter_config.json").read_text())
    assert saved_config["peft_type"] == "LOREFT" and saved_config["base_model_name_or_path"] == str(base)


@pytest.mark.cell("Trainers: SFT", "training a loaded adapter on")
def test_a_loaded_adapter_trains_on(make, pairs, tokenizer, tmp_path):
    first = make(pairs, max_steps=1)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "saved", is_trainable=True)
    args = first.args
    args.max_steps = 2
    trainer = SFTTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
    assert len(trainable(model)) == 3 * LAYERS
    assert moved(trainer.model, trainer.train) == set(trainable(model))
