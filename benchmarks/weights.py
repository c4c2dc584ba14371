"""Seconds for a weight update to two nodes, on the host and over the network, against the bare copy of as many bytes.

    python benchmarks/weights.py [--parameters 500] [--rounds 5]

The nodes are receivers in processes of their own on this machine. The bare copy by the host is one into memory that is
there already, for each node; over the network, the same bytes by one plain socket to each of two processes that keep them.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout.weights.plan import Delivery, Place, UpdatePlan
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.rollout.weights.store import WeightStore, read_table

TOKEN, NODES = "benchmark", 2
LAYER = {"q": (2048, 2048), "k": (512, 2048), "up": (5504, 2048), "down": (2048, 5504), "norm": (2048,), "bias": (512,)}

RECEIVER = """
import sys, time
from pathlib import Path
from nemo_dapo.rollout.weights.receive import Receiver
print(Receiver(Path(sys.argv[1]), sys.argv[2], "127.0.0.1").port, flush=True)
sys.stdin.read()
"""
PLAIN = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
memory = memoryview(bytearray(int(sys.argv[1])))
while True:
    filled = 0
    while filled < len(memory):
        if not (count := connection.recv_into(memory[filled:])):
            sys.exit()
        filled += count
    connection.sendall(b"!")
"""


def model(millions: int) -> dict[str, torch.Tensor]:
    """About that many parameters in bfloat16, in the sizes of a real layer."""
    layers = round(millions * 1e6 / sum(torch.Size(shape).numel() for shape in LAYER.values()))
    return {f"layers.{i}.{name}": torch.randn(shape).bfloat16() for i in range(layers) for name, shape in LAYER.items()}


@contextmanager
def child(code: str, *arguments: str) -> Iterator[int]:
    """A process that says its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def seconds(action: Callable[[], None], rounds: int) -> float:
    """Median; the first round, which pages memory in, is not counted."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def update(weights: dict[str, torch.Tensor], places: list[Place], rounds: int) -> float:
    expected = ExpectedWeights({name: tuple(one.shape) for name, one in weights.items()})
    sender = Sender(lambda: expected)
    plan = UpdatePlan(1, "bfloat16", 600.0, TOKEN, tuple(Delivery(0, place) for place in places))

    def once() -> None:
        sent = sender.send(weights.items(), plan, 0)
        assert len({one.digest for one in sent.outcomes}) == 1, sent

    try:
        return seconds(once, rounds)
    finally:
        sender.close()


def bare_copy(weights: dict[str, torch.Tensor], rounds: int) -> float:
    copies = [{name: torch.empty_like(one) for name, one in weights.items()} for _ in range(NODES)]

    def copy_all() -> None:
        for copy in copies:
            for name, one in weights.items():
                copy[name].copy_(one)

    return seconds(copy_all, rounds)


def bare_sockets(weights: dict[str, torch.Tensor], rounds: int) -> float:
    views = [one.view(torch.uint8).numpy().reshape(-1) for one in weights.values()]
    total = sum(view.nbytes for view in views)

    def send(connection: socket.socket) -> None:
        for view in views:
            connection.sendall(view.data)
        assert connection.recv(1) == b"!"

    with ExitStack() as stack:
        ports = [stack.enter_context(child(PLAIN, str(total))) for _ in range(NODES)]
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for port in ports]

        def once() -> None:
            threads = [threading.Thread(target=send, args=(connection,)) for connection in connections]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return seconds(once, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=500, help="millions")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = model(args.parameters)
    nbytes = sum(one.nbytes for one in weights.values())
    record: dict[str, float] = {"parameters": sum(one.numel() for one in weights.values()), "gigabytes": nbytes / 1e9}
    with ExitStack() as stack:
        stores = [WeightStore(nbytes, f"node{i}") for i in range(NODES)]
        for store in stores:
            stack.callback(store.close)
        record["host_seconds"] = update(weights, [store.place() for store in stores], args.rounds)
        record["copy_seconds"] = bare_copy(weights, args.rounds)
        print(json.dumps(record), flush=True)
        folders = [stack.enter_context(tempfile.TemporaryDirectory(dir=stores[0].folder.parent)) for _ in range(NODES)]
        ports = [stack.enter_context(child(RECEIVER, folder, TOKEN)) for folder in folders]
        places = [Place(f"node{i}", folders[i], "-", f"127.0.0.1:{ports[i]}") for i in range(NODES)]
        record["tcp_seconds"] = update(weights, places, args.rounds)
        assert len({read_table(folder).digest for folder in (*map(Path, folders), stores[0].folder)}) == 1
    record["socket_seconds"] = bare_sockets(weights, args.rounds)
    record["host_ratio"] = record["host_seconds"] / record["copy_seconds"]
    record["tcp_ratio"] = record["tcp_seconds"] / record["socket_seconds"]
    print(json.dumps({name: round(value, 3) for name, value in record.items()}))


if __name__ == "__main__":
    main()
