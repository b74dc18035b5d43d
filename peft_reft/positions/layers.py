"""The grammar of layers: parse ``"0-7;16;-1"``, and resolve it for a model with a given number of blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_RANGE = re.compile(r"(?P<first>-?[0-9]+)(?P<dash>-(?P<last>-?[0-9]+)?)?")


def check_layers(spec: str | int | Sequence[int], field: str) -> None:
    """Raise ValueError naming `field` if `spec` is malformed, whatever the model."""
    _parse(spec, field)


def first_layer(spec: str | int) -> tuple[bool, int]:
    """Key that sorts specs by the first layer they name; those that count from the end come last."""
    first, _ = _parse(spec, "positions")[0]
    return first < 0, first


def resolve_layers(spec: str | int | Sequence[int], n_layers: int, field: str) -> list[int]:
    """Resolve `spec` to sorted, distinct indices below `n_layers`.

    Args:
        spec: ``"all"``, an int, a list of ints, or ranges such as ``"0-7;16;-1"`` (inclusive; ``"12-"`` runs to the
            last layer; negative numbers count from the end).
        n_layers: number of blocks of the model.
        field: name of the config field, for the error.

    Raises:
        ValueError: `spec` is malformed, or names a layer that the model does not have.

    Examples:
        >>> from .layers import resolve_layers
        >>> resolve_layers("0-2;-1", 12, "layers")
        [0, 1, 2, 11]
    """
    chosen: set[int] = set()
    for first, last in _parse(spec, field):
        bounds = []
        for index in (first, last):
            if not -n_layers <= index < n_layers:
                raise ValueError(
                    f"{field}={spec!r} names layer {index}, but the model has {n_layers} layers: "
                    f"allowed are 0 to {n_layers - 1}, or -{n_layers} to -1 from the end."
                )
            bounds.append(index % n_layers)
        if bounds[0] > bounds[1]:
            raise ValueError(f"{field}={spec!r}: the range {first}-{last} is empty in a model of {n_layers} layers.")
        chosen.update(range(bounds[0], bounds[1] + 1))
    return sorted(chosen)


def _parse(spec: str | int | Sequence[int], field: str) -> list[tuple[int, int]]:
    if spec == "all":
        return [(0, -1)]
    if isinstance(spec, str):
        return [_parse_range(part, spec, field) for part in spec.split(";")]
    indices: list[Any] = list(spec) if isinstance(spec, list | tuple) else [spec]
    if not indices or not all(type(index) is int for index in indices):
        raise ValueError(f"{field}={spec!r}: expected 'all', an int, a non-empty list of ints, or '0-7;16;-1'.")
    return [(index, index) for index in indices]


def _parse_range(part: str, spec: str, field: str) -> tuple[int, int]:
    match = _RANGE.fullmatch(part.strip())
    if match is None:
        raise ValueError(
            f"{field}={spec!r}: {part.strip()!r} is no layer and no range like '3', '-1', '0-7' or '12-'."
        )
    first = int(match["first"])
    if match["dash"] is None:
        return first, first
    return first, -1 if match["last"] is None else int(match["last"])
