"""One row of a data set: where it stands, and its values by (dotted) column name as the file has them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

EXACT = 2**53  # up to here every whole number has a float of its own
MANY_DIGITS = 10**40  # a larger number with an exponent, such as 1e300, stays as it is written


class MissingColumnError(ValueError):
    """A column that a row lacks."""


@dataclass(frozen=True, slots=True)
class Row:
    """`values` of line (item, row) `number` of `file`, counted from 1."""

    values: Mapping[str, Any]
    file: str
    number: int
    unit: str = "row"

    @property
    def place(self) -> str:
        return f"{self.file!r}, {self.unit} {self.number:,}"

    def value(self, column: str) -> Any:
        """What `column` holds; a dot reaches into a nested column, None inside gives None.

        Raises MissingColumnError that names the columns there are, and the nearest one.
        """
        value: Any = self.values
        parts = [column] if column in value else column.split(".")
        for depth, part in enumerate(parts):
            if value is None:
                return None
            inside = f"{'.'.join(parts[:depth])!r} of {self.place}" if depth else self.place
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"column {column!r}: {inside} holds {type(value).__name__}, not named fields: drop {'.' + part!r}"
                )
            if part not in value:
                raise MissingColumnError(_missing(column, part, list(value), inside))
            value = value[part]
        return value

    def text(self, column: str) -> str:
        """What `column` holds as text: see `as_text`. Raises ValueError with the row's place and the column."""
        value = self.value(column)
        try:
            return as_text(value)
        except ValueError as error:
            raise ValueError(f"column {column!r} of {self.place} {error}") from error

    def optional_text(self, column: str) -> str:
        """The same, "" where there is no such column."""
        try:
            return self.text(column)
        except MissingColumnError:
            return ""


def as_text(value: object) -> str:
    """A text without the white space around it, a number in its digits, nothing (None, NaN) as "".

    A whole number has no fraction (27.0 is "27"); any other has the file's digits where it holds digits, as JSON does (1.50
    stays "1.50"). Raises ValueError for any other type, and for a float too large to tell which number it was.
    """
    if value is None or (isinstance(value, (float, Decimal)) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return _well_formed(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise ValueError(
            f"must hold text or numbers, got {type(value).__name__} {str(value)[:80]!r}: name another column, a field "
            "inside this one with a dot, or write it as text"
        )
    if isinstance(value, float) and abs(value) > EXACT:
        raise ValueError(
            f"holds the float {value!r}, which may have been another number: floats beyond 2^53 lose digits; "
            "write it as text"
        )
    if isinstance(value, int):
        return str(value)
    if -MANY_DIGITS < value < MANY_DIGITS and value == int(value):
        return str(int(value))
    return str(value)


def plain(value: Any) -> Any:
    """`value` for a problem's metadata: the decimals that keep a file's digits become floats."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds half a surrogate pair at character {error.start}, which is no text: mend it"
        ) from error
    return text


def _missing(column: str, part: str, existing: list[str], inside: str) -> str:
    nearest = difflib.get_close_matches(part, existing, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"column {column!r} not found: {inside} has {', '.join(sorted(existing)) or 'no columns'}{hint}"
