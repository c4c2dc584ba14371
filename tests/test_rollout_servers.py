"""The supervisor of the servers, on stand-in servers that start at once; the real one is in test_rollout_vllm.py."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from nemo_dapo.config import ModelConfig, Precision, RolloutConfig
from nemo_dapo.processes import kill_session, record_session
from nemo_dapo.rollout import guardian
from nemo_dapo.rollout.challenge import proof
from nemo_dapo.rollout.command import (
    choose_ports,
    connect_host,
    engine_arguments,
    listen_host,
    server_command,
    with_the_head_of,
)
from nemo_dapo.rollout.environment import server_environment
from nemo_dapo.rollout.servers import ServersClosedError, Share, VLLMServers

END_SECONDS = 20.0  # generous: this machine may be busy


def stand_in(path: Path, script: str) -> str:
    """An 'interpreter' that runs `script` whatever its arguments are."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def servers_on(tmp_path: Path, script: str, **options: object) -> VLLMServers:
    config = RolloutConfig(python=stand_in(tmp_path / "interpreter", script), **options)  # type: ignore[arg-type]
    return VLLMServers(config, tmp_path, Precision.fp32, tmp_path / "run", Share())


def wait_until(condition, seconds: float = END_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_engine_options_become_command_line_arguments():
    options = {
        "max_num_seqs": 8,
        "enforce_eager": True,
        "async_scheduling": False,
        "hf_overrides": {"a": [1]},
        "x": None,
    }
    assert engine_arguments(options) == [
        "--max-num-seqs",
        "8",
        "--enforce-eager",
        "--no-async-scheduling",
        "--hf-overrides",
        '{"a": [1]}',
    ]


@pytest.mark.parametrize("key", ["seed", "logprobs_mode", "logprobs-mode", "api_key"])
def test_an_option_that_the_trainer_owns_is_refused_with_its_place(key):
    with pytest.raises(ValueError, match=f"rollout.vllm.{key.replace('-', '_')} is set by the trainer; change"):
        engine_arguments(RolloutConfig(vllm={key: 1}).vllm)


def test_an_option_in_the_spelling_of_the_command_line_replaces_ours(tmp_path):
    config = RolloutConfig(vllm={"max-model-len": 64})
    command = server_command(config, tmp_path, Precision.fp32, 8000, 0, on_cpu=False)
    assert command.count("--max-model-len") == 1
    assert command[command.index("--max-model-len") + 1] == "64"


def test_the_command_asks_for_processed_logprobs_and_does_not_show_the_key(tmp_path):
    config = RolloutConfig(api_key="s3cret", max_prompt_length=3, max_response_length=4)
    command = server_command(config, tmp_path, Precision.bf16, 5, 6, on_cpu=True)
    pairs = list(itertools.pairwise(command))
    for pair in [("--logprobs-mode", "processed_logprobs"), ("--dtype", "bfloat16"), ("--max-model-len", "7")]:
        assert pair in pairs
    assert ("-m", "vllm.entrypoints.openai.api_server") in pairs
    assert "s3cret" not in " ".join(command)


@pytest.mark.parametrize("wanted", [False, True])
def test_servers_tell_the_experts_of_tokens_where_these_are_wanted(wanted, tmp_path):
    config = RolloutConfig(return_routes=wanted)
    command = server_command(config, tmp_path, Precision.bf16, 5, 6, on_cpu=False)
    assert ("--enable-return-routed-experts" in command) == wanted
    environment = server_environment(config, Precision.bf16, 0, "key", {}, on_cpu=False)
    assert (environment.get("VLLM_USE_V2_MODEL_RUNNER") == "1") == wanted


def test_logits_are_as_exact_in_vllm_as_in_the_trainer(tmp_path):
    rollout = RolloutConfig(vllm={"hf_overrides": {"rope_theta": 5.0}, "max_num_seqs": 3})
    assert with_the_head_of(ModelConfig("m"), rollout) is rollout
    exact = with_the_head_of(ModelConfig("m", fp32_logits=True), rollout)
    assert rollout.vllm["hf_overrides"] == {"rope_theta": 5.0}
    command = server_command(exact, tmp_path, Precision.bf16, 5, 6, on_cpu=True)
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert overrides == {"rope_theta": 5.0, "head_dtype": "float32"}
    assert ("--max-num-seqs", "3") in [*itertools.pairwise(command)]


def test_servers_of_one_run_differ_in_seed_and_port(tmp_path):
    servers = servers_on(tmp_path, "exit 0", num_servers=3)
    assert len({server.seed for server in servers.servers}) == 3
    assert len({server.port for server in servers.servers}) == 3


def test_a_random_key_is_made_when_none_is_given(tmp_path):
    first, second = servers_on(tmp_path, "exit 0"), servers_on(tmp_path, "exit 0")
    assert len(first.api_key) >= 32
    assert first.api_key != second.api_key


def test_devices_and_servers_must_match_in_number(tmp_path):
    with pytest.raises(ValueError, match=r"visible_devices has 1 entries, rollout.num_servers is 2"):
        servers_on(tmp_path, "exit 0", num_servers=2, visible_devices=["0"])


def test_a_port_in_use_is_an_error_that_names_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} on 127.0.0.1 .*rollout.port"):
            servers_on(tmp_path, "exit 0", port=port)


