"""What `peft-reft train` trains and evaluates on: found, read and looked at before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, SFTConfig, get_dataset

from .paths import check_path

Rows: TypeAlias = "Dataset | IterableDataset"

_READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # all else: JSON
_UNDERSTOOD = '"prompt" and "completion", or "messages", or "text" (another name: --dataset_text_field)'


def training_data(script: Any, mixture: DatasetMixtureConfig, args: SFTConfig) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to evaluate on: None if nothing asks for an evaluation.

    Raises:
        ValueError: an argument would be ignored; there are no such files; they cannot be read; they lack a column or
            a split. The message names the argument or the file, and the way out.
    """
    _refuse_what_is_ignored(script, mixture)
    if args.do_predict or (args.do_eval and args.eval_strategy == "no"):
        raise ValueError("--do_eval and --do_predict have no effect here: give --eval_strategy epoch, or steps.")
    name = script.dataset_name or ", ".join(str(each.path) for each in mixture.datasets)
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    splits = _load(script, mixture)
    train = _split(splits, script.dataset_train_split, name, "--dataset_train_split")
    test = None
    if script.test_file:
        test = _read_file(script.test_file, script.dataset_streaming)["train"]
    elif mixture.test_split_size is not None:
        if script.dataset_test_split in splits:
            raise ValueError(
                f"--test_split_size {mixture.test_split_size}: {name} has a split {script.dataset_test_split!r} "
                "already, which --eval_strategy evaluates. Leave --test_split_size out."
            )
        train, test = _hold_out(train, mixture.test_split_size, args.seed)
    elif evaluates:
        if script.dataset_test_split not in splits:
            raise ValueError(
                f"An evaluation is asked for (--eval_strategy), but {name} has the splits {sorted(splits)}, no "
                f"{script.dataset_test_split!r}. Give --test_split_size 0.1 to hold rows out, --test_file FILE, "
                "--dataset_test_split NAME, or a folder with files train and test."
            )
        test = splits[script.dataset_test_split]
    if test is not None and not evaluates:
        raise ValueError(
            "--test_file and --test_split_size choose rows to evaluate on, but nothing evaluates them: give "
            "--eval_strategy epoch, or steps."
        )
    prepared = isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset")
    for rows in () if prepared else (train, test):
        if rows is not None:
            check_columns(rows, name if rows is train else script.test_file or name, args.dataset_text_field)
    return train, test


def check_columns(rows: Rows, name: str, text_field: str = "text") -> None:
    """Whether TRL's SFT understands the rows: by their columns, and by what the first row holds.

    Raises:
        ValueError: it does not; the message names the columns found and those understood.
    """
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(f"{name} has no rows.")
    if "input_ids" in row:
        return
    if "prompt" in row:
        wanted = ["prompt", "completion"]
    else:
        wanted = next(([column] for column in ("messages", "conversations", text_field) if column in row), ["prompt"])
    if not set(wanted) <= set(row):
        raise ValueError(f"{name} has the columns {sorted(row)}. Understood are {_UNDERSTOOD}. Rename them.")
    kinds = {column: type(row[column]) for column in wanted}
    if not set(kinds.values()) <= {str, list} or len({*kinds.values()}) > 1:
        found = ", ".join(f"{column!r}: {row[column]!r:.60}" for column in wanted)
        raise ValueError(f"The first row of {name} has {found}. Expected texts, or else lists of messages.")
    for column in wanted if isinstance(rows, Dataset) else []:
        empty = [n for n, value in enumerate(rows[column]) if value is None]
        if empty:
            raise ValueError(f"{name} has rows without {column!r}: {len(empty)}, the first is row {empty[0] + 1}.")


def _refuse_what_is_ignored(script: Any, mixture: DatasetMixtureConfig) -> None:
    """Of the arguments for one data set and those for a mixture, only one kind counts."""
    if mixture.datasets and script.dataset_name:
        raise ValueError(f"--dataset_name {script.dataset_name} and `datasets` exclude each other. Give one.")
    if not mixture.datasets and not script.dataset_name:
        raise ValueError("--dataset_name is missing: a file of rows, a folder, or a name on the Hub.")
    if mixture.datasets and (script.dataset_config or script.dataset_streaming):
        raise ValueError(
            "--dataset_config and --dataset_streaming go with --dataset_name. With `datasets` write `name` at each of "
            "them, and --streaming."
        )
    if not mixture.datasets and mixture.streaming:
        raise ValueError("--streaming goes with `datasets`. With --dataset_name give --dataset_streaming.")
    if script.dataset_config and os.path.isfile(script.dataset_name):
        raise ValueError(f"--dataset_config {script.dataset_config}: {script.dataset_name} is a file, which has none.")
    if script.test_file and mixture.test_split_size is not None:
        raise ValueError("--test_file and --test_split_size exclude each other. Give one.")


def _load(script: Any, mixture: DatasetMixtureConfig) -> Mapping[str, Rows]:
    if mixture.datasets:
        for each in mixture.datasets:
            check_path(each.path)
        name = ", ".join(each.path for each in mixture.datasets)
        # Rows are held out here, not there, where the processes of a distributed run would draw different ones.
        return _in_words(name, lambda: get_dataset(replace(mixture, test_split_size=None)))
    if os.path.isfile(script.dataset_name):
        return _read_file(script.dataset_name, script.dataset_streaming)
    check_path(script.dataset_name)
    return _in_words(
        script.dataset_name,
        lambda: load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming),
    )


def _read_file(path: str, streaming: bool) -> Mapping[str, Rows]:
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path}.")
    ending = os.path.splitext(path)[1].lower()
    options: dict[str, Any] = {"delimiter": "\t"} if ending == ".tsv" else {}
    reader = _READERS.get(ending, "json")
    return _in_words(path, lambda: load_dataset(reader, data_files=path, streaming=streaming, **options))


def _in_words(name: str, load: Any) -> Mapping[str, Rows]:
    """What `load` returns; damaged files raise a ValueError that names `name` and says what the reader said."""
    try:
        return load()
    except DatasetGenerationError as error:
        reason: BaseException = error
        while reason.__cause__ is not None and not isinstance(reason, ValueError):
            reason = reason.__cause__
        raise ValueError(f"{name} cannot be read: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except StopIteration as error:  # what the JSON reader raises for an empty file
        raise ValueError(f"{name} has no rows.") from error


def _split(splits: Mapping[str, Rows], split: str, name: str, argument: str) -> Rows:
    if split not in splits:
        raise ValueError(f"{argument} {split}: {name} has the splits {sorted(splits)}.")
    return splits[split]


def _hold_out(rows: Rows, size: float, seed: int) -> tuple[Rows, Rows]:
    if not isinstance(rows, Dataset):
        raise ValueError(f"--test_split_size {size}: rows that are streamed cannot be split. Give --test_file FILE.")
    try:
        parts = rows.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
    except ValueError as error:
        raise ValueError(f"--test_split_size {size}: {error}") from error
    return parts["train"], parts["test"]
