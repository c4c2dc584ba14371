"""RewardPool: verdicts from killable child processes, in order, with a time and a memory limit for every item.

    score(group) -> gate (bounded in flight) -> queue of units -> one thread a worker -> worker process -> verdicts

A unit is one call of the reward function: a sample, or a whole group where the function wants one. Its token ids become
text in the worker. Several units travel in one message; the worker answers each as it is done, so when it hangs or dies the
first unanswered unit is the guilty one: it gets a Verdict with `error`, the rest go back to the queue, and a spare worker,
started beforehand, takes the lane.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_dapo.detokenizer import Ids
from nemo_dapo.rewards import math_dapo
from nemo_dapo.rewards.math.extract import MAX_TAIL
from nemo_dapo.rewards.pool.decoding import Decoding
from nemo_dapo.rewards.pool.flow import Gate, Job, Queue, Unit, message
from nemo_dapo.rewards.pool.process import ItemTimeoutError, WorkerLostError, WorkerProcess
from nemo_dapo.telemetry.escape import printable
from nemo_dapo.telemetry.kinds import Kinds
from nemo_dapo.types import Prompt, Sample, Verdict

if TYPE_CHECKING:
    from nemo_dapo.config import RewardConfig

log = logging.getLogger(__name__)

VERIFIERS = {"math": "nemo_dapo.rewards.math:verify", "dapo": "nemo_dapo.rewards.math_dapo:verify"}  # by reward.style
TAILS = {VERIFIERS["math"]: MAX_TAIL, VERIFIERS["dapo"]: math_dapo.MAX_TAIL}  # characters at the end that they read
START_TIMEOUT = 180.0  # seconds until all workers must be ready: a user's function may import much
_PENDING_PER_WORKER = 128  # units in flight: enough to keep every worker busy, bounded in memory
_AFTER_KILL = 5.0  # seconds until a lane whose worker was killed has noticed
_MAX_LOSSES = 2  # workers that may die on one unit


class RewardPool:
    """Scores groups in `workers` child processes; usable from any thread and any asyncio loop, also one after another.

    `tokenizer` is the trainer's, for `score`; `score_texts` needs none. `timeout` is in seconds for one call, `memory_mb`
    the address space of one worker (0 = unlimited). `extra` holds (name, function, weight). What functions print goes to
    the file `printed`, or to standard error, escaped. The first verifier error of each kind is logged as a warning.
    Raises ValueError for a function that cannot be used, RuntimeError when no worker starts.
    """

    def __init__(
        self,
        function: str,
        tokenizer: Any = None,
        *,
        workers: int = 8,
        timeout: float = 10.0,
        memory_mb: int = 2048,
        answer_patterns: Sequence[str] = (),
        extra: Sequence[tuple[str, str, float]] = (),
        correct: float = 1.0,
        incorrect: float = -1.0,
        correct_above: float = 0.0,
        printed: Path | None = None,
    ) -> None:
        if workers < 1 or timeout <= 0:
            raise ValueError(f"reward.workers={workers}, reward.timeout={timeout}: both must be above 0; raise them")
        self.timeout = timeout
        self.counts: Counter[str] = Counter()  # scored, and verifier errors by kind
        self._said = Kinds()
        if printed is not None:
            printed.parent.mkdir(parents=True, exist_ok=True)
        self._printed = "" if printed is None else str(printed.resolve())
        self._tail = None if extra else TAILS.get(function)
        self._decoding = Decoding(tokenizer)
        self._setup = self._decoding.setup | {
            "function": function, "answer_patterns": list(answer_patterns), "timeout": timeout, "memory_mb": memory_mb,
            "extra": [list(term) for term in extra], "correct": correct, "incorrect": incorrect,
            "correct_above": correct_above, "warm": function == VERIFIERS["math"], "tail": self._tail,
        }  # fmt: skip
        self._gate = Gate(workers * _PENDING_PER_WORKER)
        self._queue = Queue(workers)
        self._lock = threading.Lock()
        self._live: set[WorkerProcess] = set()
        self._spare: WorkerProcess | None = None
        self._ready: list[Future[bool]] = [Future() for _ in range(workers)]
        self._lanes = [threading.Thread(target=self._lane, args=(ready,), daemon=True) for ready in self._ready]
        self._groups = self._start()

    @classmethod
    def from_config(cls, config: RewardConfig, tokenizer: Any = None, *, printed: Path | None = None) -> RewardPool:
        """The pool that `config` asks for."""
        return cls(
            config.function or VERIFIERS[config.style.value],
            tokenizer,
            workers=config.workers,
            timeout=config.timeout,
            memory_mb=config.memory_mb,
            answer_patterns=config.answer_patterns,
            extra=[(name, term.function, term.weight) for name, term in config.extra.items()],
            correct=config.correct,
            incorrect=config.incorrect,
            correct_above=config.correct_above,
            printed=printed,
        )

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        """One verdict a sample, in order; waits while too much is in flight."""
        ids = [sample.token_ids for sample in samples]
        if self._decoding.decode:
            return await self.score_texts(prompt, await asyncio.to_thread(self._decoding.decode, ids))
        if self._decoding.file is None:
            raise ValueError("a RewardPool without a tokenizer scores texts alone; give it the tokenizer of the model")
        return await self._score(prompt, ids)

    async def score_texts(self, prompt: Prompt, texts: Sequence[str]) -> list[Verdict]:
        """As `score`, on response texts."""
        return await self._score(prompt, [text[-self._tail :] for text in texts] if self._tail else texts)

    async def _score(self, prompt: Prompt, responses: Sequence[str | Ids]) -> list[Verdict]:
        if not responses:
            return []
        units = 1 if self._groups else len(responses)
        admission = self._gate.enter(units)
        try:
            await asyncio.wrap_future(admission)
        except asyncio.CancelledError:
            self._gate.give_up(admission, units)
            raise
        return await asyncio.wrap_future(self._submit(prompt, responses, units).future)

    def score_all(self, groups: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Verdict]]:
        """Score many groups at once and wait: for scripts and evaluation."""

        async def gather() -> list[list[Verdict]]:
            return await asyncio.gather(*(self.score_texts(prompt, texts) for prompt, texts in groups))

        return asyncio.run(gather())

    def close(self, timeout: float = 5.0) -> None:
        """End every worker within about `timeout` seconds; what is unfinished gets `error: closed`. May be called twice."""
        deadline = time.monotonic() + timeout
        self._queue.close()
        for thread in self._lanes:
            if thread.is_alive():
                thread.join(max(deadline - time.monotonic(), 0))
        with self._lock:
            stuck = list(self._live)
        for worker in stuck:
            worker.abort()
        for thread in self._lanes:
            if thread.is_alive():
                thread.join(_AFTER_KILL)
        if self._spare:
            self._spare.kill()
        self._decoding.close()
        for unit in self._queue.drain():
            self._finish(unit, "closed: the reward pool was closed")

    def _submit(self, prompt: Prompt, responses: Sequence[str | Ids], units: int) -> Job:
        job = Job(prompt.uid, [None] * len(responses), units, units)
        head = self._prompt_json(prompt)
        calls = [responses] if self._groups else [[response] for response in responses]
        self._queue.put([Unit(job, first, head, call) for first, call in enumerate(calls)])
        return job

    def _prompt_json(self, prompt: Prompt) -> str:
        """What the worker needs of a prompt: the verifiers only its answer, a user's function all but the token ids."""
        short = {"uid": prompt.uid, "problem": "", "ground_truth": prompt.ground_truth}
        long = short | {"problem": prompt.problem, "source": prompt.source, "metadata": prompt.metadata}
        return json.dumps(short if self._tail else long, default=str)

    def _start(self) -> bool:
        """Start every lane; True when the function scores whole groups."""
        for lane in self._lanes:
            lane.start()
        try:
            answers = [future.result(START_TIMEOUT) for future in self._ready]
            return all(answers)
        except BaseException:
            self.close(0)
            raise

    def _lane(self, ready: Future[bool]) -> None:
        """The life of one worker thread. It starts its own processes: on Linux they end with the thread that did."""
        worker: WorkerProcess | None = None
        try:
            worker = self._launch()
            groups = worker.wait_ready(START_TIMEOUT)
            if ready is self._ready[0]:
                self._spare = self._launch()
            ready.set_result(groups)
        except (ValueError, WorkerLostError, OSError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            ready.set_exception(kind(str(error)))
            return
        while (units := self._queue.take()) is not None:
            worker = self._work(worker, units)
        if worker:
            worker.close(1.0)

    def _work(self, worker: WorkerProcess | None, units: list[Unit]) -> WorkerProcess | None:
        """Score `units`; returns the worker that is alive afterwards, None when none could be started."""
        pending = deque(units)
        if worker and worker.is_gone:  # it ended while it had nothing to do: no unit is to blame
            worker = self._discard(worker)
        try:
            worker = worker or self._replacement()
            worker.send(message(pending), self.timeout)
            while pending:
                self._finish(pending[0], worker.receive(self.timeout))
                pending.popleft()
            return worker
        except (WorkerLostError, ValueError, TypeError, OSError) as error:
            self._blame(pending, error)
            return self._discard(worker)

    def _blame(self, pending: deque[Unit], error: Exception) -> None:
        """Give the first unanswered unit its error, and the others back to the queue.

        One that ran out of time is guilty. One whose worker died may not be (the kernel kills too, and a worker may end
        before it reads): it is tried once more.
        """
        first = pending[0]
        first.losses += 1
        if isinstance(error, ItemTimeoutError) or first.losses >= _MAX_LOSSES or self._queue.closed:
            known = isinstance(error, WorkerLostError)
            self._finish(first, str(error) if known else f"died: no usable worker: {type(error).__name__}: {error}")
            pending.popleft()
        self._queue.put_back(pending)

    def _discard(self, worker: WorkerProcess | None) -> WorkerProcess | None:
        """The worker in place of one that is lost; None when none starts, to be tried again at the next unit."""
        if worker:
            self._bury(worker)
        if self._queue.closed:
            return None
        self.counts["respawned"] += 1
        try:
            return self._replacement()
        except (WorkerLostError, ValueError, OSError):
            return None  # the next unit tries again, and reports it

    def _replacement(self) -> WorkerProcess:
        """The spare, or a fresh worker, ready; and a new spare on its way."""
        with self._lock:
            worker, self._spare = self._spare, None
        if worker and worker.is_gone:
            self._bury(worker)
            worker = None
        worker = worker or self._launch()
        spare = self._launch()
        with self._lock:
            self._spare, surplus = (spare, None) if self._spare is None else (self._spare, spare)
        if surplus:
            self._bury(surplus)
        worker.wait_ready(START_TIMEOUT)
        return worker

    def _bury(self, worker: WorkerProcess) -> None:
        worker.kill()
        with self._lock:
            self._live.discard(worker)

    def _launch(self) -> WorkerProcess:
        worker = WorkerProcess(self._setup, self._printed, self._decoding.file)
        with self._lock:
            self._live.add(worker)
        return worker

    def _finish(self, unit: Unit, outcome: list[Verdict] | str) -> None:
        """Store a unit's verdicts, or the error that is its verdict, and resolve its group when it was the last."""
        verdicts = [Verdict(correct=False, error=outcome)] * unit.size if isinstance(outcome, str) else outcome
        job = unit.job
        with job.lock:
            job.verdicts[unit.first : unit.first + unit.size] = verdicts
            job.remaining -= 1
            done = job.remaining == 0
            self.counts["scored"] += unit.size
            errors = [verdict.error for verdict in verdicts if verdict.error is not None]
            self.counts.update(error.partition(":")[0] for error in errors)
        for error in errors:
            self._say_first_of_its_kind(error, job.uid)
        if done:
            self._gate.leave(job.units)
            if job.future.set_running_or_notify_cancel():
                job.future.set_result([v for v in job.verdicts if v is not None])

    def _say_first_of_its_kind(self, error: str, uid: str) -> None:
        """A kind is `exception: KeyError`, `timeout: …`: the text up to its second colon, without numbers."""
        with self._lock:
            if not self._said.is_new(":".join(error.split(":", 2)[:2])):
                return
        log.warning("verifier error (first of its kind; more are counted) on prompt %s: %s", uid, printable(error, 500))
