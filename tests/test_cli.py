"""The command `peft-reft`: what a user types, and what they read."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import build
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peft_reft import LoReftConfig
from peft_reft_cli import main

PARITY = Path(__file__).parent / "parity"
ROOT = Path(__file__).parent.parent
ROWS = [{"prompt": "a b c d e f", "completion": " 1 2 3"}, {"prompt": "g h i", "completion": " 4 5"}] * 4


@pytest.fixture
def adapter(tmp_path, model_id):
    torch.manual_seed(0)
    config = LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l1", init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter")


def rows_file(folder, rows=ROWS):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def train_arguments(tmp_path, model_id, **more):
    given = {
        "model_name_or_path": model_id,
        "dataset_name": rows_file(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "r": "2",
        "positions": "f2+l2",
        "max_steps": "3",
        "use_cpu": "true",
        "bf16": "false",
        "per_device_train_batch_size": "4",
        "disable_tqdm": "true",
        **more,
    }
    return ["train", *(word for name, value in given.items() if value is not None for word in (f"--{name}", value))]


SCRIPT = Path(sys.executable).parent / "peft-reft"
"""What pip installed."""


def entry_point():
    """Code that runs what pyproject.toml installs as `peft-reft`."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, function = re.search(r'^peft-reft = "([\w.]+):(\w+)"', text, re.MULTILINE).groups()
    return f"import sys; from {module} import {function}; sys.exit({function}())"


@pytest.mark.filterwarnings("ignore")
def test_train_generate_inspect(tmp_path, model_id, capsys):
    assert main(train_arguments(tmp_path, model_id, layers="[0, -1]", tie="group", dropout="0.1")) == 0
    said = capsys.readouterr().out
    assert "trainable params" in said and "peft-reft generate" in said
    config = LoReftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.positions, config.layers, config.tie, config.dropout) == (
        2,
        "f2+l2",
        [0, -1],
        "group",
        0.1,
    )
    moved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in moved.items() if name.endswith(".b"))
    out = str(tmp_path / "out")
    assert main(["generate", out, "a b c", "d e", "--max-new-tokens", "4", "--compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "> a b c" and "> d e" in lines and sum(line.startswith("without: ") for line in lines) == 2
    assert main(["inspect", out]) == 0
    said = capsys.readouterr().out
    assert "the first 2 and the last 2 tokens of the prompt" in said and "orthogonality error" in said


@pytest.mark.filterwarnings("ignore")
def test_train_from_yaml(tmp_path, model_id):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model_name_or_path: {model_id}\ndataset_name: {rows_file(tmp_path)}\noutput_dir: {tmp_path / 'out'}\n"
        "max_steps: 1\nuse_cpu: true\nbf16: false\nr: {'0': 2, '1-': 3}\npositions: {'0': f2, '1-': l1}\ngate: true\n"
    )
    assert main(["train", "--config", str(path), "--intervention", "nodireft", "--act_fn", "relu"]) == 0
    config = LoReftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.positions) == ({"0": 2, "1-": 3}, {"0": "f2", "1-": "l1"})
    assert (config.intervention, config.act_fn, config.gate) == ("nodireft", "relu", True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", ["[4, 9]", '{"embed_tokens": [9]}'])
def test_train_tokens(tokens, tmp_path, model_id, tokenizer):
    assert main(train_arguments(tmp_path, model_id, trainable_token_indices=tokens)) == 0
    assert LoReftConfig.from_pretrained(tmp_path / "out").trainable_token_indices == json.loads(tokens)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (rows,) = [tensor for name, tensor in saved.items() if "token_adapter" in name]
    before = AutoModelForCausalLM.from_pretrained(model_id).get_input_embeddings().weight
    assert tokenizer.decode([9]) == "a"  # which stands in the rows
    assert not torch.equal(rows[-1], before[9])


@pytest.mark.filterwarnings("ignore")
def test_train_a_module_named_by_a_word(tmp_path, model_id):
    assert main(train_arguments(tmp_path, model_id, modules_to_save="lm_head", max_steps="1")) == 0
    assert LoReftConfig.from_pretrained(tmp_path / "out").modules_to_save == ["lm_head"]


def test_interrupted_training_goes_on_where_it_stopped(tmp_path, model_id):
    arguments = train_arguments(tmp_path, model_id, max_steps="200", logging_steps="1")
    running = forked.start(SCRIPT, *arguments)
    running.wait_for("'loss'")
    os.kill(running.process.pid, signal.SIGINT)
    running.wait()
    assert running.returncode == 130, running.stderr[-3000:]
    step = int(re.search(r"Stopped after step (\d+)", running.stdout)[1])
    assert 1 <= step < 200 and "Traceback" not in running.stderr
    state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["global_step"] == step
    arguments = train_arguments(tmp_path, model_id, max_steps=str(step + 1))
    again = forked.run(SCRIPT, *arguments, "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_generate_is_what_the_model_says(adapter, model_id, tokenizer, capsys):
    assert main(["generate", adapter, "a b c d", "--raw", "--max-new-tokens", "5"]) == 0
    said = capsys.readouterr().out.strip()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_id), adapter).eval()
    inputs = tokenizer("a b c d", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == tokenizer.decode(expected, skip_special_tokens=True).strip()


def says(adapter, **fields):
    """Write fields into the saved config, as a training run does at its end."""
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def answer(model_id, adapter, inputs):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_id), adapter).eval()
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]


