"""CPU time in LoReFT's own code, of a training step, a prefill and a decoded token: `make bench-own`.

    python benchmarks/own.py [--times 10]                     # the package that Python finds
    python benchmarks/own.py --against TREE [--rounds 2]      # this tree and another one, in turns

A difference of two long times has the scatter of both. This is a sum of short times, with hardly any scatter. It
counts what the package adds to a model: its hooks, the methods that it wraps (without the original that they call),
and the backward of its autograd functions. It finds these by the package in which they are defined, so it measures
older versions of the package, too: `git worktree add TREE COMMIT`. It cannot see what LoReFT does to the caches of
others, nor the backward of torch's own operations.

One thread; 12 blocks of SmolLM2's width with small MLPs and a small vocabulary, because the time of these does not
count; fp32; 4 rows of 128 tokens, prompts of 64. About 2 minutes with `--against`.
"""

import argparse
import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGE = "peft_reft"
BLOCKS = 12
VOCAB = 256
SPECS = ("f7+l7", "all")


class OwnTime:
    """CPU seconds of this thread in the package's own code, summed up as calls enter and leave it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_own = False
        """Whether the code that runs now is the package's."""
        self._since = 0.0
        """Reading of the clock when the code that runs now began."""

    def _switch(self, is_own: bool) -> bool:
        """Go on as own code, or as other code. Returns which it was before."""
        now = time.thread_time()
        if self._is_own:
            self.seconds += now - self._since
        before = self._is_own
        self._is_own = is_own
        self._since = now
        return before

    def timed(self, function: Callable[..., Any], is_own: bool) -> Callable[..., Any]:
        """The function, running as own code or as other code."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self._switch(is_own)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(before)

        return run

    @contextmanager
    def watching(self, model: Any, with_optimizer: bool = False) -> Iterator[None]:
        """Within this context the package's code in `model` is timed.

        Args:
            model: a PEFT model with LoReFT adapters.
            with_optimizer: whether AdamW's step counts as own code.
        """
        import torch

        undo: list[Callable[[], None]] = []

        def replace(dictionary: Any, name: Any, function: Any, is_own: bool) -> None:
            undo.append(functools.partial(dictionary.__setitem__, name, function))
            dictionary[name] = self.timed(function, is_own)

        def replace_method(owner: type, name: str, is_own: bool) -> None:
            original = inspect.getattr_static(owner, name)
            if name in vars(owner):
                undo.append(functools.partial(setattr, owner, name, original))
            else:  # inherited
                undo.append(functools.partial(delattr, owner, name))
            timed = self.timed(getattr(owner, name), is_own)
            setattr(owner, name, staticmethod(timed) if isinstance(original, staticmethod) else timed)

        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if defined_in_package(hook):
                        replace(hooks, key, hook, is_own=True)
            for name, value in list(vars(module).items()):
                is_function = isinstance(value, functools.partial | FunctionType | MethodType)
                if is_function and defined_in_package(value):
                    replace(vars(module), name, value, is_own=True)
        for function in autograd_functions():
            replace_method(function, "backward", is_own=True)
        for name in ("forward", "generate", "prepare_inputs_for_generation"):
            replace_method(type(model.get_base_model()), name, is_own=False)
        if with_optimizer:
            replace_method(torch.optim.AdamW, "step", is_own=True)
        try:
            yield
        finally:
            for each in reversed(undo):
                each()


def defined_in_package(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").partition(".")[0] == PACKAGE


def autograd_functions() -> list[type]:
    """The package's subclasses of `torch.autograd.Function`."""
    import torch

    found = []
    to_visit = [torch.autograd.Function]
    while to_visit:
        for subclass in to_visit.pop().__subclasses__():
            to_visit.append(subclass)
            if defined_in_package(subclass):
                found.append(subclass)
    return found


def measure(model: Any, run: Callable[[], object], times: int, with_optimizer: bool = False) -> tuple[float, float]:
    """Median CPU seconds of a `run`: in the package's own code, and in all else."""
    own = OwnTime()
    found_own, found_other = [], []
    with own.watching(model, with_optimizer):
        run()
        for _ in range(times):
            own_began, began = own.seconds, time.thread_time()
            run()
            own_seconds = own.seconds - own_began
            found_own.append(own_seconds)
            found_other.append(time.thread_time() - began - own_seconds)
    return statistics.median(found_own), statistics.median(found_other)


