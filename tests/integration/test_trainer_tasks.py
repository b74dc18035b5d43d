"""transformers' trainers on the other tasks: tagging, question answering, sequence to sequence, embeddings."""

import pytest
import torch
import transformers
from conftest import LAYERS, SIZES, VOCAB, randomise
from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from peft_reft import LoReftConfig

from .training import arguments, assert_all_moved, trainable

SEQ2SEQ = {
    "t5": (
        "T5",
        dict(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
    ),
    "bart": (
        "Bart",
        dict(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            dropout=0.0,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
    ),
}


def build(kind):
    torch.manual_seed(0)
    if kind in SEQ2SEQ:
        family, sizes = SEQ2SEQ[kind]
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        if kind == "t5":  # its own start is too small for edits to be seen
            for p in model.parameters():
                p.data.mul_(2 if p.ndim > 1 else 1)
        return model.eval()
    name = {"TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}.get(kind)
    config = transformers.BertConfig(
        **SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, num_labels=3 if kind == "TOKEN_CLS" else 2
    )
    model = getattr(transformers, f"BertFor{name}") if name else transformers.BertModel
    return model(config).eval()


def words(n=16, least=5):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, VOCAB, (least + i % 6,), generator=generator).tolist() for i in range(n)]


def tensors(output):
    """Return the results in a model's output."""
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [output[name] for name in names if output.get(name) is not None]


def assert_reloads(model, kind, folder, batch):
    model.eval().save_pretrained(folder)
    loaded = PeftModel.from_pretrained(build(kind), folder)
    assert type(loaded) is type(model)
    with torch.no_grad():
        expected, got, base = tensors(model(**batch)), tensors(loaded(**batch)), tensors(build(kind)(**batch))
        assert expected and all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert all((x - y).abs().max() > 1e-4 for x, y in zip(base, expected, strict=True))
        with loaded.disable_adapter():
            # Heads that were trained are switched off, too.
            assert all(torch.equal(x, y) for x, y in zip(tensors(loaded(**batch)), base, strict=True))


def padded(kind):
    """Make a batch of rows of several lengths."""
    rows = words(4)
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    if kind in SEQ2SEQ:
        batch["decoder_input_ids"] = torch.tensor([[0, 11, 12, 13]] * 4)
    return batch


# Tagging


def tagging(tokenizer, tmp_path, positions="f1+l1"):
    model = get_peft_model(build("TOKEN_CLS"), LoReftConfig(task_type="TOKEN_CLS", r=4, positions=positions))
    rows = [{"input_ids": row, "labels": [-100, *(word % 3 for word in row[1:])]} for row in words()]
    return Trainer(
        model,
        args=arguments(TrainingArguments, tmp_path),
        train_dataset=rows,
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )


@pytest.mark.cell("Trainers: transformers", "TOKEN_CLS")
def test_token_classification(tokenizer, tmp_path):
    trainer = tagging(tokenizer, tmp_path)
    assert_all_moved(trainer.model, trainer.train, others=2)  # the head's weight and bias
    assert_reloads(trainer.model, "TOKEN_CLS", tmp_path / "saved", padded("TOKEN_CLS"))


@pytest.mark.parametrize("training", [False, True])
def test_labels_of_token_classification_end_no_prompt(tokenizer, tmp_path, training):
    """They have the shape (batch, seq) and the -100 of a causal language model's labels, but mean no prompt."""
    trainer = tagging(tokenizer, tmp_path)
    model = trainer.model.eval()
    randomise(model)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == batch["input_ids"].shape
    model.train(training)  # no dropout here
    with_labels = model(**batch).logits
    without = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert torch.equal(with_labels, without)
    blocks = model.get_base_model()(**batch, output_hidden_states=True).hidden_states
    with model.disable_adapter():
        plain = model.get_base_model()(**batch, output_hidden_states=True).hidden_states
    lengths = batch["attention_mask"].sum(1).tolist()
    edited = (blocks[1] != plain[1]).any(-1).nonzero().tolist()
    assert edited == [[row, column] for row, length in enumerate(lengths) for column in (0, length - 1)]


# Question answering


@pytest.mark.cell("Trainers: transformers", "QUESTION_ANS")
def test_question_answering(tokenizer, tmp_path):
    model = get_peft_model(build("QUESTION_ANS"), LoReftConfig(task_type="QUESTION_ANS", r=4, positions="f2+l2"))
    rows = [{"input_ids": row, "start_positions": n % 4, "end_positions": n % 4 + 1} for n, row in enumerate(words())]
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, args=arguments(TrainingArguments, tmp_path), train_dataset=rows, data_collator=collator)
    assert_all_moved(model, trainer.train, others=2)  # the head's weight and bias
    assert_reloads(model, "QUESTION_ANS", tmp_path / "saved", padded("QUESTION_ANS"))


