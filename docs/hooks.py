"""What MkDocs takes from elsewhere at each build, so that no copy can be out of date: the schema, files of the root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from nemo_dapo.config import reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"development.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in PAGES.items()}
    for page, content in (made | {"options.md": reference.markdown()}).items():
        files.append(File.generated(config, page, content=content))
    return files
