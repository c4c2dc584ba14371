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


class DamagedWeightsError(NoWeightsError):
    """What lies in a node's folder is not what was sent."""


def take_all(held: Mapping[str, Held]) -> Mapping[str, str]:
    """By node, what is wrong with what it holds: nobody has looked."""
    return {}


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
    def finish(
        self, everyone: Sequence[Sent], look: Callable[[Mapping[str, Held]], Mapping[str, str]] = take_all
    ) -> Iterator[int]:
        """Note what came of the update: its version, which servers may load from the end of this context on.

        `look` says, by node, what is wrong with what arrived there. Raises ValueError where the export was not the served
        model, RuntimeError where no node has the weights or two nodes have other ones; then no server loads anything any
        more.
        """
        assert self._plan is not None
        try:
            require_accepted(everyone)
            held = arrived(self._plan, everyone)
            faults = {one.node: one.fault for sent in everyone for one in sent.outcomes if one.fault}
            faults |= look(held)
            for node, fault in faults.items():
                log.error("weights %d did not get to node %s: %s", self._plan.version, node, fault)
            if held and not (held := {node: one for node, one in held.items() if node not in faults}):
                raise nobody_has(self._plan.version, faults)
            yield self._plan.version
            self._held = held
        finally:
            self.close()

    @contextlib.contextmanager
    def loading(self, node: str) -> Iterator[Held | None]:
        """What a server of `node` is to load, which stays as it is meanwhile; None for the model's own folder.

        Raises NoWeightsError where the node does not have the newest weights. A DamagedWeightsError in this context is the
        end of what the node has.
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
        except DamagedWeightsError:
            with self._changed:
                self._held = {name: one for name, one in (self._held or {}).items() if name != node}
            raise
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
        raise nobody_has(plan.version, {one.node: one.fault for one in outcomes})
    if len(set(whole.values())) > 1:
        raise RuntimeError(
            f"ranks of the trainer hold different weights: nodes received {whole}; the replicas have drifted apart, resume "
            "from the last checkpoint"
        )
    return {node: Held(plan.version, folders[node], digest) for node, digest in whole.items()}


def nobody_has(version: int, faults: Mapping[str, str]) -> RuntimeError:
    said = "; ".join(f"{node}: {fault}" for node, fault in faults.items())
    return RuntimeError(f"no serving node received the weights of version {version}: {said}")
