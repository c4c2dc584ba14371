"""The manifest of a folder: size and digest of every file, written last, so that damage is found before anything is read.

Digests are XXH3 with 128 bits: as fast as memory (SHA-256 is 15 times slower), so that disks set the pace, and any change
by accident is found. They are no protection against a forger, who could write the manifest too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

NAME = "manifest.json"
CHUNK = 16 << 20


@dataclass(frozen=True)
class FileDigest:
    """Bytes and XXH3-128 of one file."""

    size: int
    xxh3: str


def digest(path: Path) -> FileDigest:
    state, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            size += count
    return FileDigest(size, state.hexdigest())


def render(format: int, files: Mapping[str, FileDigest]) -> str:
    """The manifest's text; it carries a digest of itself."""
    content = {"format": format, "files": {name: asdict(files[name]) for name in sorted(files)}}
    seal = xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"xxh3": seal}, indent=1) + "\n"


def parse(text: str) -> tuple[int, dict[str, FileDigest]]:
    """Format and files of a manifest. Raises ValueError unless it is, to the letter, what `render` wrote."""
    try:
        content = json.loads(text)
        format, files = content["format"], {name: FileDigest(**one) for name, one in content["files"].items()}
        if text == render(format, files):
            return format, files
    except (KeyError, TypeError, AttributeError, ValueError):
        pass  # not even of that form
    raise ValueError(f"{NAME} is not as it was written")


def damage(folder: Path, expected: Mapping[str, FileDigest]) -> list[str]:
    """What is wrong with the files of `expected`, one phrase a file; reads them wholly."""
    found = (_damage(folder / name, name, one) for name, one in expected.items())
    return [problem for problem in found if problem]


def _damage(path: Path, name: str, expected: FileDigest) -> str:
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        return "" if digest(path) == expected else f"{name} has other content than was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def unlisted(folder: Path, listed: Iterable[str]) -> list[str]:
    """Files below `folder` that are none of `listed`."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return sorted(found - set(listed) - {NAME})


def shares(files: Mapping[str, FileDigest], ranks: int) -> list[dict[str, FileDigest]]:
    """`files` spread over `ranks` by their bytes, the largest first to whom has least."""
    loads = [0] * ranks
    dealt: list[dict[str, FileDigest]] = [{} for _ in range(ranks)]
    for name, one in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        rank = loads.index(min(loads))
        dealt[rank][name] = one
        loads[rank] += one.size
    return dealt


def said(problems: Sequence[str], most: int = 3) -> str:
    """The first problems and how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {more} more" if more > 0 else "")
