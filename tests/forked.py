"""Scripts in processes of their own, without waiting each time for torch, transformers, PEFT and TRL.

A new process imports these for about ten seconds. Here one process imports them once, and each script runs in a fork
of it: in a folder of its own, with arguments, an environment, outputs and an exit code of its own. The first process
does not import `peft_reft`. What a script's imports print is not seen here: a test of that starts a process itself.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LIBRARIES = ["torch", "transformers.trainer", "peft", "datasets", "matplotlib.pyplot", "trl.trainer.sft_trainer"]
"""Those that are not installed are passed over."""

METHOD = "forkserver"
_context = multiprocessing.get_context(METHOD)
_context.set_forkserver_preload(LIBRARIES)


@dataclass
class Running:
    """A script that runs. Its outputs are files, so that they can be read before it ends."""

    process: ForkServerProcess
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 600) -> "Running":
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"after {timeout} s:\n{self.stderr[-3000:]}")
        return self

    def wait_for(self, text: str, timeout: float = 600) -> None:
        """Wait until the script has written `text`."""
        until = time.monotonic() + timeout
        while text not in self.stdout + self.stderr:
            assert self.process.is_alive() and time.monotonic() < until, self.stderr[-3000:]
            time.sleep(0.02)


def start(script: Path | str, *arguments: object, cwd: Path = ROOT, **environment: str) -> Running:
    """Start a file, or code, as Python's command starts it, with this package on the path."""
    folder = Path(tempfile.mkdtemp(prefix="script-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    if isinstance(script, str):
        path = folder / "script.py"
        path.write_text(script, encoding="utf-8")
        first = cwd
    else:
        path, first = script.absolute(), script.absolute().parent
    process = _context.Process(
        target=_run,
        args=([str(path), *map(str, arguments)], str(first), str(cwd), str(folder), environment),
    )
    process.start()
    return Running(process, folder)


def run(script: Path | str, *arguments: object, cwd: Path = ROOT, timeout: float = 600, **environment: str) -> Running:
    """`start`, and wait until the script has ended."""
    return start(script, *arguments, cwd=cwd, **environment).wait(timeout)


def _run(argv: list[str], first: str, cwd: str, outputs: str, environment: dict[str, str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(outputs, name), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ |= {"PYTHONPATH": str(ROOT), **environment}
    sys.argv = argv
    # As in a process of its own: without the folders that pytest has put there.
    others = [path for path in sys.path if path and not Path(path).is_relative_to(TESTS)]
    sys.path[:] = [first, str(ROOT), *others]
    runpy.run_path(argv[0], run_name="__main__")
