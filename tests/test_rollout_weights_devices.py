"""The carriers that put weights straight into servers' devices: what they decide, say and check.

There is no GPU here. Stand-ins take the places of libnccl, of device memory and of the servers' HTTP routes; everything
else, both ends of each carrier included, is what would run on GPUs. That bytes arrive there is not shown here.
"""

from __future__ import annotations

import base64
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch

from nemo_dapo.rollout.weights import broadcast, nccl, servers
from nemo_dapo.rollout.weights.assemble import Assembler
from nemo_dapo.rollout.weights.broadcast import BroadcastCarrier
from nemo_dapo.rollout.weights.checklist import Checklist
from nemo_dapo.rollout.weights.cuda_ipc import CUDAIPCCarrier, Handle, arguments_of, handle_of
from nemo_dapo.rollout.weights.deadline import Deadline
from nemo_dapo.rollout.weights.incoming import Incoming
from nemo_dapo.rollout.weights.nccl import NCCL, Communicator, first_ranks, require_same_version, spelled
from nemo_dapo.rollout.weights.pack import Piece, pack
from nemo_dapo.rollout.weights.plan import Seat, Target, UpdatePlan, seated
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.rollout.weights.servers import ServerCalls
from nemo_dapo.rollout.weights.table import Entry, Table
from tests.test_rollout_weights import EXPECTED, weights

CPU = torch.device("cpu", 0)
VERSION = 22803


def pieces(size: int = 1024, version: int = 1) -> Iterator[Piece]:
    yield from pack(
        weights(version).items(), Checklist(EXPECTED, "bfloat16"), lambda: torch.empty(size, dtype=torch.uint8)
    )


def sent() -> tuple[list[Piece], Table]:
    all_pieces = list(pieces())
    return all_pieces, Table(1, tuple(entry for piece in all_pieces for entry in piece.entries))


def is_whole(loaded: dict[str, torch.Tensor]) -> bool:
    expected = weights()
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


# -------------------------------------------------------------------- pieces into tensors


@pytest.mark.parametrize("size", [64, 192, 1024, 1 << 20])
def test_tensors_of_whatever_size_are_put_together_again(size):
    assembler = Assembler(1, CPU)
    loaded: dict[str, torch.Tensor] = {}
    table: list[Entry] = []
    for piece in pieces(size):
        loaded |= dict(assembler.add(piece.offset, piece.entries, piece.data))
        table += piece.entries
        piece.data.fill_(255)  # the sender's memory is its own again
    assert is_whole(loaded)
    assembler.finish(Table(1, tuple(table)).digest)


def test_a_piece_that_is_missing_is_refused_and_one_that_comes_again_is_passed_over():
    all_pieces, table = sent()
    assembler = Assembler(1, CPU)
    loaded = dict(assembler.add(0, all_pieces[0].entries, all_pieces[0].data))
    assert list(assembler.add(0, all_pieces[0].entries, all_pieces[0].data)) == []
    with pytest.raises(ValueError, match="a piece for byte 2048 came, expected was byte 1024"):
        list(assembler.add(2048, all_pieces[2].entries, all_pieces[2].data))
    with pytest.raises(ValueError, match="in 1024 bytes of version 1 came, which are not what was sent"):
        assembler.finish(table.digest)
    for piece in all_pieces[1:]:
        loaded |= dict(assembler.add(piece.offset, piece.entries, piece.data))
    assert is_whole(loaded)
    with pytest.raises(ValueError, match="not what was sent"):
        assembler.finish(Table(2, table.entries).digest)


def test_a_bit_that_flips_on_the_way_to_a_device_is_refused_with_the_name_of_its_tensor():
    assembler = Assembler(1, CPU)
    *before, hit, last = pieces()
    hit.data[7] ^= 1  # in the middle of a tensor of several pieces
    for piece in (*before, hit):
        list(assembler.add(piece.offset, piece.entries, piece.data))
    with pytest.raises(ValueError, match="parameter wide has other bytes than were sent"):
        list(assembler.add(last.offset, last.entries, last.data))


# -------------------------------------------------------------------- before the first byte


