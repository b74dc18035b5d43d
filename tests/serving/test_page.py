"""The Python code of docs/serving.md runs, and prints what the page says."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serving.engines import make

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.mark.slow
def test_page(tmp_path, small_tokenizer):
    served = make("llama", str(tmp_path))
    small_tokenizer.save_pretrained(served.folder)
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    os.rename(served.folder, tmp_path / "outputs" / "SmolLM2-135M-Instruct")
    served.folder = str(tmp_path / "outputs" / "SmolLM2-135M-Instruct")
    os.rename(served.add("one", positions="f2+l2"), tmp_path / "outputs" / "quickstart" / "adapter")
    os.rename(served.add("two", positions="f2+l2"), tmp_path / "outputs" / "mine")
    code = "\n".join(re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # else the code would have to stand below `__main__`
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    emoji, plain = ast.literal_eval(re.search(r"^\[.*'.*\]$", done.stdout, re.MULTILINE)[0])
    assert emoji != plain
    for promised in re.findall(r"^# (\[.*)$", code, re.MULTILINE):
        assert promised in done.stdout