def test_free_ports_are_different_can_be_used_at_once_and_are_none_that_a_connection_may_be_given_meanwhile():
    ports = choose_ports("127.0.0.1", 0, 4)
    assert len(set(ports)) == 4
    assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("host", "reached"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("node-7", "node-7")],
)
def test_the_address_to_connect_to_follows_the_one_to_listen_on(host, reached):
    assert connect_host(host) == reached


def test_a_server_for_other_hosts_is_reached_at_its_nodes_address_and_listens_there_unless_the_user_chose():
    assert connect_host("0.0.0.0", "10.0.0.7") == "10.0.0.7"
    assert connect_host("::", "fd00::7") == "[fd00::7]"
    assert [listen_host(host, "10.0.0.7") for host in ("127.0.0.1", "localhost", "0.0.0.0", "ib0-7")] == [
        "10.0.0.7",
        "10.0.0.7",
        "0.0.0.0",
        "ib0-7",
    ]


def test_a_server_that_dies_at_start_is_reported_with_exit_code_and_log(tmp_path):
    script = 'echo " WARNING ValueError: chat warm-up"; echo "ValueError: no such model"; seq -f "line %g" 0 59; exit 3'
    servers = servers_on(tmp_path, script)
    with pytest.raises(
        RuntimeError, match=r"(?s)exit code 3.*server_0\.log.*ValueError: no such model.*line 59.*remedy"
    ):
        servers.start()
    assert not servers.alive(0)


def test_a_server_killed_at_start_is_reported_with_its_signal(tmp_path):
    with pytest.raises(RuntimeError, match="killed by signal 9"):
        servers_on(tmp_path, "kill -9 $$").start()


def test_a_server_that_never_answers_is_ended_at_the_deadline(tmp_path):
    servers = servers_on(tmp_path, f"sleep 987 & echo $! > {tmp_path}/pid; wait", start_timeout=2.0)
    with pytest.raises(TimeoutError, match=r"expected within rollout.start_timeout=2 s"):
        servers.start()
    assert not alive(int((tmp_path / "pid").read_text()))


def test_closing_ends_a_server_that_ignores_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_dapo.rollout.servers.END_GRACE_SECONDS", 0.5)
    servers = servers_on(tmp_path, f'trap "" TERM; echo $$ > {tmp_path}/pid; while true; do sleep 1; done')
    servers._spawn(servers.servers[0])
    assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip() != "")
    servers.close()
    servers.close()
    assert not alive(int((tmp_path / "pid").read_text()))


# A stand-in server with a child in its group and one that left it, as an engine process might.
FAMILY = "sleep 987 & echo $! >> {out}; setsid sleep 987 & echo $! >> {out}; echo $$ >> {out}; wait"
# The trainer: starts the guardian, then forks, and the fork keeps the pipe's write end open for ever.
TRAINER = """
import os, subprocess, sys, time
guardian, scratch, out, script = sys.argv[1:]
subprocess.Popen([sys.executable, "-I", "-S", guardian, str(os.getpid()), "1", "", scratch, "--", "sh", "-c", script],
                 stdin=subprocess.PIPE, start_new_session=True)
if os.fork() == 0:
    open(out, "a").close()
time.sleep(987)
"""


@pytest.mark.slow
def test_a_parent_killed_by_sigkill_leaves_no_server_and_no_weights(tmp_path):
    out, scratch = tmp_path / "pids", tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "weights").touch()
    arguments = [guardian.__file__, str(scratch), str(out), FAMILY.format(out=out)]
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, *arguments], start_new_session=True)
    try:
        assert wait_until(lambda: out.exists() and len(out.read_text().split()) == 3)
        pids = [int(pid) for pid in out.read_text().split()]
        assert all(map(alive, pids))
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
        assert wait_until(lambda: not any(map(alive, pids)))
        assert wait_until(lambda: not scratch.exists())
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)  # the fork


def test_a_guardian_that_is_killed_takes_the_server_along(tmp_path):
    servers = servers_on(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 987")
    servers._spawn(servers.servers[0])
    try:
        kill_guardian(servers, tmp_path / "pid", 1)
        assert wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))
    finally:
        servers.close()


def kill_guardian(servers: VLLMServers, pids: Path, count: int) -> None:
    """SIGKILL to the guardian once `count` processes have written their ids to `pids`."""
    assert wait_until(lambda: pids.exists() and len(pids.read_text().split()) == count)
    process = servers.servers[0].process
    assert process is not None
    process.kill()
    process.wait()