def test_a_whole_export_is_looked_at_before_anybody_is_sent_anything_and_goes_through_to_its_end():
    sender, seen = Sender(lambda: EXPECTED), []

    def exported(*names: str, **changes: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in {**weights(), **changes}.items():
            seen.append(name)
            yield from [(name, tensor)] * (1 + (name in names))

    with pytest.raises(ValueError, match="parameter scale was exported twice"):
        sender.look(exported("scale"), "bfloat16")
    assert seen == list(EXPECTED.shapes)
    for changes, problem in (
        ({"more": torch.ones(1)}, "1 unexpected: more"),
        ({"odd": torch.ones(5, 3, dtype=torch.bfloat16)}, r"odd \(5, 3\) instead of \(3, 5\)"),
        ({"odd": torch.ones(3, 5)}, "odd float32 instead of bfloat16"),
    ):
        with pytest.raises(ValueError, match=problem):
            sender.look(exported(**changes), "bfloat16")
    assert not sender.has_looked
    sender.look(exported(), "bfloat16")
    assert sender.has_looked


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("more", (1,), "bfloat16"), r"parameter more \(1,\) bfloat16 .* the model folder has none"),
        (("odd", (5, 3), "bfloat16"), r"parameter odd \(5, 3\) bfloat16 was exported, the model folder has \(3, 5\)"),
        (("odd", (3, 5), "float32"), r"parameter odd \(3, 5\) float32 was exported"),
    ],
)
def test_a_tensor_that_the_served_model_does_not_have_is_refused_before_its_bytes_reach_a_device(changed, problem):
    checklist = Checklist(EXPECTED, "bfloat16", at_once=True)
    checklist.add("embed", (7, 33), "bfloat16")
    with pytest.raises(ValueError, match=problem):
        checklist.add(*changed)


def test_servers_belong_to_the_ranks_on_their_gpus_or_to_nobody():
    seats = [Seat("a", "g0"), Seat("a", "g1"), Seat("b", "g2")]
    targets = [Target("s0", "u", ("g0", "g1")), Target("s1", "u", ("g2",)), Target("s2", "u", ("g8", "g9"))]
    assert [target.host for target in seated(targets, seats)] == ["a", "b", ""]
    assert [target.host for target in seated(targets, [Seat("a"), Seat("b")])] == ["", "", ""]
    for gpus in (("g1", "g9"), ("g1", "g2"), ()):
        with pytest.raises(ValueError, match=r"s3 is on the GPUs .* it must share all or none"):
            seated([Target("s3", "u", gpus)], seats)
    plan = UpdatePlan(1, "bfloat16", 9.0, "token", (), seated(targets, seats), "key", is_direct=True)
    assert [target.name for target in plan.on_gpus_of("a")] == ["s0"]
    assert [target.name for target in plan.on_gpus_of("")] == ["s2"]
    assert UpdatePlan.of_json(json.loads(json.dumps(plan.as_json()))) == plan


# -------------------------------------------------------------------- NCCL: stand-ins

# By unique id: who has joined, and what the sender last broadcast. One group is one `Wire`.


