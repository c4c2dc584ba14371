"""Text that models, servers and users' functions wrote, made safe for a terminal, a log and a reader of lines.

Imports nothing of ours: reward workers use it too.
"""

from __future__ import annotations

import unicodedata

# Cc controls, Cf invisible formats (the bidirectional marks among them), Cs lone surrogates, Zl and Zp line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Of those categories, what ordinary text needs: emoji and several scripts join letters with these.
_JOINERS = frozenset("\u200c\u200d")


def printable(text: str, limit: int | None = None, *, keep: str = "") -> str:
    r"""`text` with every character that a terminal would obey rather than show written as `\n`, `\x1b`, `\u202e`, …

    At most `limit` characters, the last one then an ellipsis; characters in `keep` (such as "\n") stay as they are. One
    line, and valid UTF-8, unless `keep` says otherwise.
    """
    head = text if limit is None else text[: limit + 1]  # escapes only lengthen: what lies beyond cannot be shown
    shown = head if head.isascii() and head.isprintable() else "".join(_shown(c, keep) for c in head)
    return shown if limit is None or len(shown) <= limit else shown[: max(limit - 1, 0)] + "…"


def _shown(character: str, keep: str) -> str:
    if character in keep or character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
