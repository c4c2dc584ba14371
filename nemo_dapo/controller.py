"""What only rank 0 does: prompts to judged groups to a batch, evaluation, and the record of the run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from nemo_dapo.algorithm import group_advantages, overlong_penalty
from nemo_dapo.batching import make_batch
from nemo_dapo.collected import Collected, token_ages
from nemo_dapo.config import InflightCache, RunConfig
from nemo_dapo.data.loader import PromptLoader
from nemo_dapo.detokenizer import Decode
from nemo_dapo.evaluation import EvaluationResult, evaluate
from nemo_dapo.garbage import no_full_collections
from nemo_dapo.interfaces import Rewarder, RolloutEngine
from nemo_dapo.rewards.shaping import score_of
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.sampling import GroupSampler
from nemo_dapo.telemetry.rollouts import rollouts_path, write_rollouts
from nemo_dapo.telemetry.sinks import Console, Sink
from nemo_dapo.types import Group, Prompt, SamplingParams, TrainBatch

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Rollout:
    """One step's groups as the trainer needs them, and what is worth recording of them."""

    batch: TrainBatch
    groups: tuple[Group, ...]
    metrics: dict[str, float]


class Controller:
    """Owns the five objects' rank-0 side; `engine`, `rewarder`, `loader` are closed by whoever made them.

    With `rollout.max_staleness` groups are sampled while nobody waits for them, in an event loop of their own, to `close`.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        engine: RolloutEngine,
        rewarder: Rewarder,
        loader: PromptLoader,
        eval_sets: Mapping[str, Sequence[Prompt]],
        sink: Sink,
        decode: Decode,
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self.engine, self.rewarder, self.loader = engine, rewarder, loader
        self.decode = decode
        self.eval_sets, self.sink, self.console = eval_sets, sink, Console(config.trainer.max_steps)
        rollout, algorithm = config.rollout, config.algorithm
        self._loop = LoopThread("sampling") if rollout.max_staleness else None
        self.sampler = GroupSampler(
            engine,
            rewarder,
            loader,
            group_size=algorithm.group_size,
            params=SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_length),
            dynamic_sampling=algorithm.dynamic_sampling,
            max_attempts=algorithm.max_attempts,
            max_staleness=rollout.max_staleness,
            max_error_rate=config.reward.max_error_rate,
            max_empty_steps=algorithm.max_empty_steps,
            # Behind the engine's own limits, which name the server: a sample may be late three times, a restart after each.
            timeout=3 * (rollout.request_timeout + rollout.start_timeout + rollout.sync_timeout),
        )

    async def collect(self, step: int) -> Rollout:
        """Algorithm 1, lines 2 to 9: sample, reward, filter until the buffer holds N groups, then their advantages."""
        wanted = self.config.algorithm.prompts_per_step
        with tqdm(total=wanted, desc=f"step {step} rollout", unit="group", leave=False, disable=self._no_bar()) as bar:
            self.sampler.on_progress = lambda accepted, sampled: _advance(bar, accepted, sampled)
            with no_full_collections():
                collected = await self._where_groups_are(lambda: self._collect(wanted))
        advantages = self._advantages(self._rewards(collected.groups))
        await asyncio.to_thread(self._dump, step, collected)  # decoding and compressing take seconds
        batch = await asyncio.to_thread(self._batch, step, collected.groups, advantages)  # a gigabyte to copy
        return Rollout(batch, collected.groups, self._metrics(step, collected))

    async def _collect(self, wanted: int) -> Collected:
        collected = await self.sampler.collect(wanted)
        for group in collected.judged:
            if not group.num_errors:
                self.loader.record(group.prompt.uid, group.num_correct, len(group.samples))
        return collected

    async def _where_groups_are(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` in the event loop of the sampler, which alone may draw prompts and touch groups."""
        return await (asyncio.wrap_future(self._loop.submit(work())) if self._loop else work())

    def _rewards(self, groups: Sequence[Group]) -> torch.Tensor:
        """[N, G]: the verdict's score plus the soft overlong punishment (Eq. 13)."""
        config, overlong = self.config.reward, self.config.reward.overlong
        shape = (len(groups), self.config.algorithm.group_size)
        scores = torch.tensor([[score_of(v, config) for v in g.verdicts] for g in groups]).reshape(shape)
        if not overlong.buffer:
            return scores
        lengths = torch.tensor([[len(s.token_ids) for s in g.samples] for g in groups]).reshape(shape)
        return scores + overlong_penalty(
            lengths,
            max_length=self.config.rollout.max_response_length,
            buffer=overlong.buffer,
            factor=overlong.factor,
        )

    def _batch(self, step: int, groups: Sequence[Group], advantages: torch.Tensor) -> TrainBatch:
        rollout = self.config.rollout
        return make_batch(
            groups,
            advantages,
            overlong_filter=self.config.algorithm.overlong_filter,
            version=step - 1 if rollout.max_staleness else None,  # without a window all tokens are of these weights
            keeps_cache=rollout.inflight_cache is InflightCache.keep,
        )

    def _metrics(self, step: int, collected: Collected) -> dict[str, float]:
        metrics = collected.metrics() | token_ages(collected.groups, step - 1)
        # Over all judged groups, as the accuracy is: the kept ones alone are mixed by construction, so their mean is flat.
        rewards = self._rewards([group for group in collected.judged if not group.num_errors])
        metrics["rollout/reward"] = float(rewards.mean()) if rewards.numel() else 0.0
        metrics["rollout/tokens_per_second"] = collected.generated_tokens / max(collected.flights.seconds, 1e-9)
        metrics["rollout/prompts_consumed"] = float(self.sampler.counters["groups_judged"])
        if self.config.rollout.return_routes:  # else recorded by the trainer: of groups that an earlier run sampled
            samples = [sample for group in collected.groups for sample in group.samples]
            metrics["rollout/with_routes"] = sum(s.routes is not None for s in samples) / max(len(samples), 1)
        return metrics | self.engine.metrics()

    def _advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        return group_advantages(rewards, normalize_std=self.config.algorithm.normalize_std)

    def _dump(self, step: int, collected: Collected) -> None:
        """Every group that decided the step, kept or not; one with a verifier error, or aborted, has no rewards."""
        every = self.config.logger.rollout_every
        if not every or step % every:
            return
        groups = collected.decisive
        rewards = torch.full((len(groups), self.config.algorithm.group_size), torch.nan)
        for row, group in zip(rewards, groups, strict=True):
            if group.verdicts and not group.num_errors:
                row[:] = self._rewards([group])[0]
        path = rollouts_path(self.run_dir / "rollouts", step)
        dump = write_rollouts(
            path,
            groups,
            rewards.tolist(),
            self._advantages(rewards).tolist(),
            decode=self.decode,
            step=step,
            max_mb=self.config.logger.rollout_max_mb,
            tokens=self.config.logger.rollout_tokens,
        )
        if dump.groups_left_out:
            limit = self.config.logger.rollout_max_mb
            log.warning("%s: %d groups did not fit logger.rollout_max_mb=%d", path, dump.groups_left_out, limit)

    async def evaluate(self, step: int) -> EvaluationResult:
        """Sample and judge the evaluation sets; per-problem results go to `evaluation/step_*.jsonl`."""
        rollout = self.config.rollout
        with no_full_collections():
            result = await evaluate(
                self.engine,
                self.rewarder,
                self.eval_sets,
                self.config.evaluation,
                decode=self.decode,
                max_response_length=rollout.max_response_length,
                samples={name: one.samples for name, one in self.config.data.eval.items()},
                max_concurrent_sequences=rollout.max_concurrent_sequences * rollout.num_servers,
                progress=not self._no_bar(),
            )
        result.write_jsonl(self.run_dir / "evaluation" / f"step_{step:06d}.jsonl")
        for one in result.sets.values():
            print(one, flush=True)
        return result

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """One record to every sink, one line to the human."""
        self.sink.log(step, metrics)
        print(self.console.line(step, metrics), flush=True)

    def export_statistics(self) -> None:
        """How often each problem was solved so far, to `solve_statistics.jsonl`."""
        prompts = (prompt for chosen in self.loader.sets for prompt in chosen.prompts)
        self.loader.curriculum.export(self.run_dir / "solve_statistics.jsonl", prompts)

    def state_dict(self) -> dict[str, Any]:
        return asyncio.run(self._where_groups_are(self._state))

    async def _state(self) -> dict[str, Any]:
        """At one moment: groups that end meanwhile would draw further prompts."""
        sampler = self.sampler.state_dict()
        return {"window": sampler.pop("window"), "sampler": sampler, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"] | {"window": state.get("window", [])})
        self.loader.load_state_dict(state["loader"])

    def close(self) -> None:
        """End what is still being sampled."""
        if self._loop is not None:
            self._loop.submit(self.sampler.stop()).result()
            self._loop.close()

    def _no_bar(self) -> bool | None:
        """None lets tqdm decide: no bar where standard error is a file."""
        return None if self.config.logger.progress else True


def _advance(bar: Any, accepted: int, sampled: int) -> None:
    bar.set_postfix_str(f"{sampled} sampled", refresh=False)
    bar.update(accepted - bar.n)
