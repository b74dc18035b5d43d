"""Milliseconds that `import peft_reft` takes after `import peft`: python benchmarks/import_time.py

Median of 7 processes, with bytecode compiled beforehand, as pip leaves it.
"""

import os
import statistics
import subprocess
import sys
import tempfile

CODE = "import peft, time; t = time.perf_counter(); import peft_reft; print(1e3 * (time.perf_counter() - t))"

with tempfile.TemporaryDirectory() as folder:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = folder
    runs = [subprocess.check_output([sys.executable, "-W", "ignore", "-c", CODE], env=env) for _ in range(8)][1:]
    print(f"{statistics.median(map(float, runs)):.0f} ms")
