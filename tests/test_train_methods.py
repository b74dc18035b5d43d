"""`peft-reft dpo`, `kto`, `reward`, `grpo`, `rloo`, `distillation`: TRL's scripts with LoReFT."""

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import pytest
from conftest import build
from safetensors.torch import load_file
from test_cli import ROWS, rows_file, train_arguments

pytest.importorskip("trl")
import trl
from trl import ModelConfig

from peft_reft import LoReftConfig
from peft_reft.cli import train
from peft_reft.cli.methods import METHODS
from peft_reft.cli.train_arguments import ModelArguments, build_parser
from peft_reft_cli import TRAINING, main

pytestmark = pytest.mark.filterwarnings("ignore")

SECTION = "Trainers: preferences and reinforcement"
PAIRS = [
    {"prompt": "a b c d", "chosen": " 1 2", "rejected": " 3"},
    {"prompt": "e f", "chosen": " 4", "rejected": " 5"},
]
JUDGED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": bool(n)} for n, row in enumerate(PAIRS)]
PROMPTS = [{"prompt": row["prompt"], "wanted": "1"} for row in PAIRS]
DATA = dict(dpo=PAIRS, kto=JUDGED, reward=PAIRS, grpo=PROMPTS, rloo=PROMPTS, distillation=PROMPTS, train=ROWS)
ROLLOUTS = dict(max_completion_length="4")
MORE = {
    "dpo": dict(max_length="16"),
    "kto": {},
    "reward": {},
    "grpo": dict(ROLLOUTS, num_generations="2", reward_funcs="my_rewards.with_wanted"),
    "rloo": dict(ROLLOUTS, num_generations="2", reward_funcs="my_rewards.with_wanted"),
    "distillation": ROLLOUTS,
    "train": {},
}
OF_LORA = {field.name for field in dataclasses.fields(ModelConfig)} - {
    field.name for field in dataclasses.fields(ModelArguments)
}
OTHERS = sorted(METHODS.keys() - {"train"})


def arguments(command, tmp_path, model, rows=None, **more):
    """The words of a command; in the working directory stands a file with rewards."""
    (tmp_path / "data").mkdir(exist_ok=True)
    data = rows_file(tmp_path / "data", (DATA[command] if rows is None else rows) * 4)
    given = {**MORE[command], "dataset_name": data, "max_steps": "2", "learning_rate": "0.01", **more}
    return [command, *train_arguments(tmp_path, model, **given)[1:]]


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def with_wanted(completions, wanted, **kwargs):\n"
        "    return [float(n % 2) for n, (answer, word) in enumerate(zip(completions, wanted))]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # undone when the test ends, unlike what the command does


def teacher(command, tmp_path, tokenizer):
    if command != "distillation":
        return {}
    build("llama", seed=1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return {"teacher_model_name_or_path": str(tmp_path / "teacher")}


def refusal(words, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [pytest.param(each, marks=[] if each == "dpo" else pytest.mark.slow) for each in OTHERS]
)
@pytest.mark.cell(SECTION, "`peft-reft {command}`: TRL's script of that name")
def test_it_trains(command, tmp_path, model_id, tokenizer, rewards, capsys):
    more = teacher(command, tmp_path, tokenizer)
    assert main(arguments(command, tmp_path, model_id, **more)) == 0
    said = capsys.readouterr().out
    assert "trainable params" in said and f"Saved to {tmp_path / 'out'}" in said
    config = LoReftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.positions) == (2, "f2+l2")
    assert config.task_type == ("SEQ_CLS" if command == "reward" else "CAUSAL_LM")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = [name for name, tensor in saved.items() if name.endswith(".b") and tensor.abs().sum() > 0]
    assert moved and any("score" in name for name in saved) is (command == "reward")


