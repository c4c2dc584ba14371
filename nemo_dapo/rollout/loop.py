"""One event loop for the whole run, in a thread of its own: connections and requests outlive the step that made them.

It is libuv's (uvloop): a step of 8,192 answers of 20,480 tokens wakes it 170,000 times, and asyncio's own loop takes an
eighth more for that.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")
END_SECONDS = 10.0  # for what still runs to end when it is cancelled


class LoopThread:
    """Runs coroutines in its thread from `start` on (the first `submit` starts it) until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._lock = threading.Lock()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` in the loop; cancelling the future cancels it. Raises RuntimeError after `close`."""
        with self._lock:
            if self.loop.is_closed():
                work.close()
                raise RuntimeError(f"the loop of {self._thread.name} has ended")
            if not self._thread.is_alive():
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Cancel what runs, wait until it has ended, stop; safe to call twice."""
        if self._thread.is_alive():
            self.submit(_cancel_others()).result(2 * END_SECONDS)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
        with self._lock:
            self.loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=END_SECONDS)