class Wire:
    """What a communicator is made of, among threads: collectives that end when every rank has come to them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.joined: set[int] = set()
        self.came: list[set[int]] = []  # by collective
        self.data: dict[int, torch.Tensor] = {}


class FakeWork:
    def __init__(self, query: Callable[[], bool]) -> None:
        self.query = query


class FakeNCCL(NCCL):
    """Of one rank. `hangs` makes it stop in its tracks, as SIGSTOP does: joined, but no collective any more. With `buffers`
    a broadcast is over for its sender once it has left, as NCCL's is when the next rank has room for all of it."""

    wires: ClassVar[dict[bytes, Wire]] = {}

    def __init__(self, *, hangs: bool = False, buffers: bool = False) -> None:
        self.hangs, self.buffers, self.aborted = hangs, buffers, 0

    def version(self) -> int:
        return VERSION

    def unique_id(self) -> bytes:
        return bytes([len(self.wires)]) * nccl.UNIQUE_ID_BYTES

    def join(self, world_size: int, unique_id: bytes, rank: int) -> Any:
        wire = self.wires.setdefault(unique_id, Wire(world_size))
        assert wire.world_size == world_size
        with wire.changed:
            assert rank not in wire.joined
            wire.joined.add(rank)
            wire.changed.notify_all()
            if not wire.changed.wait_for(lambda: len(wire.joined) == world_size, timeout=20):
                raise RuntimeError("nobody came")
        return {"wire": wire, "rank": rank, "step": 0}

    def all_reduce(self, data: torch.Tensor, communicator: Any) -> FakeWork:
        return self._collective(communicator, lambda: None)

    def broadcast(self, data: torch.Tensor, root: int, communicator: Any) -> FakeWork:
        wire, step = communicator["wire"], communicator["step"]
        if communicator["rank"] == root:
            wire.data[step] = data.clone()
            work = self._collective(communicator, lambda: None)
            return FakeWork(lambda: True) if self.buffers else work
        return self._collective(communicator, lambda: data.copy_(wire.data[step]))

    def _collective(self, communicator: Any, end: Callable[[], Any]) -> FakeWork:
        wire, rank, step = communicator["wire"], communicator["rank"], communicator["step"]
        communicator["step"] += 1
        while len(wire.came) <= step:
            wire.came.append(set())
        if not self.hangs:
            wire.came[step].add(rank)

        def query() -> bool:
            if len(wire.came[step]) < wire.world_size:
                return False
            end()
            return True

        return FakeWork(query)

    def abort(self, communicator: Any) -> None:
        self.aborted += 1


class FakeServer:
    """A server with its workers, as its weight routes behave."""

    def __init__(self, name: str, workers: int = 1) -> None:
        self.target = Target(name, f"http://{name}", tuple(f"GPU-{name}-{i}" for i in range(workers)), "2.28.3")
        self.nccls = [FakeNCCL() for _ in range(workers)]
        self.incoming = [
            Incoming(CPU, i, functools.partial(self._nccl, i), functools.partial(self._open, i)) for i in range(workers)
        ]
        self.opened: list[set[str]] = [set() for _ in range(workers)]  # by worker
        self.loaded: list[dict[str, torch.Tensor]] = [{} for _ in range(workers)]
        self.is_complete = self.is_stopped = False
        self.refuses_at: int | None = None

    def _nccl(self, worker: int) -> FakeNCCL:
        return self.nccls[worker]

    def _open(self, worker: int, handle: Handle, device: int) -> torch.Tensor:
        self.opened[worker].add(handle.memory)
        return MEMORY[handle.memory]

    def post(self, route: str, body: Any) -> None:
        if self.is_stopped:
            time.sleep(1.0)
            raise TimeoutError("timed out")
        body = json.loads(json.dumps(body))  # whatever travels is JSON
        with ThreadPoolExecutor(len(self.incoming)) as pool:
            for done in [pool.submit(self._worker, i, route, body) for i in range(len(self.incoming))]:
                done.result()

    def _worker(self, worker: int, route: str, body: Any) -> None:
        if route == "/init_weight_transfer_engine":
            self.incoming[worker].join(body["init_info"]["group"])
            return
        info = body["update_info"]
        if (piece := info.get("piece")) is None:
            self.incoming[worker].finish(info["version"], info["digest"])
            self.is_complete = True
            return
        if piece["offset"] == self.refuses_at:
            raise RuntimeError("HTTP 500 CUDA out of memory")
        self.loaded[worker] |= dict(self.incoming[worker].receive(info["version"], piece))

    def stop(self) -> None:
        """As SIGSTOP does: no answer, and no collective, any more."""
        self.is_stopped = True
        self.nccls[0].hangs = True

    @property
    def is_served(self) -> bool:
        return self.is_complete and all(is_whole(loaded) for loaded in self.loaded)


