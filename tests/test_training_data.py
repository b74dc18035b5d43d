"""`peft-reft train` checks its arguments and its rows before it loads a model."""

import dataclasses
import json

import pytest
from datasets import Dataset
from test_cli import ROWS, rows_file, train_arguments

pytest.importorskip("trl")
import trl
from peft import PeftConfig
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from peft_reft import LoReftConfig, LoReftRuntimeConfig
from peft_reft.cli import train
from peft_reft.cli.arguments import check_path
from peft_reft.cli.methods import METHODS
from peft_reft.cli.rows import check_columns
from peft_reft.cli.train_arguments import build_parser
from peft_reft_cli import main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def trained_on(monkeypatch):
    """Return the rows that reach the trainer, (training, evaluation), without training."""
    seen = []

    class Reached(Exception):
        pass

    def trainer(train_dataset, eval_dataset, **kwargs):
        seen.append((train_dataset, eval_dataset))
        raise Reached

    for method in METHODS.values():
        monkeypatch.setattr(trl, method.trainer, trainer)

    def run(arguments):
        with pytest.raises(Reached):
            main(arguments)
        return seen[-1]

    return run


def refusal(arguments, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def prompts(rows):
    return [row["prompt"] for row in rows]


OF_LORA = sorted(
    field.name for field in dataclasses.fields(ModelConfig) if field.name.startswith(("lora", "use_peft", "use_dora"))
)


@pytest.mark.parametrize("flag", [*OF_LORA, "use_rslora"])
def test_arguments_for_lora_are_refused_by_name(flag, tmp_path, capsys):
    error = refusal(train_arguments(tmp_path, "no-model", **{flag: "1"}), capsys)
    assert f"--{flag}" in error and "LoRA" in error


@pytest.mark.parametrize("words", [["--lora-r", "8"], ["--lora_r=8"], ["--lora_target_modules", "q_proj", "v_proj"]])
def test_arguments_for_lora_however_they_are_written(words, tmp_path, capsys):
    assert "LoRA" in refusal([*train_arguments(tmp_path, "no-model"), *words], capsys)


def test_arguments_for_lora_in_a_file(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("lora_r: 8\nuse_peft: true\n")
    error = refusal(train_arguments(tmp_path, "no-model", config=str(path)), capsys)
    assert "--lora_r" in error and "--use_peft" in error and "give --r" in error


def test_every_argument_of_trl_is_used_or_refused():
    """A new field of TRL's is refused until somebody looks at it."""
    taken = {action.dest for action in build_parser()._actions}
    model = {field.name for field in dataclasses.fields(ModelConfig)}
    assert model - taken == {*OF_LORA, "use_rslora"}
    assert {field.name for field in dataclasses.fields(ScriptArguments)} - taken == {"ignore_bias_buffers"}
    assert {field.name for field in dataclasses.fields(DatasetMixtureConfig)} <= taken
    assert {field.name for field in dataclasses.fields(LoReftConfig)} - taken == {
        "runtime_config",
        *(field.name for field in dataclasses.fields(PeftConfig)),
    }
    assert {field.name for field in dataclasses.fields(LoReftRuntimeConfig)} <= taken


@pytest.mark.parametrize(
    "given, said",
    [
        ({"nonsense": "1"}, "Unknown arguments: --nonsense 1"),
        ({"ignore_bias_buffers": "true"}, "--ignore_bias_buffers"),
        ({"bnb_4bit_quant_type": "fp4"}, "--bnb_4bit_quant_type fp4 goes with --load_in_4bit"),
        ({"use_bnb_nested_quant": "true", "load_in_8bit": "true"}, "--use_bnb_nested_quant"),
        ({"load_in_4bit": "true", "load_in_8bit": "true"}, "--load_in_4bit and --load_in_8bit"),
        ({"dataset_name": None}, "--dataset_name is missing"),
        ({"dataset_config": "en"}, "--dataset_config en"),
        ({"streaming": "true"}, "give --dataset_streaming"),
        ({"dataset_train_split": "dev"}, "--dataset_train_split dev"),
        ({"test_split_size": "0.5"}, "--eval_strategy"),
        ({"do_eval": "true"}, "--eval_strategy"),
        ({"eval_strategy": "epoch", "test_split_size": "80"}, "--test_split_size 80"),
        ({"eval_strategy": "epoch", "test_file": "none.jsonl"}, "There is no file none.jsonl"),
        ({"prompt_column": "ask"}, "--prompt_column ask"),
        ({"completion_column": "tell"}, "has the columns ['completion', 'prompt']"),
        ({"trainable_token_indices": "many"}, "--trainable_token_indices 'many' is no JSON. Expected list[int]"),
        ({"response_template": "<|im_start|>"}, "--response_template '<|im_start|>' is no JSON"),
        ({"config": "none.yaml"}, "none.yaml"),
    ],
)
def test_refused_before_a_model_is_loaded(given, said, tmp_path, capsys):
    assert said in refusal(train_arguments(tmp_path, "no-model", **given), capsys)


def test_an_evaluation_without_rows_names_the_ways_out(tmp_path, capsys):
    error = refusal(train_arguments(tmp_path, "no-model", eval_strategy="steps", eval_steps="1"), capsys)
    for way in ("['train']", "--test_split_size", "--test_file", "--dataset_test_split", "folder"):
        assert way in error


@pytest.mark.parametrize("size, held_out", [("0.25", 2), ("3", 3)])
def test_rows_are_held_out(size, held_out, tmp_path, trained_on):
    path = tmp_path / "numbered.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p {n}", "completion": " c"}) for n in range(8)))
    given = dict(dataset_name=str(path), eval_strategy="epoch", test_split_size=size)
    train, test = trained_on(train_arguments(tmp_path, "no-model", **given))
    assert len(test) == held_out
    assert sorted(prompts(train) + prompts(test)) == [f"p {n}" for n in range(8)]
    again, _ = trained_on(train_arguments(tmp_path, "no-model", **given))
    assert prompts(again) == prompts(train)  # as every process of a distributed run must draw them


