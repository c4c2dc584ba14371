"""Where a response states its answer: `\\boxed{…}`, `<answer>…</answer>`, `Answer: …`, `#### …` or `the answer is …`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

MAX_TAIL = 16_384  # characters at the end of a response that are searched: an answer is stated last
MAX_ANSWER = 1_000  # characters of one answer; a longer one is no answer
_MAX_STATEMENTS = 64  # of one form, looked at from the end

_LABEL = re.compile(r"(?:(?<![A-Za-z])answer|答案)[ \t]*[*_]*[ \t]*[:：][*_ \t]*", re.IGNORECASE)
# `**Final Answer**` or `## Answer`, alone on its line.
_HEADING = re.compile(r"^[ \t#*_>]*(?:the |final |my )*answer[ \t*_]*$", re.IGNORECASE | re.MULTILINE)
_PROSE = re.compile(
    r"\b(?:answer|(?:option|choice)(?= is \(?[A-J]\b)) is"
    r"(?:[ \t]+(?:therefore|thus|then|clearly|simply|indeed|exactly|hence|now))?"
    r"[ \t]*[,:]?\s*",
    re.IGNORECASE,
)
# GSM8K's mark. A Markdown heading (`#### 4. Check`, `#### Step 2`) has letters before its digits or an item number.
_HASHES = re.compile(
    r"^[ \t]*####(?![ \t]*[0-9]+[.)][ \t]+[A-Za-z*])[ \t]*(\\[^\n]*|[^A-Za-z\n]*[0-9][^\n]*)", re.MULTILINE
)
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)

_FIRST_BOX = re.compile(r"\\f?box|\\framebox")
_BRACES = re.compile(r"\\(?:f?box(?:ed)?|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed[ \t]+([0-9A-Za-z.]+)")
_BETWEEN_BOXES = re.compile(r"(?:[\s,;$&]|\\[()\[\],;! ]|\\q?quad|\\text\{|\}|\band\b|\bor\b)*", re.IGNORECASE)
_BLOCKS = {"$$": "$$", r"\[": r"\]", r"\begin{": r"\end{", r"\(": r"\)"}
_LINE = re.compile(r"[^\n]*")
_MARKUP = " \t\r\n*_`\"'"
_BLANK = re.compile(r"[\s*_`>]*")
_STOP = re.compile(r"[.!?]")
_DIGIT_OR_SIGN = re.compile(r"[0-9$\\=^<>+/|√π∞θ]|^\W*[A-Za-z]\W*$")
# What an answer in a sentence begins with: not the `reasonable` of `the answer is reasonable`.
_BEGINS = re.compile(r"[*_]*(?:[-+−]?[0-9.$\\(\[{|√π∞<€£]|[A-Za-z](?![A-Za-z])|[A-Za-z]\w{0,3} ?=)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s({])(?:sq|cu|approx|mr|mrs|ms|dr|st|vs|no|fig|eq|ca|cf|e\.g|i\.e|[ap]\.?m|in|ft|lb|oz|hr|min|sec|etc|rs)$",
    re.IGNORECASE,
)
_TITLE = re.compile(r"(?:^|\s)(?:mr|mrs|ms|dr|st|approx|sq|cu|no|rs|ca)$", re.IGNORECASE)
_REMARK = re.compile(
    r"[,;]?\s*(?:\(\s*(?:since|because|as)\b[^()]*(?:\([^()]*\)[^()]*)*\)|[,;]?\s\b(?:since|because)\b.*"
    r"|,\s*as (?:required|desired|claimed|expected|needed|stated|shown|requested))$",
    re.IGNORECASE | re.DOTALL,
)
_FRAME = re.compile(
    r"(?:so|thus|hence|therefore|and)?,?\s*(?:there (?:are|is|will be|were|must be)|(?:we|you|i) (?:get|have|find|obtain)"
    r"|it is|this is"
    r"|(?:the|this|that|my|our|his|her|their|its|final|total)\b[^=0-9]{1,80}?\b(?:is|are|was|equals|will be))\s+",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:not|wrong|incorrect|false|never|neither|isn't|aren't|instead|or|if|unless|except|than|at|least|most|about|between)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Statement:
    """A stated answer at [start, end) of the tail; `strong` when a remark in words does not replace it (a box, a tag)."""

    start: int
    end: int
    strong: bool = False
    sentence: bool = False


def find_answer(response: str, patterns: Sequence[str] = ()) -> str | None:
    """The text of the last stated answer, None without one.

    A box or a tag is only replaced by a later statement of mathematics: `\\boxed{42}. The answer is reasonable.` is 42.
    `patterns` are regular expressions with one group, which replace the built-in forms; the last match in the text wins.
    Only the last `MAX_TAIL` characters are read.
    """
    tail = response[-MAX_TAIL:]
    boxes = _boxes(tail) if "box" in tail else []
    found = _last_match(tail, tuple(patterns)) if patterns else _choose(tail, boxes)
    if found is None:
        return None
    inside = [tail[a:b] for a, b in boxes if found.start <= a and b <= found.end]
    if inside:
        return ", ".join(dict.fromkeys(text.strip() for text in inside))
    text = tail[found.start : found.end]
    return text.strip() if found.strong else (_tidy(text) if patterns else _plain(_tidy(text)))


def unbox(text: str) -> str:
    """`text`, or what its `\\boxed{…}` hold, joined by commas."""
    boxes = _boxes(text) if "box" in text else []
    return ", ".join(text[a:b] for a, b in boxes) if boxes else text


def _choose(tail: str, boxes: list[tuple[int, int]]) -> _Statement | None:
    """The last statement that can be an answer; words only where no mathematics is stated."""
    statements = [*_last_boxes(tail, boxes), *_tags(tail), *_labels(tail), *_hashes(tail), *_sentences(tail)]
    if not statements:
        return None
    strong = [s for s in statements if s.strong or _is_mathematics(tail, s)]
    in_words = [s for s in statements if not s.sentence and not _is_mathematics(tail, s)]
    if strong and not any(s.strong for s in strong) and in_words:
        strong += in_words  # `Answer: Tuesday` is as good as `the answer is 5`
    return max(strong or statements, key=lambda s: s.start)


def _is_mathematics(tail: str, statement: _Statement) -> bool:
    text = tail[statement.start : statement.end]
    if statement.sentence:
        return _BEGINS.match(text.lstrip()) is not None
    return _DIGIT_OR_SIGN.search(text) is not None


def _last_boxes(tail: str, boxes: list[tuple[int, int]]) -> Iterator[_Statement]:
    """The last box, with those before it that only a comma, a conjunction or blanks divide from it."""
    bare = [m.span(1) for m in _BARE_BOX.finditer(tail)]
    if bare and (not boxes or bare[-1][0] > boxes[-1][1]):
        yield _Statement(*bare[-1], strong=True)
    if not boxes:
        return
    start, end = boxes[-1]
    for before in reversed(boxes[:-1]):
        opening = max(tail.rfind(name, before[1], start) for name in (r"\boxed", r"\fbox", r"\framebox"))
        if opening < 0 or not _BETWEEN_BOXES.fullmatch(tail, before[1] + 1, opening):
            break
        start = before[0]
    yield _Statement(start, end, strong=True)


def _tags(tail: str) -> Iterator[_Statement]:
    for match in [m for m in _TAG.finditer(tail) if m[1].strip()][-1:] if "<" in tail else []:
        yield _Statement(*match.span(1), strong=True)


def _labels(tail: str) -> Iterator[_Statement]:
    """What follows the last labels and headings: the rest of the line, or the next line or block when that is empty."""
    lowered = tail.lower()
    if "answer" not in lowered and "答案" not in tail:
        return
    for pattern in (_LABEL, _HEADING):
        for match in list(pattern.finditer(tail))[-_MAX_STATEMENTS:]:
            start = _BLANK.match(tail, match.end()).end()  # type: ignore[union-attr]
            end = _end_of_block(tail, start)
            if tail[start:end].strip(_MARKUP):
                yield _Statement(start, end)


def _end_of_block(tail: str, start: int) -> int:
    for opening, closing in _BLOCKS.items():
        if tail.startswith(opening, start):
            at = tail.find(closing, start + len(opening))
            if at >= 0:
                start = at + len(closing)
                break
    return _LINE.match(tail, start).end()  # type: ignore[union-attr]


def _hashes(tail: str) -> Iterator[_Statement]:
    if "####" in tail:
        for match in list(_HASHES.finditer(tail))[-1:]:
            yield _Statement(*match.span(1))


def _sentences(tail: str) -> Iterator[_Statement]:
    """`the answer is …` up to the end of its sentence."""
    for match in list(_PROSE.finditer(tail))[-_MAX_STATEMENTS:]:
        start = match.end()
        end = _end_of_block(tail, start)
        end = _end_of_sentence(tail, start, end)
        if tail[start:end].strip(_MARKUP):
            yield _Statement(start, end, sentence=True)


def _end_of_sentence(tail: str, start: int, end: int) -> int:
    """The first full stop, `!` or `?` that ends something: not within `$…$` or braces, not `5!`, `sq.` or `p.m.`."""
    for match in _STOP.finditer(tail, start, end):
        at = match.start()
        before, after = tail[start:at], tail[at + 1 : end]
        if after and not after[0].isspace() and not (after[0] in "$)*_\"'" and not after[1:2].strip()):
            continue
        opened = before.replace(r"\$", "").count("$") % 2 == 1 and after[:1] != "$"
        if opened or before.count("{") != before.count("}") or before.endswith("\\"):
            continue
        if match[0] == "!" and not re.search(r"[A-Za-z]{3}$", before):
            continue
        if (
            match[0] == "."
            and (_TITLE.search(before) or _ABBREVIATION.search(before))
            and not after.strip()[:1].isupper()
        ):
            continue
        if match[0] == "." and re.search(r"(?:^|\s)(?:mr|mrs|ms|dr)$", before, re.IGNORECASE):
            continue
        return at
    return end


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _last_match(tail: str, patterns: tuple[str, ...]) -> _Statement | None:
    spans = [m.span(1) for pattern in patterns for m in _compiled(pattern).finditer(tail) if m.group(1)]
    return _Statement(*max(spans)) if spans else None


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
    while text and text[-1] in ".,;:。" and not text.endswith(("\\,", "\\;", "\\:", "..")):
        text = text[:-1].rstrip(_MARKUP)
    return text


def _plain(text: str) -> str:
    """The answer out of a sentence that frames it: `There are 7 such numbers`, `The largest n is 34`, `5, as required`."""
    text = _REMARK.sub("", text) if len(text) <= MAX_ANSWER else text
    frame = _FRAME.match(text) if text[:1].isalpha() and len(text) <= MAX_ANSWER else None
    if frame is None or _DOUBT.search(frame[0]) or not _BEGINS.match(text[frame.end() :]):
        return _tidy(text)
    return _tidy(text[frame.end() : _end_of_sentence(text, frame.end(), len(text))])