# Embeddings


@pytest.mark.cell("Trainers: transformers", "FEATURE_EXTRACTION")
def test_feature_extraction(tmp_path):
    config = LoReftConfig(task_type="FEATURE_EXTRACTION", r=4, positions="f1+l1")
    model = get_peft_model(build("FEATURE_EXTRACTION"), config)
    batch = padded("FEATURE_EXTRACTION")

    def train():
        optimizer = torch.optim.Adam(trainable_parameters(model), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch).last_hidden_state[:, 0].pow(2)[:, :5].sum().backward()
            optimizer.step()

    assert_all_moved(model, train)
    assert_reloads(model, "FEATURE_EXTRACTION", tmp_path / "saved", batch)


def trainable_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


# Sequence to sequence: the encoder's input is the prompt


def seq2seq(kind, positions="f2+l2"):
    return get_peft_model(build(kind), LoReftConfig(task_type="SEQ_2_SEQ_LM", r=4, positions=positions))


@pytest.mark.parametrize("kind", SEQ2SEQ)
@pytest.mark.cell("Trainers: transformers", "SEQ_2_SEQ_LM, encoder (T5, BART)")
def test_seq2seq_trains(kind, tokenizer, tmp_path):
    model = seq2seq(kind)
    assert all(".encoder." in name for name in trainable(model))
    # Labels as long as the inputs have the shape (batch, seq), too, and end no prompt.
    rows = [{"input_ids": row, "labels": row[::-1]} for row in words()]
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    args = arguments(Seq2SeqTrainingArguments, tmp_path)
    trainer = Seq2SeqTrainer(model, args=args, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
    assert_all_moved(model, trainer.train)
    assert_reloads(model, kind, tmp_path / "saved", padded(kind))


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_seq2seq_edits_the_prompt_in_the_encoder(kind):
    model = seq2seq(kind).eval()
    randomise(model)
    batch = padded(kind)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def first_block(**kwargs):
        seen = []
        base = model.get_base_model()
        block = (base.encoder.block if kind == "t5" else base.model.encoder.layers)[0]
        with (
            block.register_forward_hook(
                lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            ),
            torch.no_grad(),
        ):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        return seen[0]

    edited = first_block()
    with model.disable_adapter():
        plain = first_block()
    lengths = batch["attention_mask"].sum(1).tolist()
    expected = [[row, column] for row, n in enumerate(lengths) for column in (0, 1, n - 2, n - 1)]
    assert (edited != plain).any(-1).nonzero().tolist() == expected


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_seq2seq_generates_what_teacher_forcing_says(kind, beams):
    model = seq2seq(kind).eval()
    randomise(model)
    batch = padded(kind)
    batch.pop("decoder_input_ids")
    options = dict(max_new_tokens=5, eos_token_id=None, do_sample=False, num_beams=beams)
    options |= dict(return_dict_in_generate=True, output_logits=True, output_scores=True)
    if beams > 1:
        options |= dict(length_penalty=0.0)  # scores are sums then
    with torch.no_grad():
        out = model.generate(**batch, **options)
        with model.disable_adapter():
            plain = model.generate(**batch, **options)
        forced = model(**batch, decoder_input_ids=out.sequences[:, :-1]).logits
    if beams == 1:
        torch.testing.assert_close(torch.stack(out.logits, 1), forced, rtol=1e-4, atol=1e-5)
        assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-3
    else:
        scores = forced.log_softmax(-1).gather(-1, out.sequences[:, 1:, None]).sum((1, 2))
        torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SEQ2SEQ)
@pytest.mark.cell("Trainers: transformers", "SEQ_2_SEQ_LM: `predict_with_generate`")
def test_seq2seq_evaluates_by_generating(kind, tokenizer, tmp_path):
    """`predict_with_generate`, as summarisation and translation scripts do."""
    model = seq2seq(kind)
    rows = [{"input_ids": row, "labels": row[::-1]} for row in words(4)]
    args = arguments(Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True, generation_max_length=6)
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    trainer = Seq2SeqTrainer(model, args=args, eval_dataset=rows, data_collator=collator, processing_class=tokenizer)
    randomise(model)
    assert trainer.predict(rows).predictions.shape[0] == 4
