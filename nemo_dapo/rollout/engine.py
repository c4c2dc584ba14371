"""`VLLMEngine`: the rollout engine that the trainer sees, over one or more vLLM servers.

Samples are asked for one by one (`requests`). A server that is sick is no end of a run: it is started anew with the newest
weights, which its node's memory kept (`upkeep`, `weights`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from nemo_dapo.config import Placement, Precision, RolloutConfig, Transport, model_family
from nemo_dapo.hf_folder import expected_weights
from nemo_dapo.rollout import client, sharing
from nemo_dapo.rollout.answers import Mixture
from nemo_dapo.rollout.attached import AttachedServers
from nemo_dapo.rollout.command import DTYPES
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.rollout.member import Member
from nemo_dapo.rollout.nodes import ServingNodes, Weights
from nemo_dapo.rollout.requests import Requests
from nemo_dapo.rollout.upkeep import STARTING, Upkeep
from nemo_dapo.rollout.weights.ledger import Ledger
from nemo_dapo.rollout.weights.nccl import NCCL, spelled
from nemo_dapo.rollout.weights.plan import Seat, Sent, UpdatePlan
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams

T = TypeVar("T")
BYTES_PER_ELEMENT = {Precision.bf16: 2, Precision.fp32: 4}


class VLLMEngine:
    """Implements `nemo_dapo.interfaces.RolloutEngine`; build it with `VLLMEngine.start` and close it.

    `generate` may be awaited many times at once, from any event loop: requests live in a loop of the engine's own.
    `update_weights`, `sleep` and `wake_up` block.
    """

    def __init__(
        self,
        config: RolloutConfig,
        servers: ServingNodes | AttachedServers,
        ledger: Ledger,
        sender: Sender,
        stop_token_ids: list[int],
        vocab_size: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        self.config, self.servers, self.sender = config, servers, sender
        self._told: dict[str, float] = {}  # of the totals, what `metrics` has told
        self._told_at, self._told_tokens = time.monotonic(), dict[int, float]()
        client.allow_open_files(len(servers) * config.max_concurrent_sequences)
        self.loop = LoopThread("rollout")
        is_direct = config.transport is Transport.device
        target = servers.target if is_direct and isinstance(servers, ServingNodes) else None
        self.upkeep = Upkeep(config, servers, ledger, self.loop, target)
        self.requests = self._run(self._open(stop_token_ids, vocab_size, mixture))

    async def _open(self, stop_token_ids: list[int], vocab_size: int, mixture: Mixture | None) -> Requests:
        http = client.session(self.servers.headers)
        return Requests(self.config, self.upkeep, http, stop_token_ids, vocab_size, mixture)

    @classmethod
    def start(
        cls,
        config: RolloutConfig,
        model_path: Path,
        precision: Precision,
        run_dir: Path,
        tokenizer: Any,
        seed: int,
    ) -> VLLMEngine:
        """Start the servers on the model folder `model_path` and wait until they can serve; logs go to
        `run_dir`/servers. Servers of one run differ in their seeds; resume with another `seed`, or the samples of the
        first steps come again. Raises ValueError for bad options, RuntimeError for a server that does not start.
        """
        engine = cls.prepare(config, model_path, precision, run_dir, tokenizer, seed)
        try:
            engine.start_servers()
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def prepare(
        cls,
        config: RolloutConfig,
        model_path: Path,
        precision: Precision,
        run_dir: Path,
        tokenizer: Any,
        seed: int,
        nodes: Sequence[str] = (),
    ) -> VLLMEngine:
        """As `start`, without starting the servers yet: what is made here can be closed while they start.

        `nodes` names those that serve where they are known beforehand, as with `rollout.placement=colocated`.
        """
        stop_token_ids = client.stop_tokens(model_path, tokenizer)
        if not stop_token_ids:
            raise ValueError(f"{model_path} names no end-of-sequence token; set eos_token in its tokenizer or config")
        model = json.loads((model_path / "config.json").read_text())
        vocab_size = int(model.get("vocab_size") or model.get("text_config", {}).get("vocab_size") or 0)
        expected = expected_weights(model_path)
        ledger = Ledger(lambda: servers.places(), DTYPES[precision])
        is_kept = config.transport is Transport.host
        weights = Weights(expected.num_elements * BYTES_PER_ELEMENT[precision] if is_kept else 0, ledger.token)
        servers: ServingNodes | AttachedServers
        if config.placement is Placement.attach:
            servers = AttachedServers(config, weights.nbytes)
        else:
            nccl = spelled(NCCL().version()) if sharing.needs_nccl(config) else ""
            servers = ServingNodes(config, model_path, precision, run_dir, seed, weights, names=nodes, nccl=nccl)
        try:
            sizes = stop_token_ids, vocab_size, mixture_of(model) if config.return_routes else None
            engine = cls(config, servers, ledger, Sender(lambda: expected), *sizes)
            engine.upkeep.paused.append(STARTING)
            return engine
        except BaseException:
            servers.close()
            raise

    def start_servers(self) -> None:
        """Start every server and agree with it on routes and versions; `close` from another thread ends the wait."""
        self.servers.start()
        self.upkeep.prepare_all()
        self.upkeep.paused.remove(STARTING)

    @property
    def door(self) -> dict[str, Any]:
        """How agents that the run starts find the hub, as JSON; for `keeper.keep_agent`."""
        return asdict(self.servers.door) if isinstance(self.servers, ServingNodes) else {}

    @property
    def version(self) -> int:
        """Version of the newest weights; 0, those of the model's folder, before the first update."""
        return self.upkeep.version

    @property
    def must_repeat(self) -> bool:
        """Whether no server has the last update, and one that was started anew can take it."""
        return self.upkeep.must_repeat

    @property
    def restarts(self) -> int:
        """Restarts of servers so far."""
        return self.upkeep.restarts

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        """`n` samples of one prompt, from one server where it serves them all; those of `drafts` are gone on with.

        Raises ValueError for a prompt that cannot fit, RuntimeError for a request that is refused, for answers that stay
        unusable or servers that stay sick, TimeoutError for a sample that is late again and again.
        """
        asked = self.requests.asked(prompt, params)
        return await asyncio.wrap_future(self.loop.submit(self.requests.group(asked, n, drafts)))

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """An update with the `(Hugging Face name, full tensor)` of this process; raises what `finish_update` does."""
        self.finish_update([self.sender.send(weights, self.begin_update(version), 0)])

    def begin_update(self, version: int, seats: Sequence[Seat] = (Seat(""),)) -> UpdatePlan:
        """Who sends the weights of `version` to whom, given where each rank is; `finish_update` must follow."""
        return self.upkeep.begin_update(version, seats)

    def finish_update(self, everyone: Sequence[Sent]) -> None:
        """Have all servers load what the ranks sent; restart one that fails at it.

        Raises ValueError, before a server is touched, unless every parameter of the model came exactly once; RuntimeError
        when no server takes them.
        """
        self.upkeep.finish_update(everyone)

    def sleep(self) -> None:
        """Free the servers' GPU memory while the trainer works, where `rollout.vllm.enable_sleep_mode` is set.

        Weights are not kept: they are sent anew before the servers are asked again. Waits for a restart under way.
        """
        if self.config.vllm.get("enable_sleep_mode") and not self.upkeep.asleep:
            self.upkeep.sleep()

    def wake_weights(self) -> None:
        """Give sleeping servers room for weights, which an update fills; nothing where they have it."""
        self.upkeep.wake_weights()

    def wake_up(self) -> None:
        """Have the servers serve again, after `wake_weights` and an update; nothing where they are awake.

        Those that failed since they slept are restarted here, where the trainer holds nothing of their devices.
        """
        self.upkeep.wake_up()

    def metrics(self) -> dict[str, float]:
        """What happened at the servers since the last call, to be recorded with the step; see docs/troubleshooting.md."""
        return self._run(self._take_metrics())

    async def _take_metrics(self) -> dict[str, float]:
        members = self.upkeep.fleet.members
        seen, serving = self.upkeep.fleet.take_seen(), [m for m in members if not m.given_up]
        totals = {"restarts": self.restarts, "pause_seconds": self.upkeep.pause_seconds} | vars(self.requests.partial)
        record = {f"server/{name}": float(total - self._told.get(name, 0)) for name, total in totals.items()}
        self._told = totals
        record["server/given_up"] = float(len(members) - len(serving))
        record["server/limit"] = float(sum(member.admission.limit for member in serving))
        record |= self._each_server(members)
        if seen.cache_use is None:
            return record
        return record | {f"server/{name}": value for name, value in vars(seen).items()}

    def _each_server(self, members: Sequence[Member]) -> dict[str, float]:
        """`servers/<node>/<index>/…` of each: whether it serves, weights, restarts so far, tokens a second of late."""
        record, now = {}, time.monotonic()
        seconds, self._told_at = max(now - self._told_at, 1e-9), now
        for member in members:
            where = f"servers/{self.servers.servers[member.index].node}/{member.index}"
            told, self._told_tokens[member.index] = self._told_tokens.get(member.index, 0.0), member.tokens
            record[f"{where}/serves"] = float(self.upkeep.fleet.state(member) in ("serving", "suspect"))
            record[f"{where}/version"] = float(member.version)
            record[f"{where}/restarts"] = float(member.all_restarts)
            record[f"{where}/tokens_per_second"] = (member.tokens - told) / seconds
        return record

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.submit(work).result()

    def close(self) -> None:
        """End the servers and remove the stored weights; safe to call twice, and while the servers start."""
        self.upkeep.ledger.close()
        self.servers.close()
        if not self.loop.loop.is_closed():
            self._run(self.requests.http.close())
        self.loop.close()
        self.sender.close()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def mixture_of(model: dict[str, Any]) -> Mixture:
    """Of the `config.json` of a mixture of experts."""
    return Mixture(model["num_hidden_layers"], model["num_experts_per_tok"], model_family.num_experts(model))
