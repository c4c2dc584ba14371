"""What the serving nodes' folders hold, on rank 0: an update and the servers that load what is there take turns."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from nemo_dapo.rollout.weights.plan import Place, Sent, UpdatePlan, assign, require_accepted
from nemo_dapo.rollout.weights.push import Held

log = logging.getLogger(__name__)


class NoWeightsError(RuntimeError):
    """A node holds no whole version that a server of it could load."""


class Ledger:
    """`places()` are those of the nodes that serve now; `dtype` is the run's precision by torch's name."""

    def __init__(self, places: Callable[[], Sequence[Place]], dtype: str, token: str = "") -> None:
        self.places, self.dtype = places, dtype
        self.token = token or secrets.token_urlsafe(32)
        self._changed = threading.Condition()
        self._plan: UpdatePlan | None = None
        self._is_updating = False
        self._loading = 0  # servers that read a folder now
        self._held: Mapping[str, Held] | None = None  # by node; None until the first update

    def begin(self, version: int, hosts: Sequence[str], seconds: float) -> UpdatePlan:
        """The plan of the next update, given each rank's host; waits for servers that are loading. `finish` must follow."""
        places = self.places()
        with self._changed:
            self._changed.wait_for(lambda: not self._loading)
            self._held, self._is_updating = {}, True
            self._plan = UpdatePlan(version, self.dtype, seconds, self.token, assign(places, hosts))
            return self._plan

    @contextlib.contextmanager
    def finish(self, everyone: Sequence[Sent]) -> Iterator[int]:
        """Note what came of the update: its version, which servers may load from the end of this context on.

        Raises ValueError where the export was not the served model, RuntimeError where no node has the weights or two nodes
        have other ones; then no server loads anything any more.
        """
        assert self._plan is not None
        try:
            require_accepted(everyone)
            held = arrived(self._plan, everyone)
            for outcome in (one for sent in everyone for one in sent.outcomes if one.fault):
                log.error("weights %d did not get to node %s: %s", self._plan.version, outcome.node, outcome.fault)
            yield self._plan.version
            self._held = held
        finally:
            self.close()

    @contextlib.contextmanager
    def loading(self, node: str) -> Iterator[Held | None]:
        """What a server of `node` is to load, which stays as it is meanwhile; None for the model's own folder.

        Raises NoWeightsError where the node does not have the newest weights.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_updating)
            held = None
            if self._held is not None and (held := self._of(node)) is None:
                why = "it lost what it held" if node in self._held else "the last update failed"
                raise NoWeightsError(f"{why}, so there are no weights for a server of node {node}")
            self._loading += 1
        try:
            yield held
        finally:
            with self._changed:
                self._loading -= 1
                self._changed.notify_all()

    def holds(self, node: str) -> bool:
        """Whether `node` has the newest weights in the folder that is its own now."""
        return self._of(node) is not None

    def _of(self, node: str) -> Held | None:
        held = (self._held or {}).get(node)
        return held if held and any(p.node == node and p.folder == held.folder for p in self.places()) else None

    def close(self) -> None:
        """Let those go on who wait for an update, however it ended."""
        with self._changed:
            self._is_updating = False
            self._changed.notify_all()


def arrived(plan: UpdatePlan, everyone: Sequence[Sent]) -> dict[str, Held]:
    """What each node holds that received everything; raises RuntimeError unless it is one and the same, on one at least."""
    folders = {one.place.node: one.place.folder for one in plan.deliveries}
    outcomes = [one for sent in everyone for one in sent.outcomes]
    whole = {one.node: one.digest for one in outcomes if not one.fault}
    if folders and not whole:
        faults = "; ".join(f"{one.node}: {one.fault}" for one in outcomes)
        raise RuntimeError(f"no serving node received the weights of version {plan.version}: {faults}")
    if len(set(whole.values())) > 1:
        raise RuntimeError(
            f"ranks of the trainer hold different weights: nodes received {whole}; the replicas have drifted apart, resume "
            "from the last checkpoint"
        )
    return {node: Held(plan.version, folders[node], digest) for node, digest in whole.items()}