def measure_all(times: int) -> dict[str, list[float]]:
    """Milliseconds in own code: workload -> one number for each repetition."""
    import torch
    from peft import get_peft_model
    from transformers import StoppingCriteria, StoppingCriteriaList
    from workload import SMOLLM2, batch, build, leave_identity, prompts, training_step

    import peft_reft

    config_class = getattr(peft_reft, "LoReftConfig", None) or peft_reft.LoreftConfig  # its name until November 2026
    torch.set_num_threads(1)
    own = OwnTime()

    class NoteOwnTime(StoppingCriteria):
        """Reads the own seconds after each token."""

        def __init__(self) -> None:
            self.readings: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.readings.append(own.seconds)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def seconds_of(run: Callable[[], object]) -> float:
        began = own.seconds
        run()
        return own.seconds - began

    def seconds_of_a_token(model: Any, new_tokens: int = 17) -> float:
        note = NoteOwnTime()
        model.generate(
            **prompts(4, 64, VOCAB),
            do_sample=False,
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([note]),
        )
        return (note.readings[-1] - note.readings[0]) / (new_tokens - 1)

    found: dict[str, list[float]] = {}
    for spec in SPECS:
        base = build({**SMOLLM2, "num_hidden_layers": BLOCKS, "vocab_size": VOCAB, "intermediate_size": 64})
        model = leave_identity(get_peft_model(base, config_class(task_type="CAUSAL_LM", r=4, positions=spec)))
        step = training_step(model, batch(4, 128, 64, VOCAB))
        prefill = torch.inference_mode()(functools.partial(model, **prompts(4, 64, VOCAB), logits_to_keep=1))
        with own.watching(model):
            workloads: dict[str, tuple[bool, Callable[[], float]]] = {
                "training step": (True, functools.partial(seconds_of, step)),
                "prefill": (False, functools.partial(seconds_of, prefill)),
                "decoded token": (False, functools.partial(seconds_of_a_token, model)),
            }
            for name, (trains, seconds) in workloads.items():
                model.train(trains)
                seconds()
                found[f"{spec}, {name}"] = [1e3 * seconds() for _ in range(times)]
    return found


def measure_tree(tree: Path, times: int) -> dict[str, list[float]]:
    """`measure_all` in a process that imports the package of a source tree."""
    command = [sys.executable, "-W", "ignore", __file__, "--times", str(times), "--json"]
    output = subprocess.check_output(command, env={**os.environ, "PYTHONPATH": str(tree)}, text=True)
    result = json.loads(output.splitlines()[-1])
    if Path(result["package"]).resolve().parent.parent != tree:
        raise SystemExit(f"{tree}: Python imported {result['package']} instead.")
    milliseconds: dict[str, list[float]] = result["milliseconds"]
    return milliseconds


def compare(here: Path, there: Path, times: int, rounds: int) -> None:
    """Measure two trees in turns, and print medians, smallest values and their ratios."""
    found: dict[Path, list[dict[str, list[float]]]] = {here: [], there: []}
    for number in range(rounds):
        turns = (here, there) if number % 2 == 0 else (there, here)
        for tree in turns:
            found[tree].append(measure_tree(tree, times))
    print(f"Milliseconds of CPU in {PACKAGE}'s own code; {rounds} rounds of {times}. this: {here}; that: {there}")
    print(f"{'':24}{'median':>22}{'':10}{'smallest':>22}")
    print(f"{'':24}{'this':>10}{'that':>10}{'ratio':>10}{'this':>12}{'that':>10}{'ratio':>10}")
    for name in found[here][0]:
        cells = [name.ljust(24)]
        for summary in (statistics.median, min):
            this = summary([summary(result[name]) for result in found[here]])
            that = summary([summary(result[name]) for result in found[there]])
            cells.append(f"{this:10.3f}{that:10.3f}{this / that:10.3f}  ")
        print("".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="repetitions in a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each tree")
    parser.add_argument("--against", type=Path, metavar="TREE", help="compare this tree with another one")
    parser.add_argument("--json", action="store_true", help="all repetitions, as one line")
    args = parser.parse_args()
    if args.against is not None:
        compare(Path(__file__).resolve().parent.parent, args.against.resolve(), args.times, args.rounds)
        return
    found = measure_all(args.times)
    if args.json:
        print(json.dumps({"package": sys.modules[PACKAGE].__file__, "milliseconds": found}))
        return
    print(f"Milliseconds of CPU in {PACKAGE}'s own code, median and smallest of {args.times}:")
    for name, values in found.items():
        print(f"{name:24}{statistics.median(values):10.3f}{min(values):10.3f}")


if __name__ == "__main__":
    main()