MARKS = [[4, 8]]  # <|im_start|> assistant


@pytest.mark.parametrize(
    "template, flags, in_chat_template",
    [
        (None, [], True),
        (None, ["--raw"], False),
        ([], [], False),
        ([], ["--chat-template"], True),
        (MARKS, [], True),
        (MARKS, ["--raw"], False),
    ],
)
def test_generate_asks_as_the_training_data_did(
    template, flags, in_chat_template, adapter, model_id, tokenizer, capsys
):
    says(adapter, response_template=template)
    assert main(["generate", adapter, "a b c d", "--max-new-tokens", "6", *flags]) == 0
    said = capsys.readouterr()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b c d"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    raw = tokenizer("a b c d", return_tensors="pt")
    in_chat, as_it_is = (
        tokenizer.decode(answer(model_id, adapter, inputs), skip_special_tokens=True).strip() for inputs in (chat, raw)
    )
    assert in_chat != as_it_is
    assert said.out.strip() == (in_chat if in_chat_template else as_it_is)
    assert ("does not say" in said.err) is (template is None and not flags)


CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"].strip()}],
    }
    for row in ROWS
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rows", "is_chat"), [(ROWS, False), (CHATS, True)], ids=["prompts", "chats"])
def test_generate_asks_as_train_has_trained(rows, is_chat, tmp_path, model_id, tokenizer, capsys):
    """Training saves at its end whether each document was a chat, or one prompt and one answer."""
    (tmp_path / "data").mkdir()
    data = rows_file(tmp_path / "data", rows)
    assert main(train_arguments(tmp_path, model_id, dataset_name=data, learning_rate="0.1")) == 0
    hint = capsys.readouterr().out
    out = str(tmp_path / "out")
    config = LoReftConfig.from_pretrained(out)
    assert bool(config.response_template) is is_chat and config.response_template is not None
    assert main(["generate", out, "a b c", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr().out.strip()
    chat = [{"role": "user", "content": "a b c"}]
    given = dict(return_tensors="pt", return_dict=True)
    raw = tokenizer("a b c", return_tensors="pt")
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **given) if is_chat else raw
    assert said == tokenizer.decode(answer(model_id, out, inputs), skip_special_tokens=True).strip()
    assert f"peft-reft generate {out}" in hint and ("without a chat template" in hint) is not is_chat


def test_generate_without_a_chat_template(adapter, model_id, tokenizer, capsys):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model_id)
    (Path(model_id) / "chat_template.jinja").unlink(missing_ok=True)
    assert main(["generate", adapter, "a b", "--max-new-tokens", "2"]) == 0
    assert "Assumed: it was not" in capsys.readouterr().err
    says(adapter, response_template=MARKS)
    assert main(["generate", adapter, "a b", "--max-new-tokens", "2"]) == 1
    assert "no chat template" in capsys.readouterr().err
    assert main(["chat", adapter]) == 1
    assert "no chat template" in capsys.readouterr().err


def test_generate_refuses_what_it_cannot_answer(adapter, capsys):
    assert main(["generate", adapter, "a b", "", "--raw"]) == 1
    assert "empty" in capsys.readouterr().err
    says(adapter, task_type="SEQ_CLS")
    assert main(["generate", adapter, "a b"]) == 1
    assert "task_type='SEQ_CLS'" in capsys.readouterr().err