class FakeCalls(ServerCalls):
    """Reaches stand-ins instead of HTTP servers."""

    def __init__(self, *fakes: FakeServer) -> None:
        super().__init__("key", len(fakes))
        self.fakes = {fake.target.name: fake for fake in fakes}

    def _post(self, target: Target, route: str, body: Any, deadline: float) -> None:
        self.fakes[target.name].post(route, body)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(FakeNCCL, "wires", {})
    monkeypatch.setattr(broadcast, "PIECE_SECONDS", 0.3)
    monkeypatch.setattr(broadcast, "JOIN_SECONDS", 0.6)
    monkeypatch.setattr(servers, "GRACE_SECONDS", 0.2)


def carrier_to(*fakes: FakeServer, buffers: bool = False) -> BroadcastCarrier:
    make = functools.partial(Communicator, device="cpu")
    return BroadcastCarrier([fake.target for fake in fakes], FakeCalls(*fakes), FakeNCCL(buffers=buffers), make)


def send(carrier: Any, *, before: Callable[[int], None] = lambda number: None) -> None:
    all_pieces, table = sent()
    carrier.begin(1, Deadline.after(20.0))
    for number, piece in enumerate(all_pieces):
        before(number)
        carrier.carry(piece)
    carrier.commit(table)
    end(carrier, table)


def end(carrier: Any, table: Table) -> None:
    """As rank 0 does at each server that is left; see push.py."""
    for target in carrier.targets:
        carrier.calls.fakes[target.name].post(
            "/update_weights", {"update_info": {"version": 1, "digest": table.digest}}
        )


# -------------------------------------------------------------------- NCCL: who is who


def test_workers_of_servers_of_several_sizes_have_ranks_without_gap_or_overlap():
    fakes = [FakeServer("tp2", 2), FakeServer("tp4dp2", 8), FakeServer("pp2", 2)]
    assert first_ranks([fake.target.workers for fake in fakes]) == [1, 3, 11]
    carrier = carrier_to(*fakes)
    send(carrier)
    (wire,) = FakeNCCL.wires.values()
    assert wire.joined == set(range(13))
    assert wire.world_size == 13
    assert all(fake.is_served for fake in fakes)
    assert carrier.dropped == {}


def test_unequal_versions_of_nccl_are_refused_before_anything_is_sent_with_both_versions_and_the_remedy():
    require_same_version(VERSION, {"server 0": "2.28.3"})
    with pytest.raises(ValueError, match=r"the trainer has 2\.28\.3: server 1 has 2\.27\.5; .*VLLM_NCCL_SO_PATH"):
        require_same_version(VERSION, {"server 0": "2.28.3", "server 1": "2.27.5"})
    with pytest.raises(ValueError, match="server 2 has none"):
        require_same_version(VERSION, {"server 2": ""})
    assert spelled(2708) == "2.7.8"
    other = FakeServer("other")
    other.target = Target("other", "http://other", ("GPU",), "2.27.5")
    with pytest.raises(ValueError, match=r"other has 2\.27\.5"):
        carrier_to(other)


# -------------------------------------------------------------------- NCCL: faults


def test_a_broadcast_that_never_returns_is_aborted_and_the_update_completes_without_the_culprit():
    well, stopped, other = FakeServer("well", 2), FakeServer("stopped"), FakeServer("other")
    carrier = carrier_to(well, stopped, other)

    def stop(number: int) -> None:
        if number == 2:
            stopped.stop()

    send(carrier, before=stop)
    assert list(carrier.dropped) == ["stopped"]
    assert "/update_weights did not answer within 0 s" in carrier.dropped["stopped"]
    assert well.is_served
    assert other.is_served
    assert not stopped.is_complete
    assert isinstance(carrier.nccl, FakeNCCL)
    assert carrier.nccl.aborted == 1
    assert all(one.aborted == 1 for one in (*well.nccls, *other.nccls))
    sizes = [wire.world_size for wire in FakeNCCL.wires.values()]
    assert sizes == [5, 4]


@pytest.mark.parametrize("at", [0, 2, -1])
def test_a_piece_that_has_left_its_sender_comes_again_to_those_behind_a_server_that_stands_still(at):
    well, stopped = FakeServer("well", 2), FakeServer("stopped")
    carrier = carrier_to(well, stopped, buffers=True)

    def stop(number: int) -> None:
        if number == at % len(sent()[0]):
            stopped.stop()

    send(carrier, before=stop)
    assert list(carrier.dropped) == ["stopped"]
    assert well.is_served


