"""Rows of a file or of a hub data set, read by the `datasets` library, and values found in them by (dotted) column name.

Files are streamed: no second copy of them is written.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_dapo.config import DataSetConfig

Row = dict[str, Any]

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def read_rows(config: DataSetConfig) -> Iterator[Row]:
    """Every row, in order. Raises ValueError when the file or hub name is missing or cannot be read."""
    import datasets  # takes seconds to import, and generated problems need it not
    import pyarrow

    arguments = _hub_arguments(config) if config.hub else _file_arguments(config)
    try:
        # Arrow batches are ten times faster than row by row: DAPO-Math-17k's file has 1.8 million rows.
        for batch in datasets.load_dataset(**arguments).with_format("arrow").iter(batch_size=1000):
            yield from batch.to_pylist()
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
        remedy = (
            "check the name, subset and split, or download the file and give it as `path` without `hub`"
            if config.hub
            else "check that every row is valid and a column has one type throughout"
        )
        raise ValueError(f"cannot read {config.path!r}: {type(error).__name__}: {error}; {remedy}") from error


def lookup(row: Row, column: str, path: str) -> Any:
    """The value of `column` in `row`; a dot reaches into a nested column, None inside gives None.

    Raises ValueError that names the columns there are, and the nearest one; `path` is the file, for the message.
    """
    value: Any = row
    parts = [column] if column in row else column.split(".")
    for depth, part in enumerate(parts):
        if value is None:
            return None
        inside = f"{'.'.join(parts[:depth])!r} of {path!r}" if depth else repr(path)
        if not isinstance(value, dict):
            raise ValueError(
                f"column {column!r}: {inside} holds {type(value).__name__}, not named fields: drop {'.' + part!r}"
            )
        if part not in value:
            raise ValueError(_missing(column, part, list(value), inside))
        value = value[part]
    return value


def as_text(value: Any, column: str, path: str) -> str:
    """A text or number as text (27.0 as "27"), None as "". Raises ValueError for any other type."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"column {column!r} of {path!r} must hold text or numbers, got {type(value).__name__} {str(value)[:80]!r}: "
        "name another column, or a field inside this one with a dot"
    )


def _missing(column: str, part: str, existing: list[str], inside: str) -> str:
    nearest = difflib.get_close_matches(part, existing, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "; name one of them in the data set's `columns`"
    return f"column {column!r} not found: {inside} has {', '.join(sorted(existing))}{hint}"


def _hub_arguments(config: DataSetConfig) -> dict[str, Any]:
    if not config.path:
        raise ValueError("a data set with hub=true needs `path`, its name on the hub: organisation/name")
    return {
        "path": config.path,
        "name": config.subset or None,
        "split": config.split,
        "streaming": config.streaming,
    }


def _file_arguments(config: DataSetConfig) -> dict[str, Any]:
    files = sorted(glob.glob(config.path)) or [config.path]
    for file in files:
        if not Path(file).is_file():
            raise ValueError(_no_file(file))
    suffixes = {Path(file).suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= READERS.keys():
        raise ValueError(
            f"data files must all end in one of {', '.join(READERS)}, got {', '.join(sorted(suffixes)) or 'none'} "
            f"in {config.path!r}: convert them, or set hub=true if this is a name on the hub"
        )
    # `datasets` calls every local file's split "train".
    return {"path": READERS[suffixes.pop()], "data_files": files, "split": "train", "streaming": True}


def _no_file(file: str) -> str:
    folder = Path(file).parent
    if not file:
        return "a data set needs `path`: a .parquet or .jsonl file, or a name on the hub with hub=true"
    if Path(file).is_dir():
        return f"data path {file!r} is a folder: give a file or a pattern such as {file.rstrip('/')}/*.parquet"
    if not folder.is_dir():
        return f"data file {file!r} not found: the folder {str(folder.resolve())!r} does not exist either"
    nearest = difflib.get_close_matches(Path(file).name, [p.name for p in folder.iterdir()], n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "set hub=true if this is a name on the hub"
    return f"data file {file!r} not found in {str(folder.resolve())!r}; {hint}"
