"""Everything that a reader may copy runs: the README's code, the docstrings' examples, the example scripts."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build
from datasets import Dataset
from integration.conftest import PAIRS
from transformers.utils import logging

import peft_reft

ROOT = Path(__file__).parent.parent
MODULES = [f"peft_reft.{module.name}" for module in pkgutil.iter_modules(peft_reft.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    logging.set_verbosity_error()
    results = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert results.failed == 0


def test_public_docstrings_have_examples():
    without = [name for name in peft_reft.__all__ if ">>>" not in (getattr(peft_reft, name).__doc__ or "")]
    assert without == []


@pytest.fixture
def model_id(tmp_path, tokenizer):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.filterwarnings("ignore")  # the reader's warnings are third parties' and not what is tested here
def test_readme(model_id, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS])
    names = {"model_id": model_id, "prompt_completion_data": data, "__name__": "readme"}
    for block in blocks:
        capsys.readouterr()
        exec(block, names)
        for promised in re.findall(r"^# (\[.*)$", block, re.MULTILINE):
            assert promised in capsys.readouterr().out


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
