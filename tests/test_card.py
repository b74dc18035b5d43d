"""The model card works for whom it is for: its code runs in a process of its own, in another folder than the author's.

The reader does what the card says: puts names of their own in place of the placeholders. Here these are folders.
"""

import json
import re
import shutil

import forked
import pytest
import torch
from conftest import DIMENSIONS, VOCAB, build, make_tokenizer, randomise
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_reft import LoReftConfig

FIRST_LINE = "> Install `peft-reft` first: `pip install peft-reft`. Without it PEFT raises `KeyError: 'LOREFT'`."
PROMPT = "What is the capital of France?"
ROWS = [{"prompt": "a b c", "completion": " d e"}] * 4
CHATS = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]}] * 4


@pytest.fixture
def author(tmp_path):
    """A folder of the author's with a base model and its tokenizer in `author/base`."""
    folder = tmp_path / "author"
    build("llama").save_pretrained(folder / "base")
    tokenizer_of_decoders().save_pretrained(folder / "base")
    return folder


def tokenizer_of_decoders():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def adapted(base, **kwargs):
    fields = dict(task_type="CAUSAL_LM", r=2, positions="f2+l1", layers=[1])
    model = get_peft_model(base, LoReftConfig(**{**fields, **kwargs}))
    randomise(model, scale=5)
    return model.eval()


def code_of(folder):
    """The Python code of a card. No card has more than one block of it."""
    text = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 1, text
    assert all(len(line) <= 88 for line in blocks[0].splitlines())
    return blocks[0]


def filled(code, base, adapter):
    """The code with names in place of the placeholders."""
    code = re.sub('"owner/base(-model)?"', json.dumps(base), code)
    return code.replace('"you/your-adapter"', json.dumps(adapter))


def run(author, reader, *folders):
    """What the code of each card prints in a new process, in `reader`, after the author's folders are copied there."""
    codes = []
    for number, folder in enumerate(folders):
        shutil.copytree(author / "base", reader / "its-base", dirs_exist_ok=True)
        shutil.copytree(folder, reader / f"adapter-{number}")
        code = (
            code_of(folder).replace('"you/your-adapter"', f'"adapter-{number}"').replace('"owner/base"', '"its-base"')
        )
        codes.append(code)
    hidden = author.rename(author.with_name("author-is-elsewhere"))
    try:
        return run_code(codes, reader)
    finally:
        hidden.rename(author)


def run_code(codes, cwd):
    done = forked.run("".join(f"exec({code!r}, {{}})\nprint('<end>')\n" for code in codes), cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return [each.strip("\n") for each in done.stdout.split("<end>\n")[:-1]]


@pytest.fixture
def reader(tmp_path):
    (tmp_path / "reader").mkdir()
    return tmp_path / "reader"


def expected(author, adapter, chat):
    """The answer as the author gets it."""
    tokenizer = AutoTokenizer.from_pretrained(author / "base")
    model = AutoModelForCausalLM.from_pretrained(author / "base")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
        )
    else:
        text = PROMPT
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    output = model.generate(**inputs, max_new_tokens=100)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def assert_our_card(folder, author=None):
    """It has our parts once, and names nothing that is the author's alone."""
    text = (folder / "README.md").read_text()
    front, body = text.split("---\n", 2)[1:]
    assert body.strip().startswith(FIRST_LINE) and body.count(FIRST_LINE) == 1
    assert body.count("## How to use it") == 1 and body.count("## What it does") == 1
    for tag in ("loreft", "peft"):
        assert f"- {tag}\n" in front
    assert "library_name: peft" in front
    assert "None" not in text and "pipeline(" not in text
    if author is not None:
        assert str(author) not in text and "base_model" not in front