def test_rows_to_evaluate_on_from_a_folder_and_from_a_second_file(tmp_path, trained_on, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "folder" / "test.jsonl").write_text(json.dumps(ROWS[1]))
    folder = train_arguments(tmp_path, "no-model", dataset_name=str(tmp_path / "folder"), eval_strategy="epoch")
    train, test = trained_on(folder)
    assert len(train) == len(ROWS) and prompts(test) == [ROWS[1]["prompt"]]
    pair = train_arguments(
        tmp_path, "no-model", eval_strategy="epoch", test_file=str(tmp_path / "folder" / "test.jsonl")
    )
    train, test = trained_on(pair)
    assert len(train) == len(ROWS) and prompts(test) == [ROWS[1]["prompt"]]
    assert "already" in refusal([*folder, "--test_split_size", "0.5"], capsys)
    assert "exclude" in refusal([*pair, "--test_split_size", "0.5"], capsys)
    train, test = trained_on(train_arguments(tmp_path, "no-model"))
    assert test is None


def test_it_trains_and_evaluates(tmp_path, model_id, monkeypatch):
    losses = []
    monkeypatch.setattr(
        train.SaveOnInterrupt, "on_evaluate", lambda *_, metrics, **__: losses.append(metrics["eval_loss"])
    )
    given = dict(eval_strategy="steps", eval_steps="1", test_split_size="0.25", max_steps="2")
    assert main(train_arguments(tmp_path, model_id, **given)) == 0
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.csv", "prompt,completion\na b,1 2\nc,3 d\n"),
        ("rows.tsv", "prompt\tcompletion\na b\t1 2\nc\t3 d\n"),
        ("rows.json", json.dumps([{"prompt": "a b", "completion": "1 2"}, {"prompt": "c", "completion": "3 d"}])),
    ],
)
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_kinds_of_files(name, text, streaming, tmp_path, trained_on):
    (tmp_path / name).write_text(text)
    given = dict(dataset_name=str(tmp_path / name), dataset_streaming=streaming)
    train, _ = trained_on(train_arguments(tmp_path, "no-model", **given))
    assert list(train) == [{"prompt": "a b", "completion": "1 2"}, {"prompt": "c", "completion": "3 d"}]