def as_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_generate_answers_a_file(kind, adapter, tmp_path, capsys):
    """Batches of rows get the answers that each prompt gets alone."""
    rows = [
        {"prompt": prompt, "id": str(number)} for number, prompt in enumerate(["a b c d", "e f", "g h i", "j", "k l"])
    ]
    path, output = tmp_path / f"rows.{kind}", tmp_path / "answers.jsonl"
    data = Dataset.from_list(rows)
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](path)
    limit = ["--max-new-tokens", "5", "--raw"]
    assert main(["generate", adapter, "--file", str(path), "--output", str(output), "--batch-size", "2", *limit]) == 0
    said = capsys.readouterr()
    assert f"Wrote {output}, 5 rows" in said.out and "5/5" in said.err
    answers = as_lines(output)
    assert [{"prompt": row["prompt"], "id": row["id"]} for row in answers] == rows
    for row in answers:
        assert main(["generate", adapter, row["prompt"], *limit]) == 0
        assert capsys.readouterr().out.strip() == row["generated"]
    assert len({row["generated"] for row in answers}) > 2


def test_generate_answers_chats_and_other_columns(adapter, model_id, tokenizer, tmp_path, capsys):
    chat = [{"role": "user", "content": "a b c"}]
    question = chat[0]["content"]
    for name, row, more in [
        ("prompts", {"prompt": chat}, []),
        ("messages", {"messages": [*chat, {"role": "assistant", "content": "d"}]}, []),
        ("columns", {"question": question, "answer": "d"}, ["--prompt-column", "question", "--chat-template"]),
    ]:
        (tmp_path / name).mkdir()
        path = rows_file(tmp_path / name, [row])
        assert main(["generate", adapter, "--file", path, "--max-new-tokens", "4", "--compare", *more]) == 0
        said = json.loads(capsys.readouterr().out)
        expected = answer(
            model_id,
            adapter,
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True),
        )[:4]
        assert said.pop("generated") == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert said.pop("generated_without") and said == row


