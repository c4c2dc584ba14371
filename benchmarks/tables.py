"""Tables in docs/, which the benchmarks that measure them write."""

from __future__ import annotations

from pathlib import Path


def write_table(file: Path, name: str, text: str) -> None:
    """Put `text` between the two lines `<!-- name -->` and `<!-- end of name -->` of `file`; both must be there."""
    before, begin, rest = file.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert end, f"{file} has no place for {name}"
    file.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")