@pytest.mark.slow
def test_a_reward_model_gives_rewards(tmp_path, model_id, rewards, capsys):
    """What `reward` says at its end works: its folder is a reward of `grpo`."""
    assert main(arguments("reward", tmp_path, model_id)) == 0
    assert f"--reward_model_name_or_path {tmp_path / 'out'}" in capsys.readouterr().out
    (tmp_path / "policy").mkdir()
    given = dict(output_dir=str(tmp_path / "policy"), reward_model_name_or_path=str(tmp_path / "out"))
    assert main(arguments("grpo", tmp_path, model_id, reward_funcs=None, **given)) == 0
    assert (tmp_path / "policy" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", METHODS)
def test_it_has_every_argument_of_trls_script(command):
    """A new field of TRL's is refused until somebody looks at it."""
    assert METHODS.keys() == TRAINING.keys()
    taken = {action.dest for action in build_parser(command)._actions}
    script = import_module(f"trl.scripts.{METHODS[command].script}")
    of_trl = {field.name for each in script.make_parser().dataclass_types for field in dataclasses.fields(each)}
    ignored = set() if command == "dpo" else {"ignore_bias_buffers"}  # which TRL's script for DPO alone reads
    assert of_trl - taken == OF_LORA | ignored
    assert {field.name for field in dataclasses.fields(LoReftConfig)} & taken >= {"r", "positions", "layers"}


def test_every_script_of_trl_that_trains_has_a_command():
    folder = Path(import_module("trl.scripts").__file__).parent
    scripts = {path.stem for path in folder.glob("[a-z]*.py")} - {"utils", "env", "vllm_serve"}
    assert scripts == {method.script for method in METHODS.values()}


@pytest.mark.parametrize("command", OTHERS)
@pytest.mark.parametrize("flags", [{"use_peft": "true"}, {"lora_r": "8", "lora_target_modules": "q_proj"}])
def test_arguments_for_lora_are_refused(command, flags, tmp_path, capsys):
    error = refusal(arguments(command, tmp_path, "no-model", **flags), capsys)
    assert all(f"--{flag}" in error for flag in flags) and "LoRA" in error


def test_a_yaml_file_as_trl_reads_it(tmp_path, model_id, capsys):
    """`env`, the trainer's arguments, and LoReFT's beside them; LoRA's are refused there, too."""
    (tmp_path / "data").mkdir()
    settings = {
        "model_name_or_path": model_id,
        "dataset_name": rows_file(tmp_path / "data", PAIRS),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "beta": 0.2,
        "use_cpu": True,
        "bf16": False,
        "positions": {"0": "f2", "1-": "l1"},
        "r": 3,
        "env": {"LOREFT_OF_A_TEST": 1},
    }
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(settings))  # which is YAML
    assert main(["dpo", "--config", str(path), "--r", "2"]) == 0
    config = LoReftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.positions) == (2, {"0": "f2", "1-": "l1"})
    path.write_text(json.dumps({**settings, "use_peft": True, "lora_r": 8}))
    error = refusal(["dpo", "--config", str(path)], capsys)
    assert "--use_peft" in error and "--lora_r" in error


@pytest.mark.parametrize(
    "command, rows, more, said",
    [
        ("dpo", ROWS, {}, "has the columns ['completion', 'prompt']. Understood are \"chosen\" and \"rejected\"."),
        ("kto", PROMPTS, {}, '"prompt" and "completion" and "label", or "chosen" and "rejected"'),
        ("grpo", [{"question": "a"}], {}, "give --prompt_column NAME"),
        ("reward", [PAIRS[0], {**PAIRS[1], "rejected": None}], {}, "rows without 'rejected': 4, the first is row 2"),
        ("kto", [{**JUDGED[0], "label": "False"}], {}, "has 'label': 'False'. Expected true or false"),
        ("dpo", PAIRS, {"completion_column": "chosen"}, "Unknown arguments: --completion_column"),
        ("grpo", PROMPTS, {"ignore_bias_buffers": "true"}, "Unknown arguments: --ignore_bias_buffers"),
        ("grpo", PROMPTS, {"reward_funcs": "nonsense"}, "--reward_funcs nonsense: expected accuracy_reward"),
        ("grpo", PROMPTS, {"reward_funcs": "my_rewards.nonsense"}, "--reward_funcs my_rewards.nonsense: module"),
        ("grpo", PROMPTS, {"reward_funcs": "nowhere.nonsense"}, "No module named 'nowhere'"),
        ("grpo", PROMPTS, {"reward_model_name_or_path": "./none"}, "no file or folder ./none"),
        ("distillation", PROMPTS, {}, "--teacher_model_name_or_path is missing"),
        ("distillation", PROMPTS, {"teacher_model_name_or_path": "./none"}, "no file or folder ./none"),
        ("kto", JUDGED, {"eval_strategy": "epoch"}, "Give --test_split_size 0.1"),
        ("kto", JUDGED, {"num_processes": "2"}, "accelerate launch ... -m peft_reft.cli kto"),
        ("reward", [{"chosen": "a", "rejected": "b"}], {"chat": "true"}, "--chat true makes messages of prompt"),
    ],
)
def test_refused_before_a_model_is_loaded(command, rows, more, said, tmp_path, rewards, capsys):
    assert said in refusal(arguments(command, tmp_path, "no-model", rows, **more), capsys)


