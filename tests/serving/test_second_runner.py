"""vLLM's second model runner, its default on GPUs. `make test-vllm RUNNER=2` runs the whole folder on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.engines import SECOND_RUNNER

HERE = Path(__file__).parent
TESTS = ["test_engines.py::test_preemption", "test_graphs.py::test_the_last_token_of_a_prompt_alone"]


@pytest.mark.skipif(SECOND_RUNNER, reason="all tests run on it")
@pytest.mark.cell("Serving with vLLM", "vLLM's second model runner")
def test_second_runner():
    """Two tests in which the runners differ most: lengths that grow by preemption, and how a graph is chosen."""
    env = dict(
        os.environ,
        VLLM_USE_V2_MODEL_RUNNER="1",
        TRITON_INTERPRET="1",
        PYTHONPATH=os.pathsep.join([str(HERE / "triton_on_cpu"), os.environ.get("PYTHONPATH", "")]),
    )
    command = [sys.executable, "-m", "pytest", "-W", "default", *[str(HERE / test) for test in TESTS]]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(TESTS)} passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
