"""No text of others steers the terminal or the reader that it is shown to."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from nemo_dapo.telemetry.escape import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("red \x1b[31mtext", r"red \x1b[31mtext"),
        ("one\r\ntwo\tthree\x00", r"one\r\ntwo\tthree\x00"),
        ("c1 \x9b2J del \x7f", r"c1 \x9b2J del \x7f"),
        ("abc\u202egnp.exe\u2066", r"abc\u202egnp.exe\u2066"),
        ("para\u2028graph\u2029", r"para\u2028graph\u2029"),
        ("mark \ufeff\u200b", r"mark \ufeff\u200b"),
        ("half \ud83d", r"half \ud83d"),
        ("tag \U000e0041", r"tag \U000e0041"),
        (r"plain \frac{1}{2} 木 é 👩‍🚀 ∑", r"plain \frac{1}{2} 木 é 👩‍🚀 ∑"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_instead(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_character_at_all_gets_through_that_moves_hides_or_ends_a_line() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(everything)
    assert len(shown.splitlines()) == 1
    shown.encode("utf-8")  # no lone surrogates
    assert {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\u200c", "\u200d"}


def test_a_limit_counts_what_is_shown_and_says_that_something_is_missing() -> None:
    assert printable("abcdef", 6) == "abcdef"
    assert printable("abcdefg", 6) == "abcde…"
    assert printable("\x1b" * 10, 9) == r"\x1b\x1b…"
    assert len(printable("\n" * 10**7, 100)) == 100


def test_a_text_of_several_lines_may_keep_them() -> None:
    assert printable("one\n\ttwo\x1b", keep="\n\t") == "one\n\ttwo\\x1b"
