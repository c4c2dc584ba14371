"""What of a saved window a run goes on with, whose options may be others than those that the window was filled under.

Indices and prompts stay, so that steps stay what the answers make them. A group that this run would not have sampled so, or
would train on when it is too old, is begun anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from nemo_dapo.types import OpenGroup
from nemo_dapo.window import Window

log = logging.getLogger(__name__)


def fitting(window: Sequence[OpenGroup], group_size: int, max_tokens: int) -> list[OpenGroup]:
    """`window` with groups of `group_size` samples alone, none longer than `max_tokens`."""
    found = [one if _fits(one, group_size, max_tokens) else _begun_anew(one) for one in window]
    if anew := sum(one is not other for one, other in zip(found, window, strict=True)):
        log.warning(
            "%d of the checkpoint's %d open groups are sampled anew: they are not of algorithm.group_size=%d, or an answer "
            "is longer than rollout.max_response_length=%d",
            *(anew, len(window), group_size, max_tokens),
        )
    return found


def young(window: Sequence[OpenGroup], rules: Window, is_open: Callable[[OpenGroup], bool]) -> list[OpenGroup]:
    """The beginning of `window` whose groups a step takes in time, those with tokens that are too old then begun anew.

    `rules` are those of the run, which waits for a step; a group that `is_open` not was rejected and enters none. Under the
    options that `window` was filled under nothing changes.
    """
    found: list[OpenGroup] = []
    ahead = anew = 0
    for places, one in enumerate(window):
        steps = rules.steps_before(ahead, places)
        if steps > rules.max_staleness:
            break
        if is_open(one) and rules.taken + steps - _oldest(one, rules.taken) > rules.max_staleness:
            one, anew = _begun_anew(one), anew + 1
        found.append(one)
        ahead += is_open(one)
    if anew or len(found) < len(window):
        log.warning(
            "%d of the checkpoint's %d open groups are sampled anew: with rollout.max_staleness=%d and "
            "algorithm.prompts_per_step=%d they would be trained on when they are too old",
            *(anew + len(window) - len(found), len(window), rules.max_staleness, rules.num_groups),
        )
    return found


def _fits(one: OpenGroup, group_size: int, max_tokens: int) -> bool:
    lengths = [len(sample.token_ids) for sample in one.samples]
    return not lengths or (len(lengths) == group_size and max(lengths) <= max_tokens)


def _oldest(one: OpenGroup, otherwise: int) -> int:
    """Version of its oldest token."""
    return min((span.version for sample in one.samples for span in sample.versions), default=otherwise)


def _begun_anew(one: OpenGroup) -> OpenGroup:
    return OpenGroup(one.index, one.prompt, None)