def test_a_parquet_file(tmp_path, trained_on):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    train, _ = trained_on(train_arguments(tmp_path, "no-model", dataset_name=str(tmp_path / "rows.parquet")))
    assert list(train) == ROWS


def test_a_mixture(tmp_path, trained_on, capsys):
    settings = tmp_path / "mixture.yaml"
    folder = tmp_path / "folder"
    folder.mkdir()
    rows_file(folder)
    settings.write_text(f"datasets:\n  - path: {folder}\n  - path: {folder}\n")
    mixture = train_arguments(tmp_path, "no-model", dataset_name=None, config=str(settings))
    held_out = [*mixture, "--test_split_size", "4", "--eval_strategy", "epoch"]
    train, test = trained_on(held_out)
    assert (len(train), len(test)) == (2 * len(ROWS) - 4, 4)
    again, _ = trained_on(held_out)
    assert prompts(again) == prompts(train)
    assert "exclude" in refusal([*mixture, "--dataset_name", "more.jsonl"], capsys)
    assert "--streaming" in refusal([*mixture, "--dataset_streaming", "true"], capsys)
    settings.write_text("datasets:\n  - path: none.jsonl\n")
    assert "no file or folder none.jsonl" in refusal(mixture, capsys)
    settings.write_text("datasets:\n  - folder: x\n")
    assert "--config" in refusal(mixture, capsys)


@pytest.mark.parametrize(
    "text, said",
    [
        (
            '{"prompt": "a", "completion": "b"}\n\n{"prompt": a, \n',
            "line 3, column 12: Expecting value. The line begins",
        ),
        ('{"prompt": "a", "comp', "line 1, column 17: Unterminated string starting here. The line begins: {"),
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a"; "completion": "b"}\n]', "line 3, column 15: Expect"),
        ("", "has no rows"),
        ("7\n8\n", "line 1 is 7"),
        ('{"question": "a", "answer": "b"}', "['answer', 'question']"),
        ('{"question": "a", "answer": "b"}', 'Understood are "prompt" and "completion"'),
        ('{"question": "a", "answer": "b"}', "--prompt_column question --completion_column answer"),
        (
            '{"instruction": "a", "input": "", "output": "b"}',
            "--prompt_column instruction input --completion_column output",
        ),
        ('{"ask": "a", "tell": "b"}', "--prompt_column NAME --completion_column NAME, or --dataset_text_field NAME"),
        ('{"prompt": "a"}', "['prompt']"),
        ('{"prompt": "a", "text": "b"}', "['prompt', 'text']"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "Understood are"),
        ('{"prompt": "a", "completion": 3}', "'completion': 3"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "Expected texts, or else lists"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n{"prompt": "d"}', "2, the first is row 2"),
    ],
)
def test_files_that_nobody_could_train_on(text, said, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    error = refusal(train_arguments(tmp_path, "no-model", dataset_name=str(path)), capsys)
    assert said in error and "mine.jsonl" in error


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "id": 3},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "user", "value": "a"}]},
        {"text": "a"},
        {"body": "a"},
        {"input_ids": [3, 4]},
    ],
)
def test_rows_that_are_understood(row):
    check_columns(Dataset.from_list([row]), "mine", text_field="body" if "body" in row else "text")


