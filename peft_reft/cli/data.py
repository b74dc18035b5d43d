"""The rows that `peft-reft train` trains on and evaluates on. They are checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, SFTConfig, get_dataset

from .arguments import check_path

Rows: TypeAlias = "Dataset | IterableDataset"

_READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # every other ending: JSON
_UNDERSTOOD = '"prompt" and "completion", or "messages", or "text" (another name: --dataset_text_field)'


def training_data(data: Any, mixture: DatasetMixtureConfig, args: SFTConfig) -> tuple[Rows, Rows | None]:
    """Load the rows.

    Args:
        data: `DataArguments`: one data set.
        mixture: several data sets.
        args: the training's arguments, which say whether there is an evaluation.

    Returns:
        The rows to train on, and those to evaluate on (None: no evaluation).

    Raises:
        ValueError: an argument would have no effect; a file is missing or cannot be read; the rows lack a column or a
            split. The message names the argument or the file, and what to give.
    """
    _refuse_without_effect(data, mixture)
    if args.do_predict or (args.do_eval and args.eval_strategy == "no"):
        raise ValueError("--do_eval and --do_predict have no effect here: give --eval_strategy epoch, or steps.")
    name = data.dataset_name or ", ".join(str(each.path) for each in mixture.datasets)
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    splits = _load(data, mixture)
    train_rows = _split(splits, data.dataset_train_split, name, "--dataset_train_split")
    test_rows = None
    if data.test_file:
        test_rows = _read_file(data.test_file, data.dataset_streaming)["train"]
    elif mixture.test_split_size is not None:
        if data.dataset_test_split in splits:
            raise ValueError(
                f"--test_split_size {mixture.test_split_size}: {name} has a split {data.dataset_test_split!r} "
                "already, which --eval_strategy evaluates. Leave --test_split_size out."
            )
        train_rows, test_rows = _hold_out(train_rows, mixture.test_split_size, args.seed)
    elif evaluates:
        if data.dataset_test_split not in splits:
            raise ValueError(
                f"An evaluation is asked for (--eval_strategy), but {name} has the splits {sorted(splits)}, no "
                f"{data.dataset_test_split!r}. Give --test_split_size 0.1 to hold rows out, --test_file FILE, "
                "--dataset_test_split NAME, or a folder with files train and test."
            )
        test_rows = splits[data.dataset_test_split]
    if test_rows is not None and not evaluates:
        raise ValueError(
            "--test_file and --test_split_size choose rows to evaluate on, but nothing evaluates them: give "
            "--eval_strategy epoch, or steps."
        )
    is_prepared = isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset")
    if not is_prepared:
        check_columns(train_rows, name, args.dataset_text_field)
        if test_rows is not None:
            check_columns(test_rows, data.test_file or name, args.dataset_text_field)
    return train_rows, test_rows


def check_columns(rows: Rows, name: str, text_field: str = "text") -> None:
    """Check whether TRL's SFT understands the rows, by their columns and the contents of the first row.

    Raises:
        ValueError: it does not. The message names the columns that the rows have and those that are understood.
    """
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(f"{name} has no rows.")
    if "input_ids" in row:
        return
    wanted = _wanted_columns(row, text_field)
    if not set(wanted) <= set(row):
        raise ValueError(f"{name} has the columns {sorted(row)}. Understood are {_UNDERSTOOD}. Rename them.")
    types = {type(row[column]) for column in wanted}
    if not types <= {str, list} or len(types) > 1:
        found = ", ".join(f"{column!r}: {row[column]!r:.60}" for column in wanted)
        raise ValueError(f"The first row of {name} has {found}. Expected texts, or else lists of messages.")
    if not isinstance(rows, Dataset):  # a stream would have to be read to its end
        return
    for column in wanted:
        empty = [number for number, value in enumerate(rows[column], start=1) if value is None]
        if empty:
            raise ValueError(f"{name} has rows without {column!r}: {len(empty)}, the first is row {empty[0]}.")


def _wanted_columns(row: Mapping[str, Any], text_field: str) -> list[str]:
    """The columns that TRL reads from a row with these columns."""
    if "prompt" in row:
        return ["prompt", "completion"]
    for column in ("messages", "conversations", text_field):
        if column in row:
            return [column]
    return ["prompt"]


def _refuse_without_effect(data: Any, mixture: DatasetMixtureConfig) -> None:
    """Raise ValueError if an argument for one data set is given together with one for a mixture, or is missing."""
    if mixture.datasets and data.dataset_name:
        raise ValueError(f"--dataset_name {data.dataset_name} and `datasets` exclude each other. Give one.")
    if not mixture.datasets and not data.dataset_name:
        raise ValueError("--dataset_name is missing: a file of rows, a folder, or a name on the Hub.")
    if mixture.datasets and (data.dataset_config or data.dataset_streaming):
        raise ValueError(
            "--dataset_config and --dataset_streaming go with --dataset_name. With `datasets` write `name` at each of "
            "them, and --streaming."
        )
    if not mixture.datasets and mixture.streaming:
        raise ValueError("--streaming goes with `datasets`. With --dataset_name give --dataset_streaming.")
    if data.dataset_config and os.path.isfile(data.dataset_name):
        raise ValueError(f"--dataset_config {data.dataset_config}: {data.dataset_name} is a file, which has none.")
    if data.test_file and mixture.test_split_size is not None:
        raise ValueError("--test_file and --test_split_size exclude each other. Give one.")


def _load(data: Any, mixture: DatasetMixtureConfig) -> Mapping[str, Rows]:
    """All splits of the data set, or of the mixture."""
    if mixture.datasets:
        for each in mixture.datasets:
            check_path(each.path)
        name = ", ".join(each.path for each in mixture.datasets)
        # `_hold_out` holds rows out, and not TRL: each process of a distributed run would draw different ones.
        whole = replace(mixture, test_split_size=None)
        return _naming(name, lambda: get_dataset(whole))
    if os.path.isfile(data.dataset_name):
        return _read_file(data.dataset_name, data.dataset_streaming)
    check_path(data.dataset_name)
    return _naming(
        data.dataset_name,
        lambda: load_dataset(data.dataset_name, name=data.dataset_config, streaming=data.dataset_streaming),
    )


def _read_file(path: str, streaming: bool) -> Mapping[str, Rows]:
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path}.")
    ending = os.path.splitext(path)[1].lower()
    reader = _READERS.get(ending, "json")
    options: dict[str, Any] = {"delimiter": "\t"} if ending == ".tsv" else {}
    return _naming(path, lambda: load_dataset(reader, data_files=path, streaming=streaming, **options))


def _naming(name: str, load: Callable[[], Mapping[str, Rows]]) -> Mapping[str, Rows]:
    """Call `load`; its errors become a ValueError that names the data set and keeps the reader's message."""
    try:
        return load()
    except DatasetGenerationError as error:
        reason: BaseException = error
        while reason.__cause__ is not None and not isinstance(reason, ValueError):
            reason = reason.__cause__
        raise ValueError(f"{name} cannot be read: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except StopIteration as error:  # the JSON reader raises it for an empty file
        raise ValueError(f"{name} has no rows.") from error


def _split(splits: Mapping[str, Rows], split: str, name: str, argument: str) -> Rows:
    if split not in splits:
        raise ValueError(f"{argument} {split}: {name} has the splits {sorted(splits)}.")
    return splits[split]


def _hold_out(rows: Rows, size: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows into those to train on and those to evaluate on; `size` is a share (below 1) or a number of rows."""
    if not isinstance(rows, Dataset):
        raise ValueError(f"--test_split_size {size}: rows that are streamed cannot be split. Give --test_file FILE.")
    try:
        parts = rows.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
    except ValueError as error:
        raise ValueError(f"--test_split_size {size}: {error}") from error
    return parts["train"], parts["test"]
