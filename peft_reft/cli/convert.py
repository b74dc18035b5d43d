"""`peft-reft convert`: an adapter from, or to, the format of another library."""

from __future__ import annotations

from argparse import Namespace

from ..card import describe
from ..convert import (
    from_adapters,
    from_axbench,
    from_control_vector,
    from_pyreft,
    to_control_vector,
    to_easysteer,
    to_pyreft,
)
from .arguments import parse_positions
from .errors import loading
from .load import load_adapter


def run(args: Namespace) -> None:
    if args.to_format == "gguf":
        _write_control_vector(args)
    elif args.to_format is not None:
        _write_theirs(args)
    elif args.from_format == "pyreft":
        _read_pyreft(args)
    else:
        _read_others(args)


def _read_pyreft(args: Namespace) -> None:
    if not args.positions:
        raise ValueError("--positions is missing: pyreft does not save which tokens an adapter was trained on.")
    positions = parse_positions(args.positions)
    with loading(args.path_or_name):
        adapter = from_pyreft(args.path_or_name, positions, args.act_fn, base=args.base, task_type=args.task_type)
    adapter.save(args.destination)
    print(f"Wrote {args.destination}. {describe(adapter.config)}")
    if args.base is None:
        print(f"Blocks are taken to be named as in {next(iter(adapter.weights))}; for another family give --base.")


def _read_others(args: Namespace) -> None:
    if args.from_format == "axbench":
        _check_axbench(args)
    with loading(args.path_or_name):
        if args.from_format == "gguf":
            adapter = from_control_vector(args.path_or_name, args.base, args.task_type)
        elif args.from_format == "axbench":
            numbers = args.concept, args.layer, args.strength
            adapter = from_axbench(args.path_or_name, *numbers, args.base, args.task_type)
        else:
            adapter = from_adapters(args.path_or_name, args.intervention, args.base, args.task_type)
    adapter.save(args.destination)
    print(f"Wrote {args.destination}. {describe(adapter.config)}")


def _check_axbench(args: Namespace) -> None:
    for name in ("concept", "layer", "strength"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: an AxBench dictionary holds vectors alone, one for each concept.")


def _write_control_vector(args: Namespace) -> None:
    to_control_vector(load_adapter(args.path_or_name), args.destination, args.base)
    print(f"Wrote {args.destination}. For llama.cpp: --control-vector {args.destination}")


def _write_theirs(args: Namespace) -> None:
    adapter = load_adapter(args.path_or_name)
    write = to_pyreft if args.to_format == "pyreft" else to_easysteer
    write(adapter, args.destination, args.base)
    print(f"Wrote {args.destination}. The format does not hold the positions: {adapter.config.positions!r}.")
    if args.to_format == "pyreft" and adapter.config.act_fn:
        print(f"Nor the activation: act_fn={adapter.config.act_fn!r}.")