def test_the_code_answers_as_the_author_is_answered(author, reader):
    """Without a trainer; the question has the form of the training data."""
    said = {
        "unknown": (None, "# Ask in the form of the training data"),
        "prompts": ([], "without a chat template"),
        "chats": ([[4, 8]], "in the tokenizer's chat template"),
    }
    answers = []
    for name, (template, words) in said.items():
        model = adapted(AutoModelForCausalLM.from_pretrained(author / "base"), response_template=template)
        model.save_pretrained(author / name)
        assert_our_card(author / name, author)
        text = (author / name / "README.md").read_text()
        assert words in text and "for `base`" in text
        assert "the first 2 and the last token of the prompt" in text and "parameters" in text
        answers.append(expected(author, author / name, chat=name == "chats"))
        assert answers[-1] != expected(author, None, chat=name == "chats")  # the adapter can be seen
    assert run(author, reader, *(author / name for name in said)) == answers


def test_a_base_on_the_hub_is_named(author):
    model = adapted(build("llama"), revision="v1")
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(author / "saved", save_embedding_layers=False)  # so that PEFT does not ask the Hub
    code, text = code_of(author / "saved"), (author / "saved" / "README.md").read_text()
    assert 'base = "org/base"\n' in code and 'from_pretrained(base, revision="v1")' in code
    assert "base_model: org/base" in text and "- base_model:adapter:org/base" in text and "for `org/base`" in text


def test_an_adapter_without_a_base_asks_for_one(author):
    adapted(build("llama")).save_pretrained(author / "saved")
    assert_our_card(author / "saved", author)
    assert 'base = "owner/base-model"  # put its Hub name or its folder here' in code_of(author / "saved")


SMALL = dict(DIMENSIONS, vocab_size=VOCAB, pad_token_id=0)
T5 = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
TASKS = {
    "SEQ_CLS": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=5)),
    "TOKEN_CLS": lambda: BertForTokenClassification(BertConfig(**SMALL, num_labels=7)),
    "QUESTION_ANS": lambda: BertForQuestionAnswering(BertConfig(**SMALL)),
    "FEATURE_EXTRACTION": lambda: BertModel(BertConfig(**SMALL)),
    "SEQ_2_SEQ_LM": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    None: lambda: BertModel(BertConfig(**SMALL)),
}


def test_each_task(author, reader):
    """The base has another number of labels than the adapter's head: the code says how many that head has."""
    codes = []
    for task, make in TASKS.items():
        torch.manual_seed(0)
        adapted(make(), task_type=task, positions="f2", layers=[0]).save_pretrained(reader / f"adapter-{task}")
        base = TASKS["FEATURE_EXTRACTION"] if task in ("SEQ_CLS", "TOKEN_CLS") else make
        base().save_pretrained(reader / f"base-{task}")
        tokenizer_of_decoders().save_pretrained(reader / f"base-{task}")
        codes.append(filled(code_of(reader / f"adapter-{task}"), base=f"base-{task}", adapter=f"adapter-{task}"))
    label, labels, _, shape, _, nothing = run_code(codes, reader)
    assert len(json.loads(labels)) == 4 and set(json.loads(labels)) <= set(range(7))
    assert shape == "torch.Size([1, 4, 32])" and nothing == ""
    model = AutoModelForSequenceClassification.from_pretrained(reader / "base-SEQ_CLS", num_labels=5)
    model = PeftModel.from_pretrained(model, reader / "adapter-SEQ_CLS").eval()
    inputs = tokenizer_of_decoders()("What a fine day!", return_tensors="pt")
    assert int(label) == model(**inputs).logits.argmax(-1).item()


class OwnNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids):
        x = torch.nn.functional.one_hot(input_ids, 4).float()
        for block in self.blocks:
            x = block(x)
        return x


def test_a_network_of_ones_own_has_no_code_that_cannot_run(tmp_path):
    config = LoReftConfig(r=2, positions="f1", target_modules=r"blocks\.\d+")
    get_peft_model(OwnNetwork(), config).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "```python" not in text and "load it into a `OwnNetwork`: `Peft" in text


