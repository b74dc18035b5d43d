"""Timing side by side in one process: interleaved rounds, each compared with the same round of a reference."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Ratio:
    """Time over that of the reference: median over rounds, each over the reference's same round, with quartiles."""

    wall: float
    wall_quartiles: tuple[float, float]
    cpu: float
    cpu_quartiles: tuple[float, float]
    wall_best: float
    """Fastest round over the reference's fastest: the rounds that others on the machine disturbed least."""
    cpu_best: float
    """The same in CPU time."""
    milliseconds: float
    """Median wall time of one call."""


def clock() -> tuple[float, float]:
    """Wall and CPU seconds, when a card has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def interleave(runs: dict[str, Callable[[], object]], reference: str, rounds: int) -> dict[str, Ratio]:
    """Time `runs` in turns. Each round begins with another run, so a slow moment of the machine hits all alike.

    Args:
        runs: name -> what to time. If it returns two `clock` readings, the time between these counts.
        reference: name of the run whose time the others are divided by.
        rounds: how often each is timed, after one call that is not timed.
    """
    names = list(runs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
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

    found = {}
    for name in names:
        wall_median, wall_quartiles = ratio(wall, name)
        cpu_median, cpu_quartiles = ratio(cpu, name)
        found[name] = Ratio(
            wall=wall_median,
            wall_quartiles=wall_quartiles,
            cpu=cpu_median,
            cpu_quartiles=cpu_quartiles,
            wall_best=best(wall, name),
            cpu_best=best(cpu, name),
            milliseconds=1e3 * statistics.median(wall[name]),
        )
    return found


def share(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its parameters in memory, so that all methods run on one set of weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


class Saved:
    """Bytes that autograd keeps for the backward. Each storage counts once; the model's own tensors do not count."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []
        self._own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)  # otherwise another tensor could get its address
        return tensor

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())
