"""No full collection while requests are open."""

from __future__ import annotations

import gc

from nemo_dapo.garbage import no_full_collections, spare_what_is_here

MANY = 1_000_000


def full_collections_of(objects: int) -> int:
    """How many full collections making `objects` lasting containers sets off."""
    before = gc.get_stats()[2]["collections"]
    kept: list[list[object]] = [[] for _ in range(objects)]
    assert len(kept) == objects
    return gc.get_stats()[2]["collections"] - before


def test_only_young_objects_are_looked_at_meanwhile_and_everything_again_afterwards() -> None:
    threshold = gc.get_threshold()
    with no_full_collections():
        young = gc.get_stats()[0]["collections"]
        assert full_collections_of(MANY) == 0
        assert gc.get_stats()[0]["collections"] > young
    assert gc.get_threshold() == threshold
    assert full_collections_of(MANY) > 0


def test_what_the_start_built_is_never_visited_again() -> None:
    built: list[list[object]] = [[] for _ in range(MANY)]
    try:
        spare_what_is_here()
        assert gc.get_freeze_count() >= len(built)
        assert not any(one is built for one in gc.get_objects())
    finally:
        gc.unfreeze()
