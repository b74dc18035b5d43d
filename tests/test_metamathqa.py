"""LoReFT in PEFT's comparison of methods on MetaMathQA: the settings, and a loop that does what PEFT's script does."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from integration.spy import Documents
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_reft import LoReftConfig
from peft_reft.cli import execute

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "metamathqa"
sys.path.insert(0, str(FOLDER))
import settings  # noqa: E402

sys.path.remove(str(FOLDER))

EXPERIMENTS = sorted(path.parent for path in FOLDER.glob("loreft/*/adapter_config.json"))
HEADER_OF_LLAMA_3 = [[21834, 3094, 555, 3094, 627, 16533]]
"""The tokens of ` Think step by step.`, a line break and `Answer`."""
ROWS = [
    ("Tom has 3 apples and buys 4. How many has he?", "The number is 3 + 4 = 7. The answer is: 7"),
    ("What is $2^3$?", "2 * 2 * 2 = 8. The answer is: 8"),
    ("A train goes 60 miles in an hour. How far does it go in 3 hours?", "\\boxed{180}. The answer is: 180"),
    ("What is 10 - 4?", "We take 4 from 10. The answer is: 6"),
]
WIKI = ["Rome is the capital of Italy.", "A whale is a mammal that lives in the sea and breathes air."]
# Where Llama 3's tokenizer cuts a text before it merges bytes: ":The" stays together.
CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of Llama 3's kind, with few tokens. Its folder is `name_or_path`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([settings.TEMPLATE.format(query=query) + answer for query, answer in ROWS] * 3, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", padding_side="right"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    made = AutoTokenizer.from_pretrained(folder)
    made.pad_token = made.eos_token  # as PEFT's script does
    return made


def model_of(tokenizer, config):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=0, eos_token_id=1))
    return get_peft_model(base.to(torch.bfloat16), config)


def test_there_is_a_folder_for_each_setting():
    assert [path.name for path in EXPERIMENTS] == sorted(f"llama-3.2-3B-{name}" for name in settings.SETTINGS)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_the_folders_hold_what_the_script_writes(experiment, tokenizer, tmp_path):
    header = settings.header_of(tokenizer)
    written = settings.write(tmp_path, experiment.name.removeprefix("llama-3.2-3B-"), header)
    assert written.relative_to(tmp_path) == experiment.relative_to(FOLDER)
    theirs, ours = (
        {path.name: json.loads(path.read_text()) for path in folder.iterdir()} for folder in (experiment, written)
    )
    assert theirs.keys() == {"adapter_config.json", "training_params.json"}
    for files in (theirs, ours):
        del files["adapter_config.json"]["peft_version"]
    mark, own = (files["adapter_config.json"].pop("response_template") for files in (theirs, ours))
    assert (mark, own) in ((None, None), (HEADER_OF_LLAMA_3, [header]))
    assert theirs == ours


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_peft_reads_the_folders(experiment):
    config = PeftConfig.from_pretrained(str(experiment))
    assert type(config) is LoReftConfig and config.task_type == "CAUSAL_LM"
    parameters = json.loads((experiment / "training_params.json").read_text())
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], **parameters.pop("optimizer_kwargs"))
    assert not parameters


def test_a_header_that_merges_with_the_answer_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(settings, "HEADER", " Think step by step.\nAnswer:")
    with pytest.raises(ValueError, match=r"stands 0 times in .*Answer:The sum"):
        settings.header_of(tokenizer)


def test_the_command_runs_pefts_script(tmp_path, monkeypatch, capsys):
    """A stand-in for it, which reads the settings as it does. PEFT's own needs a GPU and the Hub."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "loreft", tmp_path / "experiments" / "loreft")
    (tmp_path / "beside_it.py").write_text("")
    (tmp_path / "run.py").write_text(
        "import sys; import beside_it; from peft import PeftConfig\n"
        "config = PeftConfig.from_pretrained(sys.argv[-1])\n"
        "print(config.peft_type.value, config.r, config.positions)\n"
    )
    execute.run(["run.py", "-v", "experiments/loreft/llama-3.2-3B-rank8-f7l7"])
    assert capsys.readouterr().out == "LOREFT 8 f7+l7\n"


def without_labels(model, tokenizer):
    """Loss by token of plain texts, as PEFT's script measures how much was forgotten."""
    with torch.inference_mode():
        batch = tokenizer.pad(tokenizer(WIKI), return_tensors="pt", padding_side="left")
        logits = model(**batch, pad_token_id=tokenizer.eos_token_id).logits
    assert torch.isfinite(logits).all()


def training_batch(tokenizer):
    """Question and answer in one row, all supervised, and one token to end it."""
    rows = tokenizer([settings.TEMPLATE.format(query=query) + answer for query, answer in ROWS])
    batch = tokenizer.pad(rows, return_tensors="pt")
    labels = batch["input_ids"].clone()
    for row, length in zip(labels, map(len, rows["input_ids"])):
        row[length + 1 :] = -100
    return {**batch, "labels": labels}


def answers(model, tokenizer):
    prompts = tokenizer([settings.TEMPLATE.format(query=query) for query, _ in ROWS])
    batch = tokenizer.pad(prompts, return_tensors="pt", padding_side="left")
    with torch.inference_mode():
        generation = GenerationConfig(max_length=batch["input_ids"].shape[1] + 5, max_new_tokens=5)
        return model.generate(**batch, generation_config=generation, pad_token_id=tokenizer.eos_token_id)


@pytest.mark.parametrize("name", settings.SETTINGS)
def test_a_loop_as_in_pefts_script(name, tokenizer, tmp_path, monkeypatch):
    """Evaluate, train, evaluate, save. Training edits the tokens that `generate` edits."""
    folder = settings.write(tmp_path, name, settings.header_of(tokenizer))
    config = PeftConfig.from_pretrained(str(folder))
    model = model_of(tokenizer, config)
    trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
    optimizer_kwargs = json.loads((folder / "training_params.json").read_text())["optimizer_kwargs"]
    optimizer = torch.optim.AdamW(model.parameters(), **optimizer_kwargs)
    without_labels(model.eval(), tokenizer)

    if config.positions != "all":  # with "all" nothing needs to be known
        spy = Documents(monkeypatch)
        spy.watch(model)
    batch = training_batch(tokenizer)
    losses = []
    for _ in range(4):
        model.train()
        optimizer.zero_grad()
        loss = model(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        answered = answers(model.eval(), tokenizer)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, trainable[name])}
    assert moved == trainable.keys()

    if config.positions != "all":
        assert len(spy.train) == len(spy.rest) == len(ROWS)
        for (query, answer), (length, edited) in zip(ROWS, in_order(spy, tokenizer)):
            end = length - 1  # the header ends before the colon, which is the last token of a prompt
            assert edited == {*range(7), *range(end - 7, end)}, (query, answer)

    monkeypatch.undo()  # the spy watches one model
    without_labels(model, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(model_of(tokenizer, config).unload(), tmp_path / "adapter").eval()
    assert torch.equal(answers(again, tokenizer), answered)


def in_order(spy, tokenizer):
    """For each of `ROWS`: how many tokens its prompt has, and which are edited, in training as in `generate`."""
    of_rows, of_prompts = dict(spy.train), dict(spy.rest)
    for query, answer in ROWS:
        prompt = settings.TEMPLATE.format(query=query)
        row, prompt = (tuple(tokenizer(text)["input_ids"]) for text in (prompt + answer, prompt))
        assert of_rows[row] == of_prompts[prompt]
        yield len(prompt), of_rows[row]
