"""A running maximum and a search: operations of torch that ONNX lacks, and sums in their place for an export to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exporting import exports_to_onnx
from ..macs import on_cpu_of_mac
from ..shapes import Int


def running_max(values: Int[Tensor, "batch seq"], lowest: int) -> Int[Tensor, "batch seq"]:
    """Give every column the largest of the values up to it.

    Args:
        values: none is below `lowest`; those above it never fall from left to right.
        lowest: stands for "no value".
    """
    if not exports_to_onnx():
        largest: Tensor = on_cpu_of_mac(torch.cummax, values, dim=1)[0]  # (batch, seq)
        return largest
    #   values        -1   4  -1  -1   7  -1      with lowest=-1
    #   number         0   1   1   1   2   2      of values so far
    #   sums           0   5   8                  of value - lowest, for each number
    #   running max   -1   4   4   4   7   7
    number = (values > lowest).cumsum(1)
    sums = torch.zeros(values.shape[0], values.shape[1] + 1, dtype=torch.long, device=values.device)
    sums = sums.scatter_add(1, number, values - lowest)  # (batch, numbers)
    return sums.gather(1, number) + lowest


def first_column(rising: Int[Tensor, "batch seq"], numbers: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
    """Find the first column whose value is at least a number; seq if there is none.

    Args:
        rising: values from 0 to seq, which never fall from left to right.
        numbers: looked for in their row.
    """
    if not exports_to_onnx():
        return torch.searchsorted(rising, numbers.contiguous())
    # That column is the number of values that are smaller.
    batch, seq = rising.shape
    equal = torch.zeros(batch, seq + 2, dtype=torch.long, device=rising.device)
    equal = equal.scatter_add(1, rising + 1, torch.ones_like(rising))  # entry v + 1: how many values are v
    smaller = equal.cumsum(1)  # (batch, seq + 2): entry v: how many values are smaller than v
    return smaller.gather(1, numbers.clamp(0, seq + 1))
