"""The agent of one serving node: owns that node's servers, for as long as the hub on rank 0 grants it a lease.

Its keeper (`keeper.py`) starts it, and hears its pulse on standard output. It ends with 0 when the hub says so or on
SIGTERM, with 1 when its lease is lost (started again, it joins again), with 2 when it is refused for good. Whatever ends it
ends its servers: by itself, or by their guardians where it was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import aiohttp
from aiohttp import ClientWebSocketResponse, hdrs

import nemo_dapo
from nemo_dapo.rollout import host
from nemo_dapo.rollout.holdings import LOOK_SECONDS, Holdings, prepare
from nemo_dapo.rollout.messages import (
    CLOSE_SECONDS,
    HELLO_SECONDS,
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    ROUTE,
    Call,
    Hello,
    LeaseLostError,
    Plan,
    Refusal,
    Result,
    ServerState,
    Stop,
    Welcome,
    decode,
    heard,
    say,
)
from nemo_dapo.rollout.run_file import TOKEN_VARIABLE

log = logging.getLogger(__name__)

ENDED, LOST, REFUSED = 0, 1, 2  # exit codes
CONNECT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0  # for a hub that was there when the agent was started
RETRY_SECONDS = 1.0
SECONDS_BETWEEN_WORDS = 15.0
PULSE_SECONDS = 0.5


class RefusedError(Exception):
    """The hub does not take this agent, for a reason that another attempt would not change."""


async def connect(http: aiohttp.ClientSession, addresses: Sequence[str], token: str) -> ClientWebSocketResponse:
    """The hub's socket, by whichever of its `addresses` answers first.

    Raises TimeoutError after PATIENCE_SECONDS, RefusedError for the wrong token.
    """
    started = said = time.monotonic()
    while True:
        try:
            return await _try_all(http, addresses, token)
        except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError) as problem:
            now, trouble = time.monotonic(), f"{type(problem).__name__}: {problem}"
        if now - started > PATIENCE_SECONDS:
            raise TimeoutError(f"no hub was found in {PATIENCE_SECONDS:.0f} s; the last attempt: {trouble}")
        if now - said > SECONDS_BETWEEN_WORDS:
            said = now
            log.info("looking for the hub for %.0f s; the last attempt: %s", now - started, trouble)
        await asyncio.sleep(RETRY_SECONDS)


async def _try_all(http: aiohttp.ClientSession, addresses: Sequence[str], token: str) -> ClientWebSocketResponse:
    trouble: Exception = ValueError("it names no address")
    for address in addresses:
        try:
            return await http.ws_connect(
                f"http://{address}{ROUTE}",
                headers={hdrs.AUTHORIZATION: f"Bearer {token}"},
                autoping=False,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
                max_msg_size=MAX_MESSAGE_BYTES,
            )
        except aiohttp.WSServerHandshakeError as answer:
            if answer.status == 401:
                raise RefusedError(
                    f"the hub at {address} does not accept this token: use the --run-file of the run that is at work"
                ) from answer
            trouble = answer
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as problem:
            trouble = problem
    raise trouble


class Agent:
    """One registration of a node: from the hub's welcome to the end of the lease."""

    def __init__(self, socket: ClientWebSocketResponse, plan: Plan, holdings: Holdings) -> None:
        self.socket, self.plan, self.holdings, self.servers = socket, plan, holdings, holdings.servers
        self._said: dict[int, ServerState] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, words: AsyncGenerator[str, None]) -> None:
        """Do what the hub calls for until it says stop; raises LeaseLostError when it says nothing any more."""
        watching = asyncio.ensure_future(self._watch())
        try:
            async for text in words:
                message = decode(text, Call, Stop)
                if isinstance(message, Stop):
                    return
                task = asyncio.ensure_future(self._answer(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            watching.cancel()

    async def _answer(self, call: Call) -> None:
        actions = {
            "start": self.servers.start,
            "restart": lambda: self.servers.restart(call.index),
            "end": lambda: self.servers.end(call.index),
        }
        result = Result(call.number)
        try:
            await asyncio.to_thread(actions[call.action])
        except (RuntimeError, OSError, ValueError) as problem:  # of the servers; rank 0 decides what it means
            result = Result(call.number, str(problem), type(problem).__name__)
        await self._say_states()
        await say(self.socket, result)

    async def _watch(self) -> None:
        while True:
            await self._say_states()
            await asyncio.sleep(LOOK_SECONDS)

    async def _say_states(self) -> None:
        """Tell the hub of every server that is not as it was last told."""
        for server in self.servers.servers:
            process, code = server.process, server.exit_code()
            state = ServerState(server.index, process.pid if process else 0, server.url, server.is_ready)
            last = self._said.get(server.index)
            if code is not None:
                if last and last.ended and last.pid == state.pid:
                    continue
                state = dataclasses.replace(state, ended=await asyncio.to_thread(server.describe_exit))
            if state != last:
                self._said[server.index] = state
                await say(self.socket, state)


async def register(
    socket: ClientWebSocketResponse, token: str, name: str, gpus: list[str], scratch: str, folder: Path
) -> Agent:
    """Say hello, look at the plan, be welcome. Raises RefusedError, or LeaseLostError where it is worth another attempt."""
    async with contextlib.aclosing(heard(socket, 2 * HELLO_SECONDS)) as words:
        await say(socket, Hello(PROTOCOL, nemo_dapo.__version__, name, os.getpid(), gpus))
        plan = _accepted(decode(await anext(words), Plan, Refusal))
        assert isinstance(plan, Plan)
        address = socket.get_extra_info("sockname")[0]
        looking = asyncio.ensure_future(asyncio.to_thread(prepare, plan, token, name, address, gpus, scratch, folder))
        answer = asyncio.ensure_future(anext(words))  # listens, and so answers pings, while the node is looked at
        await asyncio.wait({looking, answer}, return_when=asyncio.FIRST_COMPLETED)
        report, holdings = await looking
        try:
            await say(socket, report)
            _accepted(decode(await answer, Welcome, Refusal))
            if holdings is None:
                raise RefusedError("; ".join(report.problems))
            return Agent(socket, plan, holdings)
        except BaseException:
            if holdings:
                holdings.close(kill=True)
            raise


def _accepted(message: Plan | Welcome | Refusal) -> Plan | Welcome:
    if isinstance(message, Refusal):
        raise RefusedError(message.reason) if message.is_final else LeaseLostError(message.reason)
    return message


async def run(addresses: Sequence[str], token: str, folder: Path) -> int:
    """One registration, whole; returns the exit code."""
    scratch = tempfile.mkdtemp(prefix="nemo_dapo_agent_")
    life = asyncio.ensure_future(_live(addresses, token, scratch, folder))
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, life.cancel)
    pulse = asyncio.ensure_future(_pulse(life))
    try:
        await life
    except asyncio.CancelledError:
        return ENDED
    except RefusedError as refusal:
        log.error("refused: %s", refusal)
        return REFUSED
    except (LeaseLostError, TimeoutError, ValueError) as problem:
        log.error("the lease is lost: %s", problem)
        return LOST
    finally:
        pulse.cancel()
        shutil.rmtree(scratch, ignore_errors=True)
    return ENDED


async def _live(addresses: Sequence[str], token: str, scratch: str, folder: Path) -> None:
    name, gpus = host.node_name(), await asyncio.to_thread(host.gpu_uuids, os.environ)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    async with aiohttp.ClientSession(trust_env=False, timeout=timeout) as http:
        socket = await connect(http, addresses, token)
        agent = await register(socket, token, name, gpus, scratch, folder)
        is_wanted = True
        try:
            lease = float(agent.plan.rollout["lease_seconds"])
            log.info("node %s serves: place %d, logs in %s", name, agent.plan.slot, agent.plan.log_dir)
            async with contextlib.aclosing(heard(socket, lease)) as words:
                await agent.serve(words)
        except LeaseLostError:
            is_wanted = False
            raise
        finally:
            # Nobody waits for answers of servers whose lease is lost: the node is to be back soon.
            await asyncio.shield(asyncio.to_thread(agent.holdings.close, kill=not is_wanted))
            await socket.close()


async def _pulse(life: asyncio.Future[None]) -> None:
    """Show the keeper that this process is not stopped: a byte on standard output now and then."""
    with contextlib.suppress(OSError):  # nobody is there any more
        while True:
            os.write(1, b".")
            await asyncio.sleep(PULSE_SECONDS)
    life.cancel()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nemo_dapo.rollout.agent", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--controller", required=True, help=f"HOST:PORT[,HOST:PORT…] of the hub; the token is {TOKEN_VARIABLE}"
    )
    parser.add_argument("--folder", type=Path, required=True, help="the keeper's, for weights")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s agent %(message)s", stream=sys.stderr)
    token = os.environ.pop(TOKEN_VARIABLE, "")  # not for the servers
    return asyncio.run(run(options.controller.split(","), token, options.folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
