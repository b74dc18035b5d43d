"""What `make test-gpu` and `make bench-gpu` run on a card, here on the CPU with tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def test_the_tests_of_a_card_pass_on_the_cpu():
    done = run("-m", "pytest", "tests/gpu", PEFT_REFT_GPU_DEVICE="cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout and "card: none" in done.stdout


def test_without_a_card_they_say_so():
    done = run("-m", "pytest", "tests/gpu", PEFT_REFT_GPU_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "No card is found" in done.stdout + done.stderr


def test_figures(tmp_path):
    out, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    page.write_text((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), encoding="utf-8")
    out.write_text(json.dumps({"a card": {"settings": "as then", "shapes": {"8B": {"decode": "does not fit"}}}}))
    done = run(
        *("-W", "ignore", "benchmarks/gpu.py", "--device", "cpu", "--shapes", "tiny", "--rounds", "2"),
        *("--out", out, "--page", page),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["a card"]["settings"] == "as then"  # another card's results stay
    (card,) = found.keys() - {"a card"}
    shapes = found[card]["shapes"]["tiny"]
    assert shapes["training"]["floor"]["over the floor"] == shapes["decode"]["base"]["over the base"] == 1
    assert {"LoReFT r=4 l7, untouched_prompt='on'", "floor"} < shapes["untouched"].keys()
    text = page.read_text(encoding="utf-8")
    assert f"| {card}, tiny: LoReFT r=4 f7+l7 | " in text and "8B does not fit on a card" in text
    assert text.startswith("# GPUs") and "<!-- end of the figures -->" in text
