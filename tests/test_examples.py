"""Everything that a reader may copy runs: the README's code, the docstrings' examples, the example scripts."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build
from datasets import Dataset
from integration.conftest import PAIRS
from transformers.utils import logging

import peft_reft
from peft_reft.cli.main import main as peft_reft_command

ROOT = Path(__file__).parent.parent
MODULES = [
    module.name
    for module in pkgutil.walk_packages(peft_reft.__path__, "peft_reft.")
    if module.name != "peft_reft.serving.endpoints"  # needs what vLLM brings along; tests/serving has it
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
    """README's table of files has every module and room; docs/api.md has every public name."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page.partition("| file in `peft_reft/` |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines()[2:] for name in re.findall("`([a-z_./]+)`", line.split("|")[1])}
    found = {path.name for path in (ROOT / "peft_reft").glob("*.py")}
    found |= {f"{path.parent.name}/" for path in (ROOT / "peft_reft").glob("*/__init__.py")}
    assert named == found
    api = re.findall(r"^::: peft_reft\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(api) == sorted(peft_reft.__all__)


@pytest.fixture
def model_id(tmp_path, tokenizer):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
WITH_CODE = [page for page in PAGES if re.search("```(python|bash)", page.read_text(encoding="utf-8"))]


@pytest.mark.filterwarnings("ignore")  # the reader's warnings are third parties' and not what is tested here
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_pages(page, model_id, tmp_path, monkeypatch, capsys):
    """The code runs, and prints what comments below a `print` say."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS])
    names = {"model_id": model_id, "prompt_completion_data": data, "__name__": "page"}
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    Path("mine.jsonl").write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in PAIRS))
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


def test_quickstart(model_id, tmp_path):
    """On a tiny model, for two steps: train, save, reload in a new process, same answers."""
    lines = tmp_path / "train.jsonl"
    lines.write_text('{"prompt": "a b", "completion": "1 2"}\n{"prompt": "c", "completion": "3"}\n')
    command = [sys.executable, "examples/quickstart.py", "--model", model_id, "--train-file", str(lines)]
    command += ["--output", str(tmp_path / "out"), "--steps", "2", "--ask", "a b c", "d"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for words in ("Before:", "After:", "trainable params: 780", "KiB of weights", "the same answers"):
        assert words in done.stdout, done.stdout


def run_example(*command):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_das_equality(tmp_path):
    command = ["examples/das_equality.py", "--steps", "3", "--align-steps", "3", "--layers", "0"]
    out = run_example(*command, "--output", str(tmp_path))
    assert "trained   layer 0:" in out and "random    layer 0:" in out


@pytest.mark.slow
def test_das_finds_the_variables_where_they_are_and_nowhere_else(tmp_path):
    run_example("examples/das_equality.py", "--layers", "0", "--output", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy of the network"] > 0.98
    assert results["interchange accuracy, trained"]["0"] > 0.95
    assert results["interchange accuracy, random"]["0"] < 0.6


def test_metamathqa(tmp_path):
    """PEFT's script gets a folder that it can read, in a process that knows the method."""
    folder = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(
        "import json, sys; from peft import PeftConfig\n"
        "config = PeftConfig.from_pretrained(sys.argv[-1])\n"
        "print(config.peft_type.value, config.r, config.positions)\n"
        "print(json.load(open(sys.argv[-1] + '/training_params.json')))\n"
    )
    out = run_example("examples/metamathqa.py", "--peft", str(tmp_path / "peft"), "--r", "3")
    assert "LOREFT 3 all\n{'optimizer_kwargs': {'lr': 0.0009}}" in out
