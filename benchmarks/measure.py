"""Side by side in one process: interleaved rounds, each compared with the same round of a reference."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


@dataclass
class Ratio:
    """Median over rounds of time over the reference's in the same round, with quartiles; and fastest over fastest."""

    wall: float
    wall_quartiles: tuple[float, float]
    cpu: float
    cpu_quartiles: tuple[float, float]
    wall_best: float
    """Fastest round over the reference's fastest: what is left when the machine's neighbours were quiet."""
    cpu_best: float
    milliseconds: float
    """Median wall time of one call."""


def clock() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def interleave(runs: dict[str, Callable[[], object]], reference: str, rounds: int) -> dict[str, Ratio]:
    """Time `runs` in turns, the order turned by one each round, so that a slow moment of the machine hits all alike.

    Args:
        runs: name -> what to time. One that returns two `clock` readings is timed between these.
        reference: the name that the others are divided by.
        rounds: how often each is timed, after one call that is not.
    """
    names = list(runs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = clock()
            returned = runs[name]()
            ended = clock()
            if isinstance(returned, tuple):
                began, ended = returned
            wall[name].append(ended[0] - began[0])
            cpu[name].append(ended[1] - began[1])

    def ratio(times: dict[str, list[float]], name: str) -> tuple[float, tuple[float, float]]:
        ratios = [mine / theirs for mine, theirs in zip(times[name], times[reference])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, (low, high)

    def best(times: dict[str, list[float]], name: str) -> float:
        return min(times[name]) / min(times[reference])

    return {
        name: Ratio(
            *ratio(wall, name),
            *ratio(cpu, name),
            best(wall, name),
            best(cpu, name),
            1e3 * statistics.median(wall[name]),
        )
        for name in names
    }


def share(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same parameters in memory: methods are compared on one set of weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


class Saved:
    """Bytes that autograd keeps for the backward, each storage once; parameters, which are there anyway, left out."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []
        self._own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)  # or its address could be given to the next
        return tensor

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())
