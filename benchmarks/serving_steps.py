"""CPU time of preparing a step in a vLLM worker, and of loading adapters. No vLLM is needed, and no model runs.

    python benchmarks/serving_steps.py [--adapters 1 64 512]

A step is prepared before the model runs: which of its tokens are edited, with which weights. The model has the shape
of SmolLM2-135M; adapters have r=4. One thread, CPU time, the median and the smallest of 50 repetitions. "Same
requests" is a step whose requests are those of the step before, as in most steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from serving_engine import prepare
from torch import nn
from transformers import AutoConfig
from workload import SMOLLM2

from peft_reft.serving.chosen import Choice
from peft_reft.serving.options import CHOICE, Options
from peft_reft.serving.server import Server
from peft_reft.serving.worker import Batch
from peft_reft.tuner.architectures import skeleton

DECODING, NEW, LONG = (1, 120, 100), (100, 0, 100), (1000, 0, 1000)
"""Tokens in the step, tokens that earlier steps computed, tokens given: of a request that decodes, or begins."""
STEPS = {
    "512 rows decode": [DECODING] * 512,
    "448 decode, 64 begin": [DECODING] * 448 + [NEW] * 64,
    "8 long prompts begin": [LONG] * 8,
}


class Blocks(nn.Module):
    """Modules of the same names as vLLM's."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Identity() for _ in range(layers))


def step_of(server: Server, kinds: list[tuple[int, int, int]]) -> Any:
    """A step in which each request names the next adapter."""
    facts = list(server.at_start.values())
    requests = []
    for n, (_, _, given) in enumerate(kinds):
        params = SimpleNamespace(extra_args={CHOICE: asdict(Choice(facts[n % len(facts)]))})
        requests.append(SimpleNamespace(sampling_params=params, prompt_token_ids=[3] * given, prompt_embeds=None))
    counts, computed, given = (np.array(column) for column in zip(*kinds))
    starts = np.concatenate([[0], np.cumsum(counts)])
    return SimpleNamespace(requests=requests, starts=starts, computed=computed, given=given)


def milliseconds(run: Callable[[], object], times: int = 50) -> str:
    found = []
    for _ in range(times):
        began = time.thread_time()
        run()
        found.append(1e3 * (time.thread_time() - began))
    return f"{statistics.median(found):10.3f}{min(found):10.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 64, 512])
    args = parser.parse_args()
    torch.set_num_threads(1)
    specs = ("f7+l7", "all")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SMOLLM2["num_hidden_layers"], [(spec, max(args.adapters)) for spec in specs])
        empty = skeleton(AutoConfig.from_pretrained(folder / "model"))
        for spec in specs:
            for count in args.adapters:
                options = Options(adapters={f"a{k}": str(folder / f"{spec}-{k}") for k in range(count)})
                began = time.process_time()
                model = Blocks(SMOLLM2["num_hidden_layers"])
                server = Server(model, empty, options, {}, torch.device("cpu"), compiles=False, graph_tokens=0)
                seconds = time.process_time() - began
                print(f"{spec}, {count} adapters: loaded in {seconds:.2f} s")
                for load, kinds in STEPS.items():
                    step, batch = step_of(server, kinds), Batch(server)

                    def same(server: Server = server, step: Any = step, batch: Batch = batch) -> None:
                        server.prepare(batch.pieces(step))

                    def other(server: Server = server, step: Any = step) -> None:
                        server.prepare(Batch(server).pieces(step))

                    same()
                    print(f"  {load:24} same requests, ms: {milliseconds(same)}   others: {milliseconds(other)}")


if __name__ == "__main__":
    main()