@pytest.mark.parametrize(
    "row, more, said",
    [
        ({"question": "a", "answer": "b"}, [], "give --prompt_column question"),
        ({"prompt": ""}, [], "row 1: no prompt"),
        ({"prompt": "a"}, ["--prompt-column", "ask"], "--prompt_column ask"),
        ({"prompt": "a"}, ["--output", "none/answers.jsonl"], "no folder none"),
        ({"prompt": "a"}, ["--output", "rows.jsonl"], "is the file that --file names"),
        ({"prompt": [{"role": "user", "content": "a"}]}, ["--raw"], "--raw"),
    ],
)
def test_generate_refuses_files_that_it_cannot_answer(row, more, said, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path, [row])
    assert main(["generate", adapter, "--file", "rows.jsonl", *more]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "A prompt is missing"),
        (["a", "--file", "rows.jsonl"], "exclude each other"),
        (["a", "--output", "x.jsonl"], "go with --file"),
        (["--file", "rows.josnl"], "Did you mean rows.jsonl?"),
    ],
)
def test_generate_needs_prompts_or_a_file(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path)
    assert main(["generate", "no-adapter", *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["prompts", "chats"])
def test_evaluate_is_the_evaluation_of_training(rows, tmp_path, model_id, monkeypatch, capsys):
    """The loss is TRL's, and the matches are the answers that `generate` gives."""
    from peft_reft.cli import train

    losses = []
    monkeypatch.setattr(
        train.SaveOnInterrupt, "on_evaluate", lambda *_, metrics, **__: losses.append(metrics["eval_loss"])
    )
    path = rows_file(tmp_path, rows)
    given = dict(eval_strategy="steps", eval_steps="60", max_steps="60", test_file=path, learning_rate="0.1")
    assert main(train_arguments(tmp_path, model_id, dataset_name=path, **given)) == 0
    out = str(tmp_path / "out")
    capsys.readouterr()
    assert main(["evaluate", out, "--file", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 8 and found["loss"] == pytest.approx(losses[-1], rel=1e-4)
    assert main(["generate", out, "--file", path, "--max-new-tokens", "8"]) == 0
    generated = [json.loads(line)["generated"] for line in capsys.readouterr().out.splitlines()]
    expected = [row["completion"].strip() if rows is ROWS else row["completion"][0]["content"] for row in rows]
    assert found["matches"] == sum(map(str.__eq__, generated, expected))
    assert found["exact_match"] == found["matches"] / 8
    assert found["tokens"] == 4 * (3 + 2) + 8  # words, and the token that ends each
    assert main(["evaluate", out, "--file", path, "--compare", "--batch-size", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"with: loss {found['loss']:.4f}") and lines[1].startswith("without: loss")


def test_evaluate_with_other_columns(adapter, tmp_path, capsys):
    path = rows_file(tmp_path, [{"question": "a b", "answer": "c"}])
    assert main(["evaluate", adapter, "--file", path]) == 1
    assert "--prompt_column question --completion_column answer" in capsys.readouterr().err
    names = ["--prompt-column", "question", "--completion-column", "answer"]
    assert main(["evaluate", adapter, "--file", path, "--raw", *names]) == 0
    assert "of 1 rows" in capsys.readouterr().out
    path = rows_file(tmp_path, [{"messages": [{"role": "user", "content": "a"}]}])
    assert main(["evaluate", adapter, "--file", path]) == 1
    assert "row 1: no completion" in capsys.readouterr().err


def test_chat_ends_with_an_empty_line(adapter, monkeypatch, capsys):
    said = iter(["a b", "c d", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert main(["chat", adapter, "--max-new-tokens", "3"]) == 0
    told = capsys.readouterr()
    assert len(told.out.strip().splitlines()) >= 1 and "Assumed: it was." in told.err


def test_chat_with_an_adapter_of_raw_prompts(adapter, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    says(adapter, response_template=[])
    assert main(["chat", adapter]) == 1
    assert "without a chat template" in capsys.readouterr().err
    assert main(["chat", adapter, "--chat-template"]) == 0
    says(adapter, response_template=MARKS)
    assert main(["chat", adapter]) == 0
    assert "does not say" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "response, instruction, words",
    [("[]", "[]", "without a chat template"), ("[[4, 8]]", "[[4, 7], [4, 6]]", "in the chat template")],
)
def test_train_says_how_to_ask(response, instruction, words, tmp_path, model_id, capsys):
    given = {"max_steps": "1", "response_template": response, "instruction_template": instruction}
    assert main(train_arguments(tmp_path, model_id, **given)) == 0
    said = capsys.readouterr().out
    assert f"peft-reft generate {tmp_path / 'out'}" in said and words in said
    config = LoReftConfig.from_pretrained(tmp_path / "out")
    assert config.response_template == json.loads(response)
    assert config.instruction_template == json.loads(instruction)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "chat" in capsys.readouterr().out


def test_inspect_as_json(adapter, capsys):
    assert main(["inspect", adapter, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    model = load_file(Path(adapter) / "adapter_model.safetensors")
    assert said["parameters"] == sum(tensor.numel() for tensor in model.values())
    assert said["config"]["positions"] == "f2+l1"
    key = next(name for name in model if name.endswith(".W"))
    layer = next(row for row in said["layers"] if row["module"] in key)
    assert layer["|W|"] == pytest.approx(model[key].norm().item()) and layer["orthogonality error"] < 1e-5
    assert layer["|W - R|"] == pytest.approx((model[key] - model[key.replace(".W", ".R")]).norm().item())


def test_show_positions(model_id, capsys):
    arguments = ["show-positions", "a b c d e", "--tokenizer", model_id, "--positions", "f1+l2"]
    assert main(arguments) == 0
    assert "[f1: a" in capsys.readouterr().out
    assert main([*arguments[:-1], '{"0": "f1", "1-": "l1"}', "--chat"]) == 0
    assert "layers 1-: l1" in capsys.readouterr().out


def test_convert_there_and_back(tmp_path, capsys):
    source = str(PARITY / "pyreft" / "loreft_untied")
    ours, theirs, steer = (str(tmp_path / name) for name in ("ours", "theirs", "steer"))
    assert main(["convert", "--from", "pyreft", source, ours, "--positions", "f2+l2"]) == 0
    assert "for another family give --base" in capsys.readouterr().out
    assert main(["convert", "--to", "pyreft", ours, theirs]) == 0
    assert "'f2+l2'" in capsys.readouterr().out
    assert {p.name for p in Path(theirs).iterdir()} == {p.name for p in Path(source).iterdir()}
    assert main(["convert", "--to", "easysteer", ours, steer]) == 0
    adapters = str(PARITY / "adapters" / "nodireft")
    arguments = ["convert", "--from", "adapters", adapters, str(tmp_path / "from_adapters")]
    assert main(arguments) == 1
    assert "intervention" in capsys.readouterr().err
    assert main([*arguments, "--intervention", "nodireft"]) == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", [None, "lm_head", "wte", "ln_f"])
@pytest.mark.filterwarnings("ignore:.*(tie|tied)")
def test_export(trained, tied, tmp_path, tokenizer):
    sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, pad_token_id=0)
    base = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoReftConfig(
        task_type="CAUSAL_LM",
        r=2,
        positions="all",
        component="mlp",
        init_weights=False,
        modules_to_save=trained and [trained],
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*linear maps without a bias")
def test_export_says_why_not(tmp_path, adapter, model_id, capsys):
    assert main(["export", adapter, str(tmp_path / "whole")]) == 1
    assert "cannot be merged" in capsys.readouterr().err
    fields = dict(task_type="CAUSAL_LM", r=2, positions="all", component="mlp", init_weights=False)
    base = build("mistral")  # whose config cannot say that its MLP has biases, as Llama's can
    base.save_pretrained(tmp_path / "mistral")
    AutoTokenizer.from_pretrained(model_id).save_pretrained(tmp_path / "mistral")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "mistral")
    get_peft_model(base, LoReftConfig(**fields)).save_pretrained(str(tmp_path / "mlp"))
    assert main(["export", str(tmp_path / "mlp"), str(tmp_path / "whole")]) == 1
    assert "would lose model.layers.0.mlp.down_proj.bias" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["inspect", "/no/such/folder"], "no folder"),
        (["generate", "/no/such/folder", "hello"], "/no/such/folder"),
        (["convert", "--from", "pyreft", "x", "y"], "--positions is missing"),
        (["convert", "--from", "pyreft", "x", "y", "--positions", "q7"], "no folder"),
        (["train", "--output_dir", "x"], "--model_name_or_path is missing"),
        (["train", "--model_name_or_path", "./no/model", "--dataset_name", "x"], "no file or folder ./no/model"),
        (["show-positions", "a", "--tokenizer", "/no/such/folder"], "no file or folder /no/such/folder"),
        (["show-positions", "a", "--tokenizer", ".", "--positions", "{0"], "{0 is no JSON"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_errors_are_a_line_without_a_traceback(arguments, said, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") <= 3


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["convert", "a", "b"], ["inspect", "a", "--nonsense"]])
def test_wrong_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_names_the_options(capsys):
    for arguments in ([], ["convert"], ["generate"], ["train"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0
    said = capsys.readouterr().out
    for words in ("--learning_rate", "--load_in_4bit", "--positions", "Exit codes", "--act-fn", "evaluate"):
        assert words in said


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["nonsense"]])
def test_help_imports_nothing_heavy(arguments):
    """Neither torch nor this package, whose import registers with PEFT: nothing but Python's own modules."""
    command = [sys.executable, "-X", "importtime", "-c", entry_point(), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "usage: peft-reft" in done.stdout + done.stderr
    body = ast.parse((ROOT / "peft_reft_cli.py").read_text()).body
    at_import = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    at_import += [node.module for node in body if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in at_import} <= set(sys.stdlib_module_names)
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "argparse" in imported and "peft_reft_cli" in imported
    assert not imported & {"torch", "peft", "transformers", "trl", "datasets", "numpy", "peft_reft"}


def test_help_of_train_begins_with_what_people_need(capsys):
    def shown(option):
        with pytest.raises(SystemExit) as stopped:
            main(["train", option])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        return text, re.findall(r"^  --(\w+)", text, re.MULTILINE)

    text, names = shown("--help")
    ten = ["model_name_or_path", "dataset_name", "output_dir", "r", "positions", "learning_rate", "num_train_epochs"]
    ten += ["per_device_train_batch_size", "eval_strategy", "test_split_size"]
    assert names[:10] == ten
    assert {"layers", "intervention", "prompt_column", "load_in_4bit", "help_all"} <= {*names}
    assert "gradient_checkpointing" not in names and len(names) < 50 and "--help_all lists" in text
    for untrue in ("lora", "use_dora", "use_peft", "only with LoRA", "will be ignored"):
        assert untrue not in text
    all_text, all_names = shown("--help_all")
    assert all_names[:10] == ten and "gradient_checkpointing" in all_names and len(all_names) > 150
    assert len(all_names) == len({*all_names})
    assert "only with LoRA" not in all_text and "--lora" not in all_text


def test_inspect_orders_layers_by_number(tmp_path, tokenizer, capsys):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=11, n_head=2))
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    modules = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("transformer.h")]
    assert modules == [f"transformer.h.{number}" for number in range(11)]
    assert main(["inspect", str(tmp_path / "adapter"), "--json"]) == 0
    assert [row["module"] for row in json.loads(capsys.readouterr().out)["layers"]] == modules


def test_inspect_survives_a_reader_that_goes(adapter):
    # Its reader goes as `| head` does, once it has its lines.
    gone = "import os; reads, writes = os.pipe(); os.close(reads); os.dup2(writes, 1)\n"
    done = forked.run(gone + entry_point(), "inspect", adapter)
    assert done.returncode == 141
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr and "peft-reft:" not in done.stderr


def test_the_installed_script():
    done = forked.run(SCRIPT, "inspect", "/no/such/folder", COLUMNS="100")
    assert done.returncode == 1 and "no folder" in done.stderr and done.stdout == ""


def test_exec_runs_other_programs_with_the_method_registered(tmp_path):
    """A file, a module, a console script: each with its own arguments, exit code, errors."""
    (tmp_path / "beside.py").write_text("WORD = 'beside'")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, beside\nfrom peft import PeftType\n"
        "print(__name__, beside.WORD, sys.argv, 'LOREFT' in PeftType.__members__)\n"
        "if sys.argv[1] == 'fails': raise ValueError('its own error')\nsys.exit(3)"
    )
    done = forked.run(SCRIPT, "exec", str(program), "a", "--help", "-m", "--traceback")
    assert done.returncode == 3
    assert done.stdout == f"__main__ beside {[str(program), 'a', '--help', '-m', '--traceback']} True\n"
    failed = forked.run(SCRIPT, "exec", str(program), "fails")
    assert failed.returncode == 1 and "Traceback" in failed.stderr and "ValueError: its own error" in failed.stderr
    table = tmp_path / "table.json"
    table.write_text('{"a":1}')
    assert forked.run(SCRIPT, "exec", "-m", "json.tool", "--compact", str(table)).stdout == '{"a":1}\n'
    assert forked.run(SCRIPT, "exec", "pytest", "--version").stdout.startswith("pytest ")


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "expected a console script"), (["-m"], "expected a module"), (["no_such", "--x"], "exec no_such: expected")],
)
def test_exec_says_what_it_can_run(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["exec", *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_train_under_accelerate_launch(tmp_path, model_id):
    """Two processes on the CPU save one adapter and print each line once."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "peft_reft.cli",
    ]
    arguments = train_arguments(tmp_path, model_id, max_steps="2", per_device_train_batch_size="2")
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trainable params") == 1 and done.stdout.count("Saved to") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def changed_config(**fields):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def first_tensor_of_another_shape(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, min(tensors): torch.zeros(7)}, path)


@pytest.mark.parametrize(
    "damage, file",
    [
        (written("adapter_config.json", '{"peft_type": "LOR'), "adapter_config.json"),
        (written("adapter_config.json", ""), "adapter_config.json"),
        (written("adapter_config.json", "[1]"), "adapter_config.json"),
        (changed_config(peft_type="NONESUCH"), "adapter_config.json"),
        (changed_config(positions="q7"), "adapter_config.json"),
        (written("adapter_model.safetensors", "short"), "adapter_model.safetensors"),
        (lambda folder: save_file({}, folder / "adapter_model.safetensors"), "adapter_model.safetensors"),
        (first_tensor_of_another_shape, "adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    ],
)
def test_a_damaged_adapter_is_a_line_that_names_the_file(damage, file, adapter, capsys):
    damage(Path(adapter))
    assert main(["inspect", adapter]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and file in error
    assert main(["generate", adapter, "a"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("peft-reft: ") and adapter in last


def test_a_base_model_of_another_size_is_a_line(adapter, tmp_path, tokenizer, capsys):
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert main(["generate", adapter, "a", "--base", str(tmp_path / "gpt2")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"peft-reft: {adapter}")


def test_a_base_model_that_is_not_where_the_author_had_it(adapter, tmp_path, capsys):
    """The reader's own `--base` needs no such hint."""
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/home/author/tiny"}))
    assert main(["generate", adapter, "a"]) == 1
    error = capsys.readouterr().err
    assert f"{adapter} names /home/author/tiny as its base model. If yours is elsewhere, give --base." in error
    assert main(["generate", adapter, "a", "--base", str(tmp_path / "nowhere")]) == 1
    assert "give --base" not in capsys.readouterr().err


def test_a_damaged_tokenizer_is_not_replaced_by_that_of_the_base_model(adapter, capsys):
    written("tokenizer_config.json", "{")(Path(adapter))
    assert main(["generate", adapter, "a"]) == 1
    assert "tokenizer_config.json cannot be loaded" in capsys.readouterr().err