# A server with a child in its session, as vLLM's engine process is, which outlives the server's own death.
WITH_ENGINE = "sleep 987 & echo $! >> {pids}; echo $$ >> {pids}; wait"


@pytest.mark.parametrize("by_whom", ["the restart or the end", "the next run"])
def test_what_a_killed_guardian_leaves_is_ended_by(by_whom, tmp_path):
    pids = tmp_path / "pids"
    servers = servers_on(tmp_path, WITH_ENGINE.format(pids=pids))
    servers._spawn(servers.servers[0])
    kill_guardian(servers, pids, 2)
    engine = int(pids.read_text().split()[0])
    assert alive(engine)  # else there is nothing to test
    if by_whom == "the next run":
        servers_on(tmp_path, "exit 0")
    else:
        servers.close()
    assert wait_until(lambda: not alive(engine))


def test_a_session_of_a_stranger_is_left_alone(tmp_path):
    stranger = subprocess.Popen(["sleep", "987"], start_new_session=True)
    try:
        record = tmp_path / "server_0.session"
        record_session(str(record), stranger.pid)
        said = json.loads(record.read_text())
        for changes in ({"started": said["started"] - 1}, {"boot": "another"}, {"session": 2**22 + 1}):
            record.write_text(json.dumps(said | changes))
            assert kill_session(str(record)) == []
        record.write_text("")
        assert kill_session(str(record)) == []
        assert stranger.poll() is None
        record.write_text(json.dumps(said))
        assert kill_session(str(record)) == [stranger.pid]
    finally:
        stranger.kill()
        stranger.wait()


def test_closing_from_another_thread_ends_the_wait_for_the_start(tmp_path):
    servers = servers_on(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 987")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(servers.start)
        assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip() != "")
        servers.close()
        with pytest.raises(RuntimeError, match="was not ready yet when the run ended"):
            starting.result(END_SECONDS)
    assert not alive(int((tmp_path / "pid").read_text()))


class Impostor(BaseHTTPRequestHandler):
    """Whoever took the port first: it answers /health, and keeps what it is sent."""

    def do_GET(self) -> None:
        self.server.heard.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None: ...


def test_whoever_takes_the_port_first_gets_no_key_and_is_not_believed(tmp_path):
    servers = servers_on(tmp_path, "exec sleep 987", start_timeout=3.0)
    with HTTPServer(("127.0.0.1", servers.servers[0].port), Impostor) as impostor:
        impostor.heard = []  # type: ignore[attr-defined]
        threading.Thread(target=impostor.serve_forever, daemon=True).start()
        with pytest.raises(RuntimeError, match=r"is not our server: another program took the port .*rollout.port=0"):
            servers.start()
        impostor.shutdown()
    assert impostor.heard  # type: ignore[attr-defined]
    assert servers.api_key not in str(impostor.heard)  # type: ignore[attr-defined]


def test_a_server_that_hangs_is_killed_without_the_grace_of_an_orderly_end(tmp_path):
    script = f'trap "touch {tmp_path}/termed" TERM; echo $$ > {tmp_path}/pid; while true; do sleep 0.1; done'
    servers = servers_on(tmp_path, script)
    servers._spawn(servers.servers[0])
    try:
        assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip() != "")
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        servers._end(servers.servers[0], kill=True)
        assert not alive(pid)
        assert not (tmp_path / "termed").exists()
    finally:
        servers.close()


def test_no_server_is_started_once_they_are_closed(tmp_path):
    servers = servers_on(tmp_path, f"touch {tmp_path}/started")
    servers.close()
    with pytest.raises(ServersClosedError):
        servers.restart(0)
    assert servers.servers[0].process is None
    assert not (tmp_path / "started").exists()


def test_one_server_cannot_answer_the_challenge_of_another():
    assert proof("key", "nonce", 1) != proof("key", "nonce", 2)
    assert proof("key", "nonce", 1) != proof("other", "nonce", 1)


SHARES_MEMORY = """
from multiprocessing.shared_memory import SharedMemory
import time
shared = SharedMemory(create=True, size=8)
with open({out!r}, "w") as file:
    file.write(shared.name)
time.sleep(987)
"""


@pytest.mark.parametrize("guardian_killed_before", [False, True])
def test_shared_memory_of_a_killed_server_is_removed(guardian_killed_before, tmp_path):
    out = tmp_path / "name"
    (tmp_path / "server.py").write_text(SHARES_MEMORY.format(out=str(out)))
    servers = servers_on(tmp_path, f"exec {sys.executable} {tmp_path}/server.py")
    servers._spawn(servers.servers[0])
    try:
        assert wait_until(lambda: out.exists() and out.read_text() != "")
        shared = Path("/dev/shm") / out.read_text()
        assert shared.exists()
        process = servers.servers[0].process
        assert process is not None
        if guardian_killed_before:
            process.kill()
        servers._end(servers.servers[0], kill=True)
        assert not shared.exists()
    finally:
        servers.close()
