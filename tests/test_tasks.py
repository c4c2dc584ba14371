"""A coroutine with a limit of time: what it brings, what it raises, and whether a cancellation is ever forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nemo_dapo.tasks import within


async def value(future: asyncio.Future[int]) -> int:
    return await future


def test_it_brings_the_result_and_raises_the_error() -> None:
    async def fails() -> int:
        raise ValueError("gone")

    async def course() -> int:
        with pytest.raises(ValueError, match="gone"):
            await within(10, fails())
        return await within(10, asyncio.sleep(0, 7))

    assert asyncio.run(course()) == 7


def test_what_takes_longer_has_ended_when_the_error_comes() -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append("slow")

    async def course() -> None:
        with pytest.raises(asyncio.TimeoutError, match=r"nothing came of it within 0\.01 s"):
            await within(0.01, slow())
        assert ended == ["slow"]

    asyncio.run(course())


def survives(limited: Callable[[float, Coroutine[Any, Any, int]], Coroutine[Any, Any, int]]) -> bool:
    """Whether a task outlives a cancellation that comes in the turn in which its call ends."""

    async def course() -> bool:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(limited(60, value(future)))
        await asyncio.sleep(0.01)
        future.set_result(1)
        await asyncio.sleep(0)  # the call has ended, and the task is yet to hear of it
        task.cancel()
        await asyncio.wait({task})
        return not task.cancelled()

    return asyncio.run(course())


def test_a_cancellation_as_the_call_ends_is_not_forgotten() -> None:
    assert not survives(within)


def test_a_cancelled_one_leaves_nothing_behind() -> None:
    async def course() -> None:
        task = asyncio.ensure_future(within(60, asyncio.sleep(60)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(course())
