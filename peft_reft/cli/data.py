"""The rows that a command trains on and evaluates on. They are checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, load_dataset
from trl import DatasetMixtureConfig, get_dataset

from .arguments import check_path
from .methods import Method
from .rows import Rows, as_chats, check_columns, check_some_columns, naming, read_file, rename


def training_data(method: Method, data: Any, mixture: DatasetMixtureConfig, args: Any) -> tuple[Rows, Rows | None]:
    """Load the rows.

    Args:
        method: what is trained.
        data: `data_arguments`: one data set.
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
        test_rows = read_file(data.test_file, data.dataset_streaming)["train"]
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
    prepared = getattr(args, "dataset_kwargs", None)
    if isinstance(prepared, dict) and prepared.get("skip_prepare_dataset"):
        return train_rows, test_rows
    text_field = getattr(args, "dataset_text_field", None)
    train_rows = _understood(method, train_rows, name, data, text_field)
    if test_rows is not None:
        test_rows = _understood(method, test_rows, data.test_file or name, data, text_field)
    return train_rows, test_rows


def training_split(data: Any, mixture: DatasetMixtureConfig) -> Rows:
    """The rows to train on as the data set has them, not renamed, not checked. Raises as `training_data` does."""
    _refuse_without_effect(data, mixture)
    name = data.dataset_name or ", ".join(str(each.path) for each in mixture.datasets)
    return _split(_load(data, mixture), data.dataset_train_split, name, "--dataset_train_split")


def _understood(method: Method, rows: Rows, name: str, data: Any, text_field: str | None) -> Rows:
    """The rows with the columns that TRL reads, checked."""
    rows = rename(rows, name, data.prompt_column, getattr(data, "completion_column", None))
    if method.columns:
        check_some_columns(rows, name, method.columns)
    else:
        check_columns(rows, name, text_field or "text")
    row = next(iter(rows))
    if data.chat:
        if "prompt" not in row:
            raise ValueError(f"--chat true makes messages of prompt and answer, and {name} has {sorted(row)}.")
        rows = as_chats(rows)
    if "prompt" in row and text_field in row:
        rows = rows.remove_columns(text_field)  # TRL would end this text, and not the completion, with the EOS token
    return rows


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
        return naming(name, lambda: get_dataset(whole))
    if os.path.isfile(data.dataset_name):
        return read_file(data.dataset_name, data.dataset_streaming)
    check_path(data.dataset_name)
    return naming(
        data.dataset_name,
        lambda: load_dataset(data.dataset_name, name=data.dataset_config, streaming=data.dataset_streaming),
    )


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
