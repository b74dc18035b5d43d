"""The rows of a file: read, with errors that name the file and the line, and brought into the form that is understood.

`train`, `generate` and `evaluate` read their files here. It needs `datasets`, which TRL brings along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

try:
    import pandas
    from datasets import Dataset, Features, IterableDataset, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError
except ImportError as error:
    raise ImportError(f'Files of rows need datasets: pip install "peft-reft[trl]" ({error})') from error

from .arguments import missing
from .ask import messages

Rows: TypeAlias = "Dataset | IterableDataset"

_READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # every other ending: JSON
_OF_CSV = {
    "dtype": "str",
    "keep_default_na": False,
    "na_values": [""],
}  # `4` and `None` are texts; an empty cell is none
_UNDERSTOOD = '"prompt" and "completion", or "messages", or "text"'
_ROLES = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
"""Who says what is in a column."""
_OTHER_NAMES = [
    (["question"], "answer"),
    (["instruction", "input"], "output"),  # Alpaca's
    (["instruction"], "output"),
    (["instruction"], "response"),
    (["input"], "output"),
]
"""Columns of prompts and of completions, as well-known data sets name them: what an error proposes."""


def read_file(path: str, streaming: bool = False) -> Mapping[str, Rows]:
    """Read a file of rows; its ending says which kind it is. The only split is "train".

    Raises:
        ValueError: there is no such file, or it cannot be read. The message names the file, and the line of JSON.
    """
    if not os.path.isfile(path):
        raise ValueError(missing(path, "file"))
    ending = os.path.splitext(path)[1].lower()
    reader = _READERS.get(ending, "json")

    def load() -> Mapping[str, Rows]:
        options: dict[str, Any] = {}
        if reader == "csv":
            options = _all_texts(path, separator="\t" if ending == ".tsv" else ",")
        return load_dataset(reader, data_files=path, streaming=streaming, **options)  # type: ignore[no-any-return]

    try:
        return naming(path, load)
    except ValueError as error:
        where = _broken_line(path) if ending in (".json", ".jsonl") else None
        if where is None:
            raise
        raise ValueError(f"{path} cannot be read: {where}") from error


def _all_texts(path: str, separator: str) -> dict[str, Any]:
    """The options with which all columns of a CSV file are texts, `4` and `None` too; an empty cell is None."""
    names = pandas.read_csv(path, sep=separator, nrows=0).columns
    features = Features({name: Value("string") for name in names})
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}


def naming(name: str, load: Callable[[], Mapping[str, Rows]]) -> Mapping[str, Rows]:
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


def _broken_line(path: str) -> str | None:
    """Where a JSON file is broken, by line and column, and why; None if each line can be read."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    if text.lstrip().startswith("["):  # one list of rows
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno}, {_reason(error)}."
        return None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"line {number}, {_reason(error)}. The line begins: {line:.60}"
        if not isinstance(row, dict):
            return f'line {number} is {line:.60}, and no row such as {{"prompt": "...", "completion": "..."}}.'
    return None


def _reason(error: json.JSONDecodeError) -> str:
    """The column of the error, and its message, two of which end in "at" and expect a place behind it."""
    message = f"{error.msg.removesuffix(' at')} here" if error.msg.endswith(" at") else error.msg
    return f"column {error.colno}: {message}"


def columns(rows: Rows, name: str) -> list[str]:
    """The names of the columns.

    Raises:
        ValueError: there are no rows.
    """
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(f"{name} has no rows.")
    return sorted(row)


def rename(rows: Rows, name: str, prompt_columns: Sequence[str] | None, completion_column: str | None) -> Rows:
    """The rows with the columns "prompt" and "completion", made from columns of other names.

    Args:
        rows: with any columns.
        name: file or data set, for the error.
        prompt_columns: the value of `--prompt_column`. The texts of several columns are joined by an empty line; a
            column that is empty in a row is left out there.
        completion_column: the value of `--completion_column`.

    Raises:
        ValueError: a column is not there. The message names those that are.
    """
    found = columns(rows, name)
    for option, wanted in (("--prompt_column", prompt_columns or []), ("--completion_column", [completion_column])):
        for column in wanted:
            if column is not None and column not in found:
                raise ValueError(f"{option} {column}: {name} has the columns {found}.")
    if not prompt_columns and not completion_column:
        return rows

    def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
        new = {}
        if prompt_columns:
            parts = [row[column] for column in prompt_columns]
            new["prompt"] = parts[0] if len(parts) == 1 else "\n\n".join(part for part in parts if part)
        if completion_column:
            new["completion"] = row[completion_column]
        return new

    used = [*(prompt_columns or []), *([completion_column] if completion_column else [])]
    return rows.map(renamed, remove_columns=sorted({*used} - {"prompt", "completion"}))


