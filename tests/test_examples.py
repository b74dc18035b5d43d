"""Everything that a reader may copy runs: the README's code, the docstrings' examples, the example scripts."""

import ast
import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import forked
import pytest
from conftest import build, randomise
from datasets import Dataset
from integration.conftest import PAIRS
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import peft_reft
from peft_reft import LoReftConfig, LoReftRuntimeConfig
from peft_reft.edits import formulas
from peft_reft.edits.formulas import INTERVENTIONS
from peft_reft_cli import main as peft_reft_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = [
    module.name
    for module in pkgutil.walk_packages(peft_reft.__path__, "peft_reft.")
    # These need what vLLM brings along, or ms-swift, or axolotl; tests/serving, ms_swift and with_axolotl have them.
    if not module.name.startswith(
        ("peft_reft.serving.endpoints", "peft_reft.integrations.swift", "peft_reft.integrations.axolotl")
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    logging.set_verbosity_error()
    results = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert results.failed == 0


def test_public_docstrings_have_examples():
    without = [name for name in peft_reft.__all__ if ">>>" not in (getattr(peft_reft, name).__doc__ or "")]
    assert without == []


def test_pages_list_what_there_is():
    """README's file tree has every module and room, and every folder; docs/api.md has every public name."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\n(peft_reft/ .*?)```", page, re.DOTALL)[1].splitlines()
    rooms = {line.split()[0] for line in tree if line.startswith("  ")}
    found = {path.name for path in (ROOT / "peft_reft").glob("*.py")}
    found |= {f"{path.parent.name}/" for path in (ROOT / "peft_reft").glob("*/__init__.py")}
    assert rooms == found
    folders = {line.split()[0] for line in tree if not line.startswith(" ")}
    assert folders == {
        "peft_reft_cli.py",
        *(f"{name}/" for name in ("peft_reft", "tests", "examples", "experiments", "benchmarks", "docs")),
    }
    assert all((ROOT / name).exists() for name in folders)
    assert all(len(line.split()) > 1 for line in tree), "each has a line that says what it is"
    api = re.findall(r"^::: peft_reft\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(api) == sorted(peft_reft.__all__)


def test_readme_is_short_and_has_the_two_commands():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) < 130
    assert "make quickstart" in page and "make test" in page


def test_the_reference_has_every_field_with_its_default():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    tables = page.split("| field | default |")[1:3]
    for config, table in zip((LoReftConfig(), LoReftRuntimeConfig()), tables, strict=True):
        rows = table.partition("\n\n")[0]
        documented = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", rows, re.MULTILINE))
        assert documented.pop("runtime_config", None) == ("LoReftRuntimeConfig()" if len(documented) > 3 else None)
        own = {*inspect.get_annotations(type(config))} - {"runtime_config"}  # without those of PEFT's base class
        defaults = {field.name: getattr(config, field.name) for field in fields(config) if field.name in own}
        assert {name: ast.literal_eval(default) for name, default in documented.items()} == defaults


def test_the_pages_have_every_formula():
    """A new formula is in the table of docs/formulas.md, in the reference, and in the docstrings of config and module.

    No page counts formulas, so no count goes stale.
    """
    names = [*INTERVENTIONS]
    pages = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    table = pages["formulas.md"].partition("| `intervention` |")[2].partition("\n\n")[0]
    (row,) = re.findall(r"^\| `intervention` \|.*?\|(.*)\|$", pages["reference.md"], re.MULTILINE)
    paragraph = LoReftConfig.__doc__.partition("intervention: The formula")[2].partition("act_fn:")[0]
    in_module = re.findall(r"^(\w+) +\S|`(\w+)`", formulas.__doc__, re.MULTILINE)
    found = {
        "the table of docs/formulas.md": re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE),
        "the row `intervention` of docs/reference.md": re.findall(r"`(\w+)`", row),
        "the paragraph `intervention` of LoReftConfig's docstring": re.findall(r'`"(\w+)"`', paragraph),
        "the docstring of edits/formulas.py": [
            name for name in names if name in {one or two for one, two in in_module}
        ],
    }
    wrong = [f"{text} has {found[text]}" for text in found if found[text] != names]
    assert not wrong, "\n".join([f"The formulas are {names}, in this order.", *wrong])
    counts = r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d+) (?:other )?(?:formulas|others)\b"
    for name, page in pages.items():
        assert not re.search(counts, page, re.IGNORECASE), f"{name} counts formulas"


WIDTH = 88
"""Columns of a page that a reader sees without scrolling; docs/ruff.toml has the same number."""


def code_lines(page):
    """Each line of the code blocks of a page, fenced or indented, with its number."""
    fenced = in_list = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            yield number, line
        elif re.match(r"(\d+\.|[-*]) ", line):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        elif line.startswith("    ") and not in_list:
            yield number, line


def test_code_blocks_are_no_wider_than_the_page():
    wide = [
        f"{page.name}:{number}: {len(line)} columns"
        for page in PAGES
        for number, line in code_lines(page)
        if len(line) > WIDTH
    ]
    assert wide == []
    assert f"line-length = {WIDTH}\n" in (ROOT / "docs" / "ruff.toml").read_text(encoding="utf-8")


def test_wide_code_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n    a\n\n```text\nb\n```\n\n1. item\n\n    no code\n\n    ```text\n    c\n    ```\n")
    assert list(code_lines(page)) == [(3, "    a"), (6, "b"), (14, "    c")]


RATE = 1e-3
"""The one recommendation: docs/choosing.md, "Learning rate", measured by experiments/rates.py."""
OTHER_RATES = {
    ("examples/quickstart.py", 4e-3): "ten rows, 30 steps",
    ("docs/serving.md", 4e-3): "one row, 20 steps",
    ("docs/server.md", 4e-3): "one row, 20 steps",
    ("examples/das_equality.py", 2e-3): "trains a whole network",
    ("examples/das_equality.py", 5e-3): "distributed alignment search: trains R alone",
    ("docs/interchange.md", 1e-2): "the same",
    ("docs/with_lora.md", 1e-2): "LoRA of rank 1 beside it: the best of the search in docs/worth.md",
}
"""Where another rate stands, and why."""
MEASURED = {"docs/init_weights.md", "docs/recipes.md"}
"""Pages that show which rates an experiment tried, and which did best there."""


def rates_of(text):
    """The learning rates that a page or script sets or names."""
    number = r"(\d+(?:\.\d+)?e-\d+|0\.0\d+)"
    setting = rf"(?:learning[_-]rate|\blr)\b[^.|\n]{{0,30}}?{number}"
    prose = rf"learning rate\b[^.|`]{{0,60}}?\b{number}"
    return {float(rate) for rate in re.findall(setting, text) + re.findall(prose, text, re.IGNORECASE)}


def test_pages_and_examples_agree_on_the_learning_rate():
    found = set()
    for path in [*PAGES, *EXAMPLES, *(ROOT / "peft_reft").rglob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        if name in MEASURED:
            continue
        found |= {(name, rate) for rate in rates_of(path.read_text(encoding="utf-8"))}
    assert {(name, rate) for name, rate in found if rate != RATE} == set(OTHER_RATES)
    recommend = {"README.md", "docs/index.md", "docs/trainers.md", "docs/choosing.md", "docs/coming_from.md"}
    recommend |= {"peft_reft/cli/train_arguments.py"}  # the command's default
    assert recommend <= {name for name, rate in found if rate == RATE}


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("SFTConfig(learning_rate=9e-3, max_steps=2)", {9e-3}),
        ("peft-reft train --learning_rate 4e-3 --max_steps 2", {4e-3}),
        ('add_argument("--learning-rate", type=float, default=9e-4)', {9e-4}),
        ("Adam(parameters, lr=0.01)", {0.01}),
        ("Take a learning rate of\n3e-4. The loss is 1e-5.", {3e-4}),
        ("no rate: 1e-5", set()),
    ],
)
def test_rates_are_found(text, rates):
    assert rates_of(text) == rates


def test_contributing_names_tests_that_there_are():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert named
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test


@pytest.fixture
def model_id(tmp_path, tokenizer):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


WITH_CODE = [page for page in PAGES if re.search("```(python|bash)", page.read_text(encoding="utf-8"))]


@pytest.mark.filterwarnings("ignore")  # the reader's warnings are third parties' and not what is tested here
@pytest.mark.parametrize(
    "page",
    # Of what stands in deploying.md, test_deploying.py and integration/ have quick tests.
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name == "deploying.md"), id=page.name) for page in WITH_CODE],
)
def test_pages(page, model_id, tmp_path, monkeypatch, capsys):
    """The code runs, and prints what comments below a `print` say."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS])
    names = {"model_id": model_id, "prompt_completion_data": data, "__name__": "page"}
    for folder in ("tests", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in PAIRS]
    Path("mine.jsonl").write_text("\n".join(rows))
    Path("held_out.jsonl").write_text("\n".join(rows[:2]))
    pairs = [{"prompt": prompt, "chosen": answer, "rejected": " 0"} for prompt, answer in PAIRS]
    write_lines(Path("pairs.jsonl"), pairs)
    Path("alpaca.csv").write_text("instruction,input,output\na b,c,d\ne,,f\n")
    for language, block in blocks:
        capsys.readouterr()
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                assert words[0] == "peft-reft", line
                words = [model_id if word == "HuggingFaceTB/SmolLM2-135M-Instruct" else word for word in words[1:]]
                assert peft_reft_command(words) == 0, line
            continue
        exec(block, names)
        printed = capsys.readouterr().out
        for promised in re.findall(r"^# ([\[ ].*|layers .*)$", block, re.MULTILINE):
            assert promised in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_stand_alone(path):
    """A reader needs one file, of fewer than 100 lines."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            imported.add(node.module.partition(".")[0])
    assert imported.isdisjoint(each.stem for each in EXAMPLES)
    assert imported.isdisjoint({"examples", "experiments", "tests", "benchmarks"})


def run_example(script, *arguments):
    """Run a script as a reader would; its standard output."""
    done = forked.run(ROOT / script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_chat(prompt, completion):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def test_quickstart(model_id, tmp_path):
    """On a tiny model, for two steps: train, save, reload in a new process, same answers.

    Neither of its two processes prints a warning, a log or a progress bar of another library, not while it imports
    them either: so it gets a new process.
    """
    # The tokenizer's: if they differ, transformers logs it.
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((Path(model_id) / name).read_text())
        write_lines(Path(model_id) / name, [{**settings, "eos_token_id": 2}])
    lines = write_lines(
        tmp_path / "train.jsonl", [{"prompt": "a b", "completion": "1 2"}, {"prompt": "c", "completion": "3"}]
    )
    command = ["examples/quickstart.py", "--model", model_id, "--train-file", lines, "--output", tmp_path / "out"]
    command += ["--steps", 2, "--ask", "a b c", "d"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    out, err = done.stdout, done.stderr
    for words in ("trainable params: 780", "KiB of weights", "the same answers", "about ", "5/5", "step 2 of 2"):
        assert words in out, out
    first, second = out.split("\n\n")[-2:]  # it ends with question, answer before, answer after
    for question, block in {"a b c": first, "d": second}.items():
        assert re.fullmatch(rf"{question}\n    before .*\n    after .*\n?", block), out
    assert err.startswith("LoReFT edits the tokens in brackets."), err
    assert len(err.splitlines()) == 3, err
    own = r"Teaching|[1-5]/5 |trainable params|    (step|It gives|before|after)|a b c$|d$|$"
    assert [line for line in out.splitlines() if not re.match(own, line)] == []


@pytest.mark.slow
def test_ask(tmp_path, adapter):
    out = run_example("examples/ask.py", adapter, "a b", "c")
    assert len(out.splitlines()) == 2


@pytest.fixture
def adapter(model_id, tmp_path):
    """The folder of an adapter of the model at `model_id`, with its tokenizer."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), LoReftConfig(task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    PreTrainedTokenizerFast.from_pretrained(model_id).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_sft_chat(model_id, tmp_path):
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": as_chat(*pair) * 2} for pair in PAIRS])
    out = run_example("examples/sft_chat.py", model_id, data, tmp_path / "out", "--steps", 2)
    assert "before: " in out and "after: " in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["response_template"], "the headers of the chat template are saved"


def test_classifier(tmp_path, tokenizer):
    build("bert").base_model.save_pretrained(tmp_path / "encoder")  # without a head, which has the task's labels
    tokenizer.save_pretrained(tmp_path / "encoder")
    data = write_lines(tmp_path / "texts.jsonl", [{"text": p, "label": n % 2} for n, (p, _) in enumerate(PAIRS)])
    out = run_example("examples/classifier.py", tmp_path / "encoder", data, tmp_path / "out", "--steps", 2)
    assert "accuracy on 2 held-out texts" in out and "It gives class" in out


def test_dpo(model_id, tmp_path):
    rows = [{"prompt": p, "chosen": f" {c}", "rejected": " z"} for p, c in PAIRS]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    out = run_example("examples/dpo.py", model_id, data, tmp_path / "out", "--steps", 2)
    assert "margin of rewards: 0.000 at the first step" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_qlora(tmp_path, tokenizer):
    # Without gradients bitsandbytes' CPU kernel wants widths that its blocks of 64 divide.
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_lines(tmp_path / "rows.jsonl", [{"prompt": p, "completion": f" {c}"} for p, c in PAIRS])
    out = run_example("examples/qlora.py", tmp_path / "model", data, tmp_path / "out", "--steps", 2)
    assert "The base takes" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_many_adapters(adapter):
    """The same adapter twice answers twice the same, beside the base in the same batch."""
    out = run_example("examples/many_adapters.py", "a b c", adapter, adapter, "--tokens", 4)
    base, first, second = [line.partition(": ")[2] for line in out.splitlines()]
    assert first == second != base


def test_das_equality():
    out = run_example("examples/das_equality.py", "--steps", 3, "--align-steps", 3, "--layers", 0)
    assert "trained   layer 0:" in out and "random    layer 0:" in out


@pytest.mark.slow
def test_das_finds_the_variables_where_they_are_and_nowhere_else():
    out = run_example("examples/das_equality.py", "--layers", 0)
    network, trained, random = [float(number) for number in re.findall(r"([\d.]+)%", out)]
    assert network > 98
    assert trained > 95
    assert random < 60