def test_where_all_answer_that_a_broadcast_was_broken_off_they_join_anew_and_nobody_is_left_out():
    """As where a worker's device is late: its process, which is well, answers like the others."""
    well, late = FakeServer("well", 2), FakeServer("late")
    carrier = carrier_to(well, late)

    def hang_once(number: int) -> None:
        if number == 2:
            late.nccls[0].hangs = True
            late.nccls[0] = FakeNCCL()  # of the next group

    send(carrier, before=hang_once)
    assert carrier.dropped == {}
    assert well.is_served
    assert late.is_served
    assert [wire.world_size for wire in FakeNCCL.wires.values()] == [4, 4]


def test_a_server_that_refuses_a_piece_is_left_out_and_nobody_else_takes_anything_twice():
    well, sick = FakeServer("well"), FakeServer("sick")
    sick.refuses_at = 1024
    carrier = carrier_to(well, sick)
    send(carrier)
    assert "CUDA out of memory" in carrier.dropped["sick"]
    assert well.is_served


def test_a_server_that_does_not_join_is_left_out():
    well, stopped = FakeServer("well"), FakeServer("stopped")
    stopped.is_stopped = True
    carrier = carrier_to(well, stopped)
    send(carrier)
    assert list(carrier.dropped) == ["stopped"]
    assert well.is_served


def test_an_update_that_no_server_is_left_for_says_what_became_of_each():
    alone = FakeServer("alone")
    alone.refuses_at = 0
    with pytest.raises(ConnectionError, match=r"no server is left .*alone.*CUDA out of memory"):
        send(carrier_to(alone))


def test_an_update_keeps_to_its_deadline_whatever_servers_do():
    carrier = carrier_to(FakeServer("well"))
    carrier.begin(1, Deadline.after(20.0))
    carrier.deadline = Deadline(time.monotonic() - 1, 20.0)
    with pytest.raises(TimeoutError, match="sync_timeout=20 s were over before well had the piece of weights 1"):
        carrier.carry(next(pieces()))


# -------------------------------------------------------------------- CUDA IPC

MEMORY: dict[str, torch.Tensor] = {}  # by handle, in place of device memory


def shared(version: int = 3, kind: bytes = b"c", size: int = 66) -> tuple[Any, ...]:
    """As `UntypedStorage._share_cuda_` answers, of memory that is not there."""
    memory = (bytes([version]) + kind + bytes(range(64)))[:size]
    return (0, memory, 1 << 20, 512, b"/torch_1_2", 8, b"event" * 12, True)


def test_a_handle_travels_as_json_without_pickle_and_comes_out_as_it_was():
    handle = handle_of(shared())
    said = json.loads(json.dumps(handle.as_json()))
    assert set(map(type, said.values())) <= {str, int, bool}
    assert arguments_of(Handle(**said), 3, 5) == (5, *shared()[1:])


@pytest.mark.parametrize(("theirs", "mine", "used"), [(3, 2, 2), (2, 3, 2), (3, 3, 3)])
def test_a_newer_torch_s_handle_is_opened_under_this_torch_s_version(theirs, mine, used):
    assert arguments_of(handle_of(shared(theirs)), mine, 0)[1][0] == used


def test_memory_of_expandable_segments_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="unset PYTORCH_CUDA_ALLOC_CONF"):
        handle_of(shared(kind=b"e"))
    forged = Handle(**(handle_of(shared()).as_json() | {"memory": base64.b64encode(b"3c").decode()}))
    with pytest.raises(ValueError, match="does not describe plain device memory"):
        arguments_of(forged, 3, 0)


def handles_for(rank: int, buffers: list[torch.Tensor]) -> list[Handle]:
    made = [Handle(f"rank{rank}-buffer{i}", 0, 0, "", 0, "", False) for i in range(len(buffers))]
    MEMORY.update({handle.memory: buffer for handle, buffer in zip(made, buffers, strict=True)})
    return made


