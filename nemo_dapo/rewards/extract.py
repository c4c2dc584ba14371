"""Where a response states its answer: the last `Answer: …`, `\\boxed{…}`, `#### …` or `the answer is …`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

MAX_TAIL = 16_384  # characters at the end of a response that are searched: an answer is stated last
MAX_ANSWER = 1_000  # characters of one answer; a longer one is no answer

# `Answer:` may be in bold or a heading, and the answer on the next line.
_ANSWER_LINE = re.compile(r"\banswer[ \t]*\**[ \t]*[:：]\s*\**[ \t]*([^\n]+)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\banswer is[ \t]*:?\s*([^\n]+)", re.IGNORECASE)
# GSM8K's mark. A Markdown heading (`#### 4. Check`, `#### Step 2`) has letters before its digits or an item number.
_HASHES = re.compile(
    r"^[ \t]*####(?![ \t]*[0-9]+[.)][ \t]+[A-Za-z*])[ \t]*(\\[^\n]*|[^A-Za-z\n]*[0-9][^\n]*)", re.MULTILINE
)
_BUILT_IN = ((_ANSWER_LINE, "answer", False), (_ANSWER_IS, "answer is", True), (_HASHES, "####", False))

_FIRST_BOX = re.compile(r"\\f?box")
_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?:\s|\$\s|$)")
_MARKUP = " \t\r\n*_`\"'"


def find_answer(response: str, patterns: Sequence[str] = ()) -> str | None:
    """The text of the last stated answer, None without one.

    `patterns` are regular expressions with one group, which replace the built-in forms; the last match in the text wins.
    Only the last `MAX_TAIL` characters are read.
    """
    tail = response[-MAX_TAIL:]
    found = _last_match(tail, tuple(patterns)) if patterns else _last_built_in(tail)
    boxes = _boxes(tail) if "box" in tail else []
    if boxes and not patterns and (found is None or boxes[-1][1] > found[1]):
        return tail[slice(*boxes[-1])].strip()
    if found is None:
        return None
    inside = [tail[a:b] for a, b in boxes if found[0] <= a and b <= found[1]]
    return _tidy(", ".join(inside) if inside else tail[slice(*found)])


def unbox(text: str) -> str:
    """`text`, or what its `\\boxed{…}` hold, joined by commas."""
    boxes = _boxes(text) if "box" in text else []
    return ", ".join(text[a:b] for a, b in boxes) if boxes else text


def _last_built_in(tail: str) -> tuple[int, int] | None:
    """Span of the last built-in form; a sentence (`the answer is 5. Check: …`) ends at its full stop."""
    lowered = tail.lower()
    best: tuple[int, int] | None = None
    for pattern, word, is_sentence in _BUILT_IN:
        span = _last_after_word(pattern, word, tail, lowered)
        if span is None or (best is not None and span[0] <= best[0]):
            continue
        stop = _SENTENCE_END.search(tail, *span) if is_sentence else None
        best = (span[0], stop.start()) if stop else span
    return best


def _last_after_word(pattern: re.Pattern[str], word: str, tail: str, lowered: str) -> tuple[int, int] | None:
    """Last match of a pattern that begins with `word`: found backwards, which costs nothing on a long text."""
    if len(lowered) != len(tail):  # a few letters change length in lower case: their offsets would not agree
        return _last_match(tail, (pattern.pattern,), pattern.flags)
    at = lowered.rfind(word)
    while at >= 0:
        start = tail.rfind("\n", 0, at) + 1 if word == "####" else at
        match = pattern.match(tail, start)
        if match:
            return match.span(1)
        at = lowered.rfind(word, 0, at)
    return None


@lru_cache(maxsize=64)
def _compiled(pattern: str, flags: int) -> re.Pattern[str]:
    return re.compile(pattern, flags)


def _last_match(tail: str, patterns: tuple[str, ...], flags: int = 0) -> tuple[int, int] | None:
    spans = [m.span(1) for pattern in patterns for m in _compiled(pattern, flags).finditer(tail) if m.group(1)]
    return max(spans, default=None)


def _boxes(text: str) -> list[tuple[int, int]]:
    """Spans of what the outermost balanced `\\boxed{…}` hold, in one pass whatever the text."""
    spans: list[tuple[int, int]] = []
    stack: list[tuple[bool, int]] = []
    first = _FIRST_BOX.search(text)  # braces before it close nothing of a box
    for token in _BRACES.finditer(text, first.start() if first else len(text)):
        piece = token.group()
        if piece == "}":
            if stack:
                is_box, start = stack.pop()
                if is_box:
                    while spans and spans[-1][0] >= start:
                        spans.pop()
                    spans.append((start, token.start()))
        elif piece[-1] == "{" and piece != "\\{":
            stack.append((piece != "{", token.end()))
    return spans


def _tidy(text: str) -> str:
    """`text` without Markdown, surrounding quotes and its final punctuation."""
    text = text.strip(_MARKUP)
    while text and text[-1] in ".,;:" and not text.endswith(("\\,", "\\;", "\\:")):
        text = text[:-1].rstrip(_MARKUP)
    return text
