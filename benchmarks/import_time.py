"""Milliseconds that imports take: python benchmarks/import_time.py

`import peft_reft` after `import peft`; `import peft` alone; and `peft-reft --help`, which needs neither. Medians of 7
processes, with bytecode compiled beforehand, as pip leaves it.
"""

import os
import statistics
import subprocess
import sys
import tempfile

TIMED = "import time; t = time.perf_counter(); {}; print(1e3 * (time.perf_counter() - t), file=sys.stderr)"
HELP = "from peft_reft_cli import build_parser; build_parser().print_help()"
CODE = {
    "import peft_reft, after peft": "import sys, peft; " + TIMED.format("import peft_reft"),
    "import peft": "import sys; " + TIMED.format("import peft"),
    "peft-reft --help": "import sys; " + TIMED.format(HELP),
}


def median(code: str) -> float:
    runs = []
    for _ in range(8):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
        runs.append(float(done.stderr.splitlines()[-1]))
    return statistics.median(runs[1:])


with tempfile.TemporaryDirectory() as folder:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = folder
    medians = {name: median(code) for name, code in CODE.items()}
for name, milliseconds in medians.items():
    print(f"{milliseconds:6.0f} ms  {name}")
print(f"{medians['peft-reft --help'] / medians['import peft']:9.3f}  of `import peft`: peft-reft --help")