def test_a_mistyped_name_is_an_immediate_error(tmp_path, monkeypatch, capsys):
    """The Hub is not asked, and the message names what is there."""
    monkeypatch.setattr("peft_reft.cli.data.load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    rows_file(tmp_path)
    for wrong in ("rwos.jsonl", "rows.josnl"):
        error = refusal(train_arguments(tmp_path, "no-model", dataset_name=str(tmp_path / wrong)), capsys)
        assert f"There is no file or folder {tmp_path / wrong}" in error
        assert f"Did you mean {tmp_path / 'rows.jsonl'}?" in error
    monkeypatch.chdir(tmp_path)
    error = refusal(train_arguments(tmp_path, "no-model", dataset_name="rows.josnl"), capsys)
    assert error.endswith("There is no file or folder rows.josnl. Did you mean rows.jsonl?")


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("is_chat", [False, True], ids=["prompts", "chats"])
def test_columns_of_other_names(kind, is_chat, tmp_path, trained_on):
    rows = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "input": None, "output": "4"}]
    path = tmp_path / f"alpaca.{kind}"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind.startswith("json"):
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    else:
        lines = [rows[0].keys(), *(["" if value is None else value for value in row.values()] for row in rows)]
        path.write_text("\n".join(("," if kind == "csv" else "\t").join(line) for line in lines))
    given = dict(dataset_name=str(path), completion_column="output", chat="true" if is_chat else None)
    arguments = [*train_arguments(tmp_path, "no-model", **given), "--prompt_column", "instruction", "input"]
    train, _ = trained_on(arguments)
    pairs = [("a\n\nb", "c"), ("d", "4")]
    if is_chat:
        pairs = [([{"role": "user", "content": p}], [{"role": "assistant", "content": c}]) for p, c in pairs]
    assert list(train) == [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def other_file(tmp_path, rows):
    (tmp_path / "other").mkdir(exist_ok=True)  # `train_arguments` writes rows beside it
    return rows_file(tmp_path / "other", rows)


def test_a_text_beside_prompt_and_completion_is_left_out(tmp_path, trained_on):
    """Alpaca has one. TRL would end it with the EOS token, and not the completion."""
    path = other_file(tmp_path, [{"prompt": "a", "completion": "b", "text": "a b", "id": 3}])
    train, _ = trained_on(train_arguments(tmp_path, "no-model", dataset_name=path))
    assert list(train) == [{"prompt": "a", "completion": "b", "id": 3}]


def test_a_csv_file_is_text(tmp_path, trained_on, capsys):
    """Numbers and words that stand for nothing elsewhere; only an empty cell is none."""
    (tmp_path / "rows.csv").write_text("prompt,completion\n2 + 2,4\nnull or NA,None\n")
    arguments = train_arguments(tmp_path, "no-model", dataset_name=str(tmp_path / "rows.csv"))
    train, _ = trained_on(arguments)
    assert list(train) == [{"prompt": "2 + 2", "completion": "4"}, {"prompt": "null or NA", "completion": "None"}]
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc,\n")
    assert "rows without 'completion': 1, the first is row 2" in refusal(arguments, capsys)


def test_chats_are_made_of_prompts_alone(tmp_path, capsys):
    path = other_file(tmp_path, [{"text": "a"}])
    error = refusal(train_arguments(tmp_path, "no-model", dataset_name=path, chat="true"), capsys)
    assert "--chat true makes messages of prompt and answer" in error


def test_dropped_rows_are_counted(tmp_path, model_id, capsys):
    long = {"prompt": "a b c d e f g h", "completion": " 1 2"}
    path = other_file(tmp_path, [*ROWS, long, long])
    given = dict(dataset_name=path, max_length="8", max_steps="1", eval_strategy="steps", test_file=path)
    assert main(train_arguments(tmp_path, model_id, **given)) == 0
    said = capsys.readouterr().out
    for purpose in ("training", "evaluation"):
        assert f"Dropped 2 of 10 rows for {purpose}: nothing of their answers is within the first 8 tokens" in said
    assert main(train_arguments(tmp_path, model_id, max_steps="1")) == 0
    assert "Dropped" not in capsys.readouterr().out
    path = other_file(tmp_path, [long])
    error = refusal(train_arguments(tmp_path, model_id, dataset_name=path, max_length="8"), capsys)
    assert "Dropped 1 of 1 rows" in error and "--max_length" in error


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.josnl", "data/rows.CSV", "./rows", "/none/rows", "~/rows", "a/b/c", "a\\b"]
)
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match="no file or folder"):
        check_path(name)


@pytest.mark.parametrize("name", ["imdb", "trl-lib/Capybara", "org/data.v2", "."])
def test_what_may_be_on_the_hub_or_is_there(name):
    check_path(name)