def as_chats(rows: Rows) -> Rows:
    """The rows with prompt and answers as messages of a user and of an assistant; messages stay as they are."""

    def chat(row: Mapping[str, Any]) -> dict[str, Any]:
        return {column: messages(row[column], role) for column, role in _ROLES.items() if column in row}

    return rows.map(chat)


def check_columns(rows: Rows, name: str, text_field: str = "text") -> None:
    """Check whether TRL's SFT understands the rows, by their columns and the contents of the first row.

    Raises:
        ValueError: it does not. The message names the columns that the rows have, those that are understood, and the
            option that renames.
    """
    found = columns(rows, name)
    row = next(iter(rows))
    if "input_ids" in row:
        return
    wanted = _wanted_columns(row, text_field)
    if not set(wanted) <= set(row):
        raise ValueError(
            f"{name} has the columns {found}. Understood are {_UNDERSTOOD}. If yours have other names, give "
            f"{_renaming(found)}, or --dataset_text_field NAME."
        )
    types = {type(row[column]) for column in wanted}
    if not types <= {str, list} or len(types) > 1:
        contents = ", ".join(f"{column!r}: {row[column]!r:.60}" for column in wanted)
        raise ValueError(f"The first row of {name} has {contents}. Expected texts, or else lists of messages.")
    _check_that_none_is_empty(rows, name, wanted)


def check_some_columns(rows: Rows, name: str, wanted: Sequence[Sequence[str]]) -> None:
    """Check whether the rows have the columns that a trainer reads; rows of token ids are TRL's to check.

    Args:
        rows: of any columns.
        name: file or data set, for the error.
        wanted: sets of columns, of which the rows must have all of one.

    Raises:
        ValueError: they have not, or a row lacks one. The message names the columns that they have.
    """
    found = columns(rows, name)
    if any(column.endswith("_ids") for column in found):
        return
    present = next((each for each in wanted if {*each} <= {*found}), None)
    if present is None:
        understood = ", or ".join(" and ".join(f'"{column}"' for column in each) for each in wanted)
        rename = " If your prompts have another name, give --prompt_column NAME." if "prompt" not in found else ""
        raise ValueError(f"{name} has the columns {found}. Understood are {understood}.{rename}")
    _check_that_none_is_empty(rows, name, present)
    label = next(iter(rows))["label"] if "label" in present else True
    if not isinstance(label, bool | int):  # a CSV file is text, and the text "False" is true
        raise ValueError(f"The first row of {name} has 'label': {label!r}. Expected true or false, in a JSON file.")


def _check_that_none_is_empty(rows: Rows, name: str, wanted: Sequence[str]) -> None:
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
    return ["prompt", "completion"]


def _renaming(found: list[str]) -> str:
    """The options that rename, with the names of `found` if they are well known."""
    for prompts, completion in _OTHER_NAMES:
        if {*prompts, completion} <= {*found}:
            return f"--prompt_column {' '.join(prompts)} --completion_column {completion}"
    return "--prompt_column NAME --completion_column NAME"


def questions(
    path: str, prompt_columns: Sequence[str] | None, completion_column: str | None, has_answers: bool
) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """Read a file of prompts, for `generate`; or of prompts and their answers, for `evaluate`.

    Returns:
        The rows as they are in the file. The prompt of each: a text, or a list of messages. The completion of each,
        likewise; None for each if `has_answers` is False.
        Rows with "messages" are cut before the last message if that is the assistant's.

    Raises:
        ValueError: the file cannot be read, or lacks a column.
    """
    rows = read_file(path)["train"]
    found = columns(rows, path)
    read = rename(rows, path, prompt_columns, completion_column)
    prompts, completions = [], []
    for number, row in enumerate(read, start=1):
        prompt, completion = row.get("prompt"), row.get("completion")
        if prompt is None and row.get("messages"):
            prompt, completion = row["messages"], None
            if prompt[-1]["role"] == "assistant":
                prompt, completion = prompt[:-1], prompt[-1:]
        if not prompt:
            raise ValueError(
                f'{path}, row {number}: no prompt. The columns are {found}; understood are "prompt" or "messages". If '
                f"yours has another name, give {_renaming(found)}."
            )
        if has_answers and not completion:
            raise ValueError(
                f'{path}, row {number}: no completion. The columns are {found}; understood are "prompt" and '
                f'"completion", or "messages" that end with the assistant\'s. If yours have other names, give '
                f"{_renaming(found)}."
            )
        prompts.append(prompt)
        completions.append(completion)
    return list(rows), prompts, completions
