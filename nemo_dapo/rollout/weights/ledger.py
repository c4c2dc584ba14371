"""What the serving nodes' folders hold, on rank 0: an update and the servers that load what is there take turns.

With `rollout.transport=device` no folder holds anything, once there was an update: a server that is started anew has no
weights until the next.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from nemo_dapo.rollout.weights.plan import Place, Sent, Target, UpdatePlan, assign, require_accepted
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
        self._held: Mapping[str, Held] | None = None  # by node, or server; None until the first update
        self._faults: dict[str, str] = {}  # of the last update, by node or server

    def begin(
        self, version: int, hosts: Sequence[str], seconds: float, targets: Sequence[Target] | None = None, key: str = ""
    ) -> UpdatePlan:
        """The plan of the next update, given each rank's host; waits for servers that are loading. `finish` must follow.

        To the devices of `targets`, whose key is `key`, where there are any to be: else to all nodes.
        """
        deliveries = assign(self.places(), hosts) if targets is None else ()
        with self._changed:
            self._changed.wait_for(lambda: not self._loading)
            self._held, self._is_updating = {}, True
            self._plan = UpdatePlan(
                version, self.dtype, seconds, self.token, deliveries, tuple(targets or ()), key, targets is not None
            )
            return self._plan

    @contextlib.contextmanager
    def finish(
        self, everyone: Sequence[Sent], look: Callable[[Mapping[str, Held]], Mapping[str, str]] = take_all
    ) -> Iterator[int]:
        """Note what came of the update: its version, which servers may load from the end of this context on.

        `look` says, by node, what is wrong with what arrived there. Raises ValueError where the export was not the served
        model, RuntimeError where no node has the weights or two nodes have other ones; then no server loads anything any
        more. What no server's devices have is no error here: it can be sent again.
        """
        assert self._plan is not None
        try:
            require_accepted(everyone)
            held = arrived(self._plan, everyone)
            faults = {one.name: one.fault for sent in everyone for one in sent.outcomes if one.fault}
            faults |= look(held)
            to_server, to_node = "weights %d did not get to %s: %s", "weights %d did not get to node %s: %s"
            for name, fault in faults.items():
                log.error(to_server if self._plan.is_direct else to_node, self._plan.version, name, fault)
            if held and not (held := {name: one for name, one in held.items() if name not in faults}):
                raise nobody_has(self._plan, faults)
            self._faults = faults
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
                if self._plan and self._plan.is_direct:
                    why = "no node keeps a copy of what goes straight to devices (rollout.transport=device)"
                raise NoWeightsError(
                    f"{why}, so there are no weights for a server of node {node} until the next update"
                )
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

    def arrived(self, server: str) -> Held | None:
        """What the last update put into a server's devices, as long as that server lives."""
        return (self._held or {}).get(server)

    def fault(self, server: str) -> str:
        """Why the last update did not reach a server's devices; "" where it did, or was not to."""
        return self._faults.get(server, "")

    def nobody(self) -> RuntimeError:
        """What to raise where nobody has the last update, and nobody can have it."""
        assert self._plan is not None
        return nobody_has(self._plan, self._faults)

    def _of(self, node: str) -> Held | None:
        held = (self._held or {}).get(node)
        return held if held and any(p.node == node and p.folder == held.folder for p in self.places()) else None

    def close(self) -> None:
        """Let those go on who wait for an update, however it ended."""
        with self._changed:
            self._is_updating = False
            self._changed.notify_all()


def arrived(plan: UpdatePlan, everyone: Sequence[Sent]) -> dict[str, Held]:
    """What each node, or server, holds that received everything.

    Raises RuntimeError unless it is one and the same, and on one node at least.
    """
    folders = {one.place.node: one.place.folder for one in plan.deliveries} | {one.name: "" for one in plan.targets}
    outcomes = [one for sent in everyone for one in sent.outcomes]
    whole = {one.name: one.digest for one in outcomes if not one.fault}
    if plan.deliveries and not whole:
        raise nobody_has(plan, {one.name: one.fault for one in outcomes})
    if len(set(whole.values())) > 1:
        raise RuntimeError(
            f"ranks of the trainer hold different weights: received were {whole}; the replicas have drifted apart, resume "
            "from the last checkpoint"
        )
    return {name: Held(plan.version, folders[name], digest) for name, digest in whole.items()}


def nobody_has(plan: UpdatePlan, faults: Mapping[str, str]) -> RuntimeError:
    said = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    who = "server" if plan.is_direct else "serving node"
    return RuntimeError(
        f"no {who} received the weights of version {plan.version}: {said}; once one can, start the same command again: it "
        "goes on from the last checkpoint"
    )
