"""Rows of files and of hub data sets, in a stream: no second copy of them is written or held.

JSON is decoded row by row, so that every value is the file's own: a table of typed columns would have to make one type of a
column that mixes numbers and texts, dates of texts, and floats of long numbers. Parquet has types, and pyarrow reads it a
thousand rows at a time. The `datasets` library reads what is on the hub, or in a folder that was downloaded from it.
"""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import count
from pathlib import Path
from typing import Any

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.rows import Row

SUFFIXES = (".parquet", ".jsonl", ".json")
EXAMPLE = '{"problem": "1+1?", "answer": "2"}'
BATCH_ROWS = 1000
MAX_LIST_BYTES = 2**30  # of a JSON list, which is held whole


def read_rows(config: DataSetConfig) -> Iterator[Row]:
    """Every row, in order. Raises ValueError when there is no such file or hub name, or a row cannot be read."""
    if is_on_hub(config):
        yield from _hub_rows(config)
        return
    for file in files(config.path):
        yield from _parquet_rows(file) if file.endswith(".parquet") else _json_rows(file)


def is_on_hub(config: DataSetConfig) -> bool:
    """Whether `path` is a name on the hub, or a folder as the hub has them; a file or pattern of files never is."""
    return config.hub and not config.path.endswith(SUFFIXES)


def files(path: str) -> list[str]:
    """The files that `path`, a name or a pattern, stands for. Raises ValueError when there are none, or of another kind."""
    found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True)) or [path]
    for file in found:
        if not Path(file).is_file():
            raise ValueError(_no_file(file))
        if not file.endswith(SUFFIXES):
            raise ValueError(f"data file {file!r} must end in one of {', '.join(SUFFIXES)}: convert it")
    return found


def _no_file(file: str) -> str:
    folder = Path(file).parent
    if not file:
        return "a data set needs `path`: a .parquet or .jsonl file, or a name on the hub with hub=true"
    if Path(file).is_dir():
        return (
            f"data path {file!r} is a folder: give a file or a pattern such as {file.rstrip('/')}/*.parquet, or set "
            "hub=true for a folder downloaded from the hub"
        )
    if not folder.is_dir():
        return f"data file {file!r} not found: the folder {str(folder.resolve())!r} does not exist either"
    nearest = difflib.get_close_matches(Path(file).name, [p.name for p in folder.iterdir()], n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "set hub=true if this is a name on the hub"
    return f"data file {file!r} not found in {str(folder.resolve())!r}; {hint}"


def _parquet_rows(file: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    numbers = count(1)
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                yield from (Row(values, file, next(numbers)) for values in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"cannot read {file!r} after {next(numbers) - 1:,} rows: {_line(error)}; is it whole?"
        ) from error


def _json_rows(file: str) -> Iterator[Row]:
    """JSON Lines, or one list of objects; blank lines and a byte order mark are passed over."""
    decoder = json.JSONDecoder(parse_float=_digits, parse_constant=_constant)
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _decoded(line, file, number).strip()
            if not text:
                continue
            if text[0] == "[" or (text == "{" and not file.endswith(".jsonl")):
                yield from _json_list(file, decoder)
                return
            yield _row(_parsed(text, decoder, file, number), file, number, "line")


def _json_list(file: str, decoder: json.JSONDecoder) -> Iterator[Row]:
    size = os.path.getsize(file)
    if size > MAX_LIST_BYTES:
        raise ValueError(
            f"{file!r} is one JSON list of {size / 2**30:.1f} GiB, which would be held whole: write a line a row, "
            f"`jq -c '.[]' {file} > {Path(file).stem}.jsonl`"
        )
    value = _parsed(_decoded(Path(file).read_bytes(), file, 1), decoder, file, 1)
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield _row(item, file, number, "item")


def _decoded(data: bytes, file: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(
            f"cannot read {file!r}, line {line:,}: byte {error.start + 1} is not UTF-8; convert it"
        ) from error


def _parsed(text: str, decoder: json.JSONDecoder, file: str, line: int) -> Any:
    """`text`, which begins in `line`, decoded. Raises ValueError with line and column."""
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        place = f"{file!r}, line {line + error.lineno - 1:,}, character {error.colno:,}"
        raise ValueError(
            f"cannot read {place}: {error.msg}; each line must be a JSON object such as {EXAMPLE}"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; lists within lists
        raise ValueError(f"cannot read {file!r}, line {line:,}: {_line(error)}") from error


def _digits(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise ValueError(f"{text[:40]} is no number that can be held") from error


def _constant(name: str) -> float:
    """NaN is a missing value, as pandas writes it."""
    if name != "NaN":
        raise ValueError(f"{name} is no number")
    return math.nan


def _row(value: Any, file: str, number: int, unit: str) -> Row:
    row = Row(value, file, number, unit)
    if not isinstance(value, dict):
        raise ValueError(f"{row.place}: a row must be an object with named columns, got {str(value)[:80]!r}")
    return row


def _hub_rows(config: DataSetConfig) -> Iterator[Row]:
    """Raises ValueError with the way around where the hub cannot be reached, the library's offline switch included."""
    import datasets  # takes seconds to import
    import httpx
    import pyarrow

    if not config.path:
        raise ValueError("a data set with hub=true needs `path`, its name on the hub: organisation/name")
    numbers = count(1)
    try:
        found = datasets.load_dataset(
            config.path, config.subset or None, split=config.split, streaming=config.streaming
        )
        for values in _values(found):
            yield Row(values, config.path, next(numbers))
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, httpx.HTTPError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {_hub_name(config)}: {_line(error)}; {_hub_remedy(config)}") from error


def _hub_name(config: DataSetConfig) -> str:
    """The set with its subset and split, as messages name it."""
    return f"{config.path!r} ({', '.join(filter(None, (config.subset, config.split)))})"


def _hub_remedy(config: DataSetConfig) -> str:
    if Path(config.path).is_dir():
        return "check subset and split, or set `path` to a .parquet or .jsonl file in that folder"
    return (
        "check the name, subset and split, or, where this machine does not reach the hub, download it elsewhere "
        f"(`hf download --repo-type dataset {config.path} --local-dir DIR`) and set the data set's `path` to DIR, or to a "
        ".parquet or .jsonl file in it"
    )


def _values(found: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets` object, with a thousand at a time ten times as fast; but a column that mixes types, which the
    library keeps as JSON text, it decodes only one by one."""
    if "Json(" in str(found.features):
        yield from found
        return
    for batch in found.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from batch.to_pylist()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