def test_rewards_are_asked_for(tmp_path, capsys):
    words = arguments("grpo", tmp_path, "no-model", reward_funcs=None)
    assert "Give --reward_funcs (accuracy_reward" in refusal(words, capsys)


@pytest.fixture
def made(monkeypatch):
    """Return what a command gives the trainer, without training."""
    seen = {}

    class Reached(Exception):
        pass

    def trainer(**kwargs):
        seen.update(kwargs)
        raise Reached

    for method in METHODS.values():
        monkeypatch.setattr(trl, method.trainer, trainer)

    def run(words):
        seen.clear()
        with pytest.raises(Reached):
            main(words)
        return seen

    return run


def test_what_the_trainer_gets(tmp_path, rewards, made, monkeypatch):
    called = []
    monkeypatch.setattr(train, "rollouts_in_vllm", lambda: called.append(True))
    given = made(arguments("grpo", tmp_path, "no-model", prompt_column="wanted", chat="true"))
    assert given["train_dataset"][0] == {"prompt": [{"role": "user", "content": "1"}]}
    assert [function.__name__ for function in given["reward_funcs"]] == ["with_wanted"] and not called
    made(arguments("grpo", tmp_path, "no-model", use_vllm="true"))
    assert called
    given = made(arguments("dpo", tmp_path, "no-model", chat="true", dtype="bfloat16"))
    assert given["train_dataset"][0] == {
        "prompt": [{"role": "user", "content": "a b c d"}],
        "chosen": [{"role": "assistant", "content": " 1 2"}],
        "rejected": [{"role": "assistant", "content": " 3"}],
    }
    assert given["args"].model_init_kwargs["dtype"] == "bfloat16"
    (tmp_path / "teacher").mkdir()
    folder = str(tmp_path / "teacher")
    given = made(arguments("distillation", tmp_path, "no-model", teacher_model_name_or_path=folder, dtype="bfloat16"))
    assert given["teacher_model"] == folder
    assert given["args"].teacher_model_init_kwargs["dtype"] == "bfloat16"
    for name in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"):
        given = made(arguments("rloo", tmp_path, "no-model", reward_funcs=name))
        assert given["reward_funcs"] == [getattr(import_module("trl.rewards"), name)]
    given = made(arguments("rloo", tmp_path, "no-model", reward_funcs="get_soft_overlong_punishment"))
    (function,) = given["reward_funcs"]
    assert function([[1] * 2000]) == [-1.0]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dpo", "reward", "kto"])
def test_rows_that_are_too_long_are_counted(command, tmp_path, model_id, capsys):
    long = [{**PAIRS[0], "prompt": "a b c d e f g h"}]
    words = arguments(command, tmp_path, model_id, rows=[*PAIRS, *long], max_length="8", max_steps="1")
    assert main(words) == 0
    dropped, of = (8, 24) if command == "kto" else (4, 12)  # TRL makes two rows of a pair for KTO
    assert f"Dropped {dropped} of {of} rows for training" in capsys.readouterr().out


@pytest.mark.parametrize("command", OTHERS)
def test_its_help_is_of_its_trainer(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    config = f"{METHODS[command].trainer.removesuffix('Trainer')}Config"
    assert f"usage: peft-reft {command} " in said and f"those of TRL's {config}" in said
    assert all(f"--{name}" in said for name in ("positions", "test_file", *METHODS[command].needed))
    assert "--lora" not in said and "use_peft" not in said
