"""Several coroutines as one, all of their results or the first error; and one that has a limit of time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def all_or_none(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of `calls` in order; the first exception cancels the others and is raised once they have ended."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within(seconds: float, call: Coroutine[Any, Any, T]) -> T:
    """The result of `call`. Raises asyncio.TimeoutError, once it has been cancelled and has ended, when it takes longer.

    asyncio.wait_for would be as much, but before Python 3.12 forgets a cancellation that comes as `call` ends.
    """
    task = asyncio.ensure_future(call)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise asyncio.TimeoutError(f"nothing came of it within {seconds:.3g} s")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