def arguments(kind, folder, **more):
    given = dict(max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    return kind(output_dir=str(folder), **{**given, **more})


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("data", ["prompts", "chats"])
def test_the_cards_of_trl(data, author, reader):
    """The adapter's own tokenizer is loaded: the base's could have no chat template."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = tokenizer_of_decoders()
    trainer = trl.SFTTrainer(
        str(author / "base"),
        args=arguments(trl.SFTConfig, author / "out", bf16=False),
        train_dataset=datasets.Dataset.from_list(ROWS if data == "prompts" else CHATS),
        processing_class=tokenizer,
        peft_config=LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l1"),
    )
    trainer.create_model_card()
    assert_our_card(author / "out", author)  # before there is an adapter beside it
    trainer.train()
    assert_our_card(author / "out", author)  # as a checkpoint leaves it
    assert not (author / "out" / "adapter_config.json").exists()
    randomise(trainer.model, scale=5)
    trainer.save_model()
    trainer.save_model(str(author / "saved"))
    trainer.create_model_card(model_name="rhymes", dataset_name=str(author / "rows.jsonl"))
    folders = [author / "out" / "checkpoint-2", author / "out", author / "saved"]
    for folder in folders:
        assert_our_card(folder, author)
        assert "AutoTokenizer.from_pretrained(adapter)" in code_of(folder)
    # A checkpoint within the run knows the rows that it was trained on, and training goes on with the marks.
    checkpoint = author / "out" / "checkpoint-1"
    assert ("apply_chat_template" in code_of(checkpoint)) == (data == "chats")
    assert bool(LoReftConfig.from_pretrained(checkpoint).response_template) == (data == "chats")
    text = (author / "out" / "README.md").read_text()
    assert "trained using [TRL]" in text and "Model Card for rhymes" in text  # TRL's own words stay
    assert "This model is a fine-tuned version of `base`." in text
    answer = expected(author, author / "saved", chat=data == "chats")
    assert run(author, reader, *folders)[1:] == [answer, answer]


def test_a_card_of_transformers_trainer(author, reader):
    model = adapted(AutoModelForCausalLM.from_pretrained(author / "base"), response_template=[])
    row = {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}
    trainer = Trainer(model, arguments(TrainingArguments, author / "out"), train_dataset=[row] * 4)
    trainer.create_model_card()
    assert_our_card(author / "out", author)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert_our_card(author / "out", author)
    assert "This model is a fine-tuned version of `base`" in (author / "out" / "README.md").read_text()
    assert run(author, reader, author / "out") == [expected(author, author / "out", chat=False)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_the_card_of_the_command(author, reader):
    pytest.importorskip("trl")
    from peft_reft.cli.main import main

    (author / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    words = {
        "model_name_or_path": author / "base",
        "dataset_name": author / "rows.jsonl",
        "output_dir": author / "out",
        "r": 2,
        "positions": "f2+l1",
        "max_steps": 2,
        "use_cpu": "true",
        "bf16": "false",
        "disable_tqdm": "true",
        "report_to": "none",
    }
    assert main(["train", *(word for name, value in words.items() for word in (f"--{name}", str(value)))]) == 0
    assert_our_card(author / "out", author)
    assert run(author, reader, author / "out") == [expected(author, author / "out", chat=False)]


def test_the_cards_of_other_trainers_stay_as_they_are(author):
    trainer = Trainer(build("llama"), arguments(TrainingArguments, author / "out"), train_dataset=[])
    trainer.create_model_card()
    assert "peft" not in (author / "out" / "README.md").read_text().lower()


def test_a_card_that_somebody_wrote_is_kept_and_our_part_renewed(tmp_path):
    model = adapted(build("llama"))
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    words = "# My adapter\n\nIt rhymes.\n\n## Quick start\n\n```text\nRead it aloud.\n```"
    card.write_text(card.read_text().replace("# LoReFT adapter", words))
    model.save_pretrained(tmp_path)
    assert words in card.read_text()
    assert_our_card(tmp_path)
    once = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == once


def test_a_folder_that_is_no_more_is_not_published(tmp_path):
    """The adapter was made on another machine, so the folder of its base is not here."""
    model = adapted(build("llama"))
    model.peft_config["default"].base_model_name_or_path = "/home/somebody/models/base"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_our_card(tmp_path, author="/home/somebody")
    assert "for `base`" in (tmp_path / "README.md").read_text()
