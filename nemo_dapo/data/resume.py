"""Whether a saved place belongs to this run's data: what differs, each difference in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_dapo.data.filters import IN_EVALUATION_SET

REMEDY = (
    "restore what the checkpoint was made with, or go on with what there is now (data.accept_changed=true), or start a new "
    "run (checkpoint.resume=never)"
)
DAMAGED = (
    "it is damaged or of another version; take an earlier checkpoint, or start a new run with checkpoint.resume=never"
)


def check_place(state: Mapping[str, Any]) -> None:
    """Raises ValueError for a state whose numbers say no place in a stream."""
    for name, one in state["sets"].items():
        for key in ("epoch", "drawn"):
            if type(one.get(key)) is not int or one[key] < 0:
                raise ValueError(
                    f"the checkpoint's {key} of training set {name!r} is {one.get(key)!r}, expected a whole number from 0: "
                    f"{DAMAGED}"
                )
        if not re.fullmatch(r"([0-9a-f]{64})?", str(one.get("after"))):
            raise ValueError(
                f"the checkpoint's place in training set {name!r} is {one.get('after')!r}, expected a hash: {DAMAGED}"
            )


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two states of a loader apart from the place, a line each."""
    return [*_stream(saved, now), *_sets(saved["sets"], now["sets"])]


def _stream(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if saved["seed"] != now["seed"]:
        yield f"the checkpoint's data order has seed {saved['seed']}, this run {now['seed']}"
    before, after = saved["rendering"], now["rendering"]
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            yield (
                f"the {key} is {after.get(key)!r}, the checkpoint's was {before.get(key)!r}; prompts drawn before the "
                "checkpoint keep theirs"
            )


def _sets(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if list(saved) != list(now):
        yield f"the checkpoint's training sets are {', '.join(saved)}, this run's {', '.join(now)}"
    for name in (name for name in now if name in saved):
        before, after = saved[name], now[name]
        if before["weight"] != after["weight"]:
            yield f"training set {name!r} has weight {after['weight']}, the checkpoint's had {before['weight']}"
        if before["sha256"] != after["sha256"]:
            yield _content(name, before, after)


def _content(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Another content, with what the accounts of the two loads say of the cause."""
    text = (
        f"training set {name!r} has content (sha256) {after['sha256'][:12]} of {after['kept']:,} problems, the "
        f"checkpoint's had {before['sha256'][:12]} of {before['kept']:,}"
    )
    if before["rows_read"] != after["rows_read"]:
        text += f"; {after['rows_read']:,} rows were read, not {before['rows_read']:,}"
    for reason in sorted({*before["dropped"], *after["dropped"]}):
        was, is_ = before["dropped"].get(reason, 0), after["dropped"].get(reason, 0)
        if was == is_:
            continue
        text += f"; dropped for {reason!r}: {is_:,}, not {was:,}"
        if reason == IN_EVALUATION_SET:
            text += " (the evaluation sets changed, not this one: data.exclude_eval=false keeps what they hold too)"
    return text
