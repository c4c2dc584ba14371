"""The checkpoints of one run: which is the last whole one, which is on its way, and what it costs when one fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_dapo import checkpoint
from nemo_dapo.config import OnFailedSave, Portable, RunConfig
from nemo_dapo.coordination import found_alike
from nemo_dapo.interfaces import Policy

log = logging.getLogger(__name__)


class Saves:
    """Writes to `directory`. Every method is collective over `group`, and raises CheckpointError where a checkpoint could
    not be written or, with checkpoint.on_failed_save=go_on, says so."""

    def __init__(self, config: RunConfig, directory: Path, group: Any, last: int) -> None:
        """`last` is the step of the newest checkpoint, 0 where there is none."""
        self.config, self.directory, self.group, self.last = config, directory, group, last
        self.writing: checkpoint.Writing | None = None  # behind the training; not counted yet
        # The other ranks wait for each other meanwhile, and half as long leaves them time to hear of it.
        self.patience = config.parallel.timeout_minutes * 60 / 2

    def is_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return self.is_last(step) or bool(every and step % every == 0)

    def is_last(self, step: int) -> bool:
        return step == self.config.trainer.max_steps

    def is_portable(self, step: int) -> bool:
        """Whether the checkpoint of `step` is to be loadable under any layout: its optimizer states must be gathered."""
        return self.is_last(step) or self.config.checkpoint.portable is Portable.always

    def save(self, step: int, policy: Policy, state: Mapping[str, Any] | None) -> None:
        """The checkpoint of `step`, whole when this returns. None may be under way."""
        with self._failing_as_configured():
            portable, keep = self.is_portable(step), self.config.checkpoint.keep
            checkpoint.save(self.directory, step, policy, state, keep=keep, group=self.group, portable=portable)
            self.last = step

    def begin(self, step: int, policy: Policy, state: Mapping[str, Any] | None) -> None:
        """The same, but written while the training goes on, until `finish`."""
        with self._failing_as_configured():
            portable = self.is_portable(step)
            self.writing = checkpoint.save_behind(
                self.directory, step, policy, state, group=self.group, portable=portable
            )

    def finish(self, *, waits: bool) -> None:
        """Complete what `begin` began once every rank has written its share or one has failed; `waits` until then."""
        assert self.writing is not None
        is_over = self.writing.is_over()
        if not (is_over or waits):
            return
        writing, self.writing = self.writing, None
        start = time.monotonic()
        with self._failing_as_configured():
            writing.finish(self.config.checkpoint.keep, self.patience)
            self.last = writing.step
        if not is_over and dist.get_rank() == 0:
            seconds = time.monotonic() - start
            print(f"waited {seconds:.1f} s until the checkpoint of step {writing.step} was written", flush=True)

    @contextmanager
    def _failing_as_configured(self) -> Iterator[None]:
        try:
            yield
        except checkpoint.CheckpointError as error:
            now = f"the last checkpoint is that of step {self.last}" if self.last else "there is no checkpoint yet"
            if self.config.checkpoint.on_failed_save is OnFailedSave.stop:
                raise found_alike(checkpoint.CheckpointError(f"{error}; {now}")) from error
            if dist.get_rank() == 0:
                log.error("%s; %s; the run goes on (checkpoint.on_failed_save=go_on)", error, now)
