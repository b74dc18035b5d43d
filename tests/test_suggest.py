"""`peft-reft suggest`, the table of rules, and the page that shows it."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import build
from peft import get_peft_model
from test_cli import rows_file

pytest.importorskip("trl")
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

from peft_reft import LoReftConfig
from peft_reft.cli.facts import kind_of, model_facts
from peft_reft.cli.lengths import Lengths, shares
from peft_reft.cli.rules import RULES, rate_text, rule_for, table
from peft_reft.cli.train_arguments import parse
from peft_reft_cli import main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_has_the_rules():
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    header = page.index("| `--task` |")
    assert page[header:].split("\n\n")[0].splitlines()[2:] == table()


def test_rules_can_be_used():
    tasks = [rule.task for rule in RULES]
    assert len(set(tasks)) == len(tasks)
    for rule in RULES:
        LoReftConfig(task_type="CAUSAL_LM", **rule.fields())
        for name in rule.evidence.split(", "):
            assert not name.startswith("results/") or (ROOT / "docs" / name).is_file()
    for form, kinds in {"labels": ["encoder", "decoder"], "prompts": ["decoder", "encoder-decoder"]}.items():
        for kind in kinds:
            assert rule_for(None, kind, form, 10_000, 20, 5)[0].chosen == "data"


@pytest.mark.parametrize("rate, text", [(1e-3, "1e-3"), (9e-4, "9e-4"), (0.015, "1.5e-2"), (0.3, "3e-1")])
def test_rates_are_written_as_people_do(rate, text):
    assert rate_text(rate) == text and float(text) == rate


def lengths(prompt, answer, form="prompts"):
    return Lengths(form, len(prompt), np.array(prompt), np.array(answer))


@pytest.mark.parametrize(
    "positions, tokens, prefix",
    [
        ("f7+l7", (4 + 14) / 40, 0),
        ("l7", (2 + 7) / 40, (2 + 13) / 24),  # a short prompt keeps half of it
        ("l2~1+g", (2 + 2 + 6 + 10) / 40, (1 + 17) / 24),
        ("g2", 4 / 40, 1),
        ("all", 1, 0),
    ],
)
def test_what_a_spec_edits(positions, tokens, prefix):
    """Prompts of 4 and of 20 tokens, answers of 6 and of 10."""
    found = shares(positions, lengths([4, 20], [6, 10]))
    assert found.tokens == pytest.approx(tokens) and found.prefix == pytest.approx(prefix)


def test_the_work_of_a_step():
    """As `tuner.untouched` counts it: a forward for what is untouched, forward and backward for the rest."""
    long = lengths([448], [64])
    assert shares("l7", long).training == pytest.approx((441 + 2 * 71) / (2 * 512))
    assert shares("f7+l7", long).training == 1
    assert shares("l7", lengths([20], [200])).training == 1  # it would not pay
    assert shares("l7", lengths([448], [0], form="labels")).training == 1
    assert shares("g", long).training == pytest.approx((447 + 2 * 65) / (2 * 512))  # the token that predicts the first


def test_a_rule_for_every_kind_of_data():
    def taken(task, *data):
        rule, others = rule_for(task, *data)
        return rule.task, [other.task for other in others]

    assert taken(None, "encoder", "labels", 500, 20, 0) == ("classes", [])
    assert taken(None, "decoder", "prompts", 30, 20, 5) == ("few-rows", [])
    assert taken(None, "decoder", "prompts", None, 20, 5) == ("answers", [])
    assert taken(None, "decoder", "prompts", 31, 256, 64) == ("answers", ["long-prompts", "reasoning"])
    assert taken("long-prompts", "decoder", "prompts", 31, 20, 64) == ("long-prompts", ["reasoning"])
    assert taken("rewards", "decoder", "prompts", 31, 20, 5) == ("rewards", [])
    assert taken(None, "decoder", "texts", 31, 0, 100) == ("texts", [])
    with pytest.raises(ValueError, match=r"--task classes is not for a decoder.*Possible: few-rows, long-prompts"):
        rule_for("classes", "decoder", "prompts", 31, 20, 5)
    with pytest.raises(ValueError, match="no rule for an encoder and rows of prompts"):
        rule_for(None, "encoder", "prompts", 31, 20, 5)


@pytest.mark.parametrize(
    "name, kind", [("llama", "decoder"), ("gpt2", "decoder"), ("gemma3", "decoder"), ("bert", "encoder")]
)
def test_kinds_of_models(name, kind):
    model = build(name)
    assert kind_of(model.config) == kind
    model.config.architectures = None
    assert kind_of(model.config) == kind


def test_kinds_of_other_models():
    assert kind_of(T5Config()) == "encoder-decoder"
    assert kind_of(AutoConfig.for_model("bert", is_decoder=True)) == "decoder"
    assert kind_of(AutoConfig.for_model("modernbert")) == "encoder"
    with pytest.raises(ValueError, match="model_type='vit'"):
        kind_of(AutoConfig.for_model("vit"))


@pytest.mark.parametrize("fields", [dict(r=3), dict(r=2, positions="f2+l2", tie="group"), dict(r=2, tie="model")])
def test_parameters_are_counted_without_weights(fields, model_id):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_id), LoReftConfig(task_type="CAUSAL_LM", **fields)
    )
    assert model_facts(model_id).trained(fields) == model.get_nb_trainable_parameters()[0]


def suggestion(capsys, *words):
    assert main(["suggest", *map(str, words)]) == 0
    return capsys.readouterr().out


ANSWERS = [{"prompt": "a b c d e f g h i j k l", "completion": " 1 2 3"}] * 40


def test_suggest_for_prompts_and_answers(model_id, tmp_path, capsys):
    path = rows_file(tmp_path, ANSWERS)
    said = suggestion(capsys, model_id, path)
    for words in ("a decoder, 3 blocks of width 32", "40 rows: prompts of 12 tokens, answers of 4", "Task    answers"):
        assert words in said, said
    last = [line for line in said.splitlines() if line.startswith("peft-reft train")]
    words = shlex.split(last[0])[2:]
    _, args, model, _, config = parse("train", words)
    assert (config.positions, config.r, args.learning_rate, args.max_steps) == ("f7+l7", 8, 4.2e-2, 300)
    assert "why    1e-3 fitted to the edited layers" in said  # 1e-3 * 2000 / (3 * sqrt(8 * 32))
    assert args.warmup_steps == 30 and model.model_name_or_path == model_id
    for setting in ("positions f7+l7", "r 8", "learning_rate 4.2e-2", "max_steps 300", "warmup_steps 30"):
        place = said.splitlines().index(setting)
        assert [line.split()[0] for line in said.splitlines()[place + 1 : place + 3]] == ["why", "costs"]
    assert "80% of the tokens are edited" not in said and "75% of the tokens are edited" in said  # 12 of 16


def test_suggest_as_json_with_arguments_of_train(model_id, tmp_path, capsys):
    path = rows_file(tmp_path, [{"q": row["prompt"], "a": row["completion"]} for row in ANSWERS])
    more = ["--prompt_column", "q", "--completion_column", "a", "--r", "2", "--per_device_train_batch_size", "4"]
    found = json.loads(suggestion(capsys, model_id, path, "--json", "--task", "long-prompts", *more))
    assert found["task"] == "long-prompts" and found["config"]["positions"] == "l7"
    assert found["data"] == {"form": "prompts", "rows": 40, "prompt": 12.0, "answer": 4.0, "classes": None}
    assert found["model"]["kind"] == "decoder" and found["parameters"] == 3 * (2 * 8 * 32 + 8)
    assert found["shares"]["training"] == pytest.approx((5 + 2 * 11) / 32) and found["shares"]["prefix"] == 5 / 12
    _, args, _, _, config = parse("train", shlex.split(found["command"])[2:])
    assert (config.positions, config.r, args.per_device_train_batch_size) == ("l7", 2, 4)  # what was given stays
    assert args.learning_rate == float(f"{1e-3 * 2000 / (3 * math.sqrt(2 * 32)):.1e}")  # and the rate fits it


def test_suggest_for_long_answers(model_id, tmp_path, capsys):
    """Another formula, with a rate of its own; a formula that somebody gives has its own rate as well."""
    words = [model_id, rows_file(tmp_path, ANSWERS), "--task", "reasoning"]
    said = suggestion(capsys, *words)
    assert "\nintervention nodireft\n" in said and "3e-3 fitted" in said
    for more, intervention, lr in [([], "nodireft", 3e-3), (["--intervention", "loreft"], "loreft", 1e-3)]:
        found = json.loads(suggestion(capsys, *words, *more, "--json"))
        _, args, _, _, config = parse("train", shlex.split(found["command"])[2:])
        assert (config.intervention, config.positions, config.r) == (intervention, "all", 4)
        assert args.learning_rate == float(f"{lr * 2000 / (3 * math.sqrt(4 * 32)):.1e}")


def test_a_model_whose_norms_amplify_edits_gets_a_fifth_of_the_rate(model_id, tokenizer, tmp_path, capsys):
    build("gemma3").save_pretrained(tmp_path / "gemma3")
    tokenizer.save_pretrained(tmp_path / "gemma3")
    rows, rates = rows_file(tmp_path, ANSWERS), []
    for name in (str(tmp_path / "gemma3"), model_id):
        rates.append(json.loads(suggestion(capsys, name, rows, "--json"))["training"]["learning_rate"])
        assert ("1/5 of it" in suggestion(capsys, name, rows)) == (len(rates) == 1)
    assert rates[0] == pytest.approx(rates[1] / 5, rel=0.05), "the models are of equal size"


def test_a_file_of_settings_stays(model_id, tmp_path, capsys):
    """What it sets is not set again by the command, and the rate fits it."""
    (tmp_path / "settings.yaml").write_text("r: 2\nlayers: 0\n")
    words = [model_id, rows_file(tmp_path, ANSWERS), "--json", "--config", tmp_path / "settings.yaml"]
    found = json.loads(suggestion(capsys, *words))
    _, args, _, _, config = parse("train", shlex.split(found["command"])[2:])
    assert (config.r, config.layers) == (2, 0) and "--r " not in found["command"]
    assert args.learning_rate == float(f"{1e-3 * 2000 / math.sqrt(2 * 32):.1e}")


def test_suggest_for_a_classifier(tmp_path, tokenizer, capsys):
    build("bert").base_model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    path = rows_file(tmp_path, [{"text": "a b c d", "label": number % 3} for number in range(1000)])
    said = suggestion(capsys, tmp_path / "encoder", path)
    for words in (
        "an encoder, 3 blocks",
        "1,000 rows: texts of 4 tokens in 3 classes",
        "learning_rate 1e-3",
        "SEQ_CLS",
        "optimizers=(create_loreft_optimizer(model, lr=1e-3), None)",
    ):
        assert words in said, said
    assert "max_steps 375" in said and "peft-reft train" not in said  # three times 1,000 rows, 8 in a step
    assert main(["suggest", str(tmp_path / "encoder"), rows_file(tmp_path, ANSWERS)]) == 1
    assert "no 'text'" in capsys.readouterr().err


def test_suggest_for_chats_and_texts(model_id, tmp_path, capsys):
    turn = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d e"}]
    found = json.loads(suggestion(capsys, model_id, rows_file(tmp_path, [{"messages": turn * 2}] * 40), "--json"))
    # <|im_start|> user a b <|im_end|> <|im_start|> assistant c d e <|im_end|>, twice; the last answer has four tokens
    assert (found["data"]["prompt"], found["data"]["answer"]) == (18, 4)
    found = json.loads(suggestion(capsys, model_id, rows_file(tmp_path, [{"text": "a b c"}] * 40), "--json"))
    assert found["config"]["positions"] == "all" and found["shares"]["tokens"] == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["--task", "poems"], "--task poems is not for a decoder"),
        (["--task", "classes"], "no 'text'"),
        (["--nonsense", "1"], "Unknown arguments: --nonsense 1"),
        (["--prompt_column", "ask"], "--prompt_column ask"),
    ],
)
def test_suggest_refuses(words, said, model_id, tmp_path, capsys):
    assert main(["suggest", model_id, rows_file(tmp_path), *words]) == 1
    assert said in capsys.readouterr().err