def ranks_of_a_node(fakes: list[FakeServer], ranks: int, size: int = 1024) -> list[tuple[CUDAIPCCarrier, list[Any]]]:
    """A carrier and its buffers for each rank; the first tells the servers, whose workers' GPUs are the ranks' in order."""
    barrier = threading.Barrier(ranks, timeout=20)
    gpus = [gpu for fake in fakes for gpu in fake.target.gpus]
    buffers = [[torch.empty(size, dtype=torch.uint8) for _ in range(2)] for _ in range(ranks)]
    handles = {gpus[rank]: handles_for(rank, buffers[rank]) for rank in range(ranks)}
    targets = [fake.target for fake in fakes]

    def meet(seconds: float) -> None:
        barrier.wait(seconds)

    carriers = [CUDAIPCCarrier(buffers[0], meet, targets, handles, FakeCalls(*fakes))]
    carriers += [CUDAIPCCarrier(buffers[rank], meet) for rank in range(1, ranks)]
    return list(zip(carriers, buffers, strict=True))


def send_from(carrier: CUDAIPCCarrier, buffers: list[torch.Tensor]) -> None:
    turn = iter(range(10**6))
    packed = pack(weights().items(), Checklist(EXPECTED, "bfloat16"), lambda: buffers[next(turn) % 2])
    entries: list[Entry] = []
    carrier.begin(1, Deadline.after(20.0))
    for piece in packed:
        entries += piece.entries
        carrier.carry(piece)
    carrier.commit(Table(1, tuple(entries)))
    end(carrier, Table(1, tuple(entries)))


def send_from_all(node: list[tuple[CUDAIPCCarrier, list[Any]]]) -> list[Future[None]]:
    with ThreadPoolExecutor(len(node)) as pool:
        return [pool.submit(send_from, *rank) for rank in node]


def test_every_worker_reads_the_pieces_of_the_rank_on_its_own_gpu():
    fakes = [FakeServer("tp2", 2), FakeServer("tp1", 1)]
    node = ranks_of_a_node(fakes, 3)
    for done in send_from_all(node):
        done.result()
    assert all(fake.is_served for fake in fakes)
    assert node[0][0].dropped == {}
    opened = [worker for fake in fakes for worker in fake.opened]
    assert opened == [{f"rank{rank}-buffer0", f"rank{rank}-buffer1"} for rank in range(3)]


def test_a_server_that_fails_at_a_piece_is_dropped_while_the_ranks_go_on_for_the_others():
    well, sick = FakeServer("well", 2), FakeServer("sick")
    sick.refuses_at = 1024
    node = ranks_of_a_node([well, sick], 3)
    for done in send_from_all(node):
        done.result()
    assert well.is_served
    assert not sick.is_complete
    assert "CUDA out of memory" in node[0][0].dropped["sick"]


def test_an_update_of_a_node_keeps_to_its_deadline():
    ((carrier, (buffer, _)),) = ranks_of_a_node([FakeServer("well")], 1)
    carrier.begin(1, Deadline(time.monotonic() - 1, 20.0))
    with pytest.raises(
        TimeoutError, match="sync_timeout=20 s were over before every rank of the host had the piece of weights 1"
    ):
        carrier.carry(Piece(0, buffer))


def test_a_worker_on_a_gpu_without_a_rank_is_refused_before_anything_is_sent():
    fake = FakeServer("tp2", 2)
    with pytest.raises(ValueError, match=r"tp2 has workers on \['GPU-tp2-1'\], where no rank of the trainer is"):
        CUDAIPCCarrier([], lambda seconds: None, [fake.target], {"GPU-tp2-0": []}, FakeCalls(fake))


def test_pieces_of_two_versions_are_not_mixed():
    incoming = Incoming(CPU, 0, FakeNCCL, lambda handle, device: MEMORY[handle.memory])
    data = next(pieces()).data
    (handle, _) = handles_for(0, [data, data])
    info = {"offset": 0, "nbytes": len(data), "entries": [], "seconds": 1.0, "handles": [handle.as_json()]}
    list(incoming.receive(1, info))
    with pytest.raises(ValueError, match="a piece of version 2 came in the middle of version 1"):
        list(incoming.receive(2, info))
