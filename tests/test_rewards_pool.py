"""The pool: order, limits, respawn, blame, back-pressure, ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from nemo_dapo.config import RewardConfig, RewardStyle, RewardTermConfig
from nemo_dapo.rewards.pool import RewardPool
from nemo_dapo.rewards.pool.flow import Gate
from nemo_dapo.rewards.shaping import score_of
from nemo_dapo.types import Prompt, Sample, Verdict
from tests.hostile_answers import TRUTH, hostile_responses
from tests.tiny import said, tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPT = Prompt(uid="u", token_ids=(1, 2), problem="What is 3 + 4?", ground_truth="7", metadata={"level": 1})


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    # 2 s: far above what any well-behaved item here takes on a busy machine, short enough for the ones that hang.
    with RewardPool("reward_functions:misbehave", tiny_tokenizer(), workers=2, timeout=2.0, memory_mb=1024) as pool:
        yield pool


def score(pool: RewardPool, *texts: str) -> list[Verdict]:
    return asyncio.run(pool.score_texts(PROMPT, texts))


def test_verdicts_come_in_the_order_of_the_samples(pool: RewardPool) -> None:
    samples = [said(text) for text in ("7", "8", "7", "9") * 20]
    verdicts = asyncio.run(pool.score(PROMPT, samples))
    assert [v.correct for v in verdicts] == [True, False, True, False] * 20


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("hang", "timeout: more than 2 s"),
        ("spin without signals", "timeout: more than 2 s"),
        ("segfault", "died: the worker ended by SIGSEGV"),
        ("exit", "died: the worker ended with exit code 3"),
        ("memory", "memory: MemoryError"),
        ("raise", "exception: KeyError: 'missing'"),
    ],
)
def test_only_the_guilty_item_of_a_batch_gets_an_error(pool: RewardPool, text: str, error: str) -> None:
    kind = error.partition(":")[0]
    before = pool.counts[kind]
    verdicts = score(pool, "7", "8", text, "7", "8", "7")
    assert [v.correct for v in verdicts] == [True, False, False, True, False, True]
    assert [v.error is not None for v in verdicts] == [False, False, True, False, False, False]
    assert verdicts[2].error is not None
    assert verdicts[2].error.startswith(error)
    assert pool.counts[kind] == before + 1


def test_what_a_function_prints_is_no_verdict_and_steers_no_terminal(tmp_path: Path) -> None:
    printed = tmp_path / "run" / "rewards.log"
    with RewardPool("reward_functions:misbehave", workers=1, printed=printed) as pool:
        assert [v.correct for v in score(pool, "print", "print from a child", "7")] == [False, False, True]
    assert printed.read_text() == "noise \\x1b[2Jwipes the\\u202e screen\nchild \\x1b]0;title\\x07\n"


def test_without_a_log_it_goes_to_standard_error_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    with RewardPool("reward_functions:misbehave", workers=1) as pool:
        score(pool, "print")
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "noise \\x1b[2Jwipes the\\u202e screen\n")


def test_what_a_function_reads_from_standard_input_is_no_request(pool: RewardPool) -> None:
    verdicts = score(pool, "read", "7", "read", "7")
    assert [str(v.error).partition(":")[0] for v in verdicts] == ["exception", "None"] * 2


def test_the_first_error_of_each_kind_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with RewardPool("reward_functions:misbehave", workers=1) as pool:
        score(pool, "raise", "raise", "memory", "7")
        score(pool, "raise", "exit")
    said = [record.getMessage().partition("prompt u: ")[2] for record in caplog.records]
    assert said[0] == "exception: KeyError: 'missing'"
    assert [text.partition(":")[0] for text in said] == ["exception", "memory", "died"]


def test_a_worker_killed_from_outside_costs_no_verdict(pool: RewardPool) -> None:
    pid = int(score(pool, "pid")[0].extracted or 0)
    os.kill(pid, signal.SIGKILL)
    # An idle worker that dies has met no item: nobody is blamed.
    assert [v.error for v in score(pool, *["7"] * 64)] == [None] * 64


def test_all_workers_killed_from_outside_cost_no_verdict_the_spare_among_them(pool: RewardPool) -> None:
    score(pool, "7")
    for worker in list(pool._live):
        worker.abort()
        worker.process.wait()
    assert [v.error for v in score(pool, *["7"] * 64)] == [None] * 64


def test_one_pool_serves_many_event_loops_and_threads(pool: RewardPool) -> None:
    results: list[list[Verdict]] = []
    threads = [threading.Thread(target=lambda: results.append(score(pool, *["7"] * 16))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [[v.correct for v in verdicts] for verdicts in results] == [[True] * 16] * 4


def test_more_than_fits_in_flight_is_scored_all_the_same(pool: RewardPool) -> None:
    groups = [(PROMPT, ["7", "8"] * 20)] * 50  # 2,000 units, 256 of which are admitted at a time
    assert [sum(v.correct for v in verdicts) for verdicts in pool.score_all(groups)] == [20] * 50


def test_a_cancelled_group_leaves_the_pool_usable(pool: RewardPool) -> None:
    async def cancel() -> None:
        task = asyncio.ensure_future(pool.score_texts(PROMPT, ["hang"]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert score(pool, "7")[0].correct


def test_a_closed_pool_refuses_and_leaves_no_process() -> None:
    pool = RewardPool("reward_functions:misbehave", workers=1)
    pid = int(score(pool, "pid")[0].extracted or 0)
    pool.close()
    assert not is_alive(pid)
    with pytest.raises(RuntimeError, match="closed"):
        score(pool, "7")


KINDS = ("popen", "session", "fork", "daemon")


def left(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_function_started_lives_as_long_as_its_worker_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv("LEFT_PIDS", str(pids))
    # 60 s: a worker's death that is only noticed by the time limit shows as `timeout`.
    with RewardPool("reward_functions:misbehave", workers=1, timeout=60.0) as pool:
        for kind in KINDS:
            pids.unlink(missing_ok=True)
            (verdict,) = score(pool, f"leave {kind} exits")
            assert verdict.error is not None
            assert verdict.error == f"died: the worker ended with exit code {left(pids)[-1] % 100}", kind
            assert len(left(pids)) == 2, "the item is tried once more: a death may have other causes"
            assert not any(map(is_alive, left(pids))), kind
        pids.unlink()
        score(pool, *(f"leave {kind}" for kind in KINDS), "7")
        assert all(map(is_alive, left(pids)))
        assert len(left(pids)) == len(KINDS)
    assert not any(map(is_alive, left(pids)))


def test_what_a_function_started_is_gone_when_its_worker_ran_out_of_time_or_its_keeper_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEFT_PIDS", str(tmp_path / "pids"))
    with RewardPool("reward_functions:misbehave", workers=1, timeout=2.0) as pool:
        verdicts = score(pool, *(f"leave {kind}" for kind in KINDS), "hang")
        assert str(verdicts[-1].error).startswith("timeout")
        assert not any(map(is_alive, left(tmp_path / "pids")))
        score(pool, *(f"leave {kind}" for kind in KINDS))
        for worker in pool._live:
            worker.process.send_signal(signal.SIGSTOP)
    assert len(left(tmp_path / "pids")) == 2 * len(KINDS)
    assert not any(map(is_alive, left(tmp_path / "pids")))


def test_closing_during_a_hang_ends_within_the_deadline() -> None:
    pool = RewardPool("reward_functions:misbehave", workers=1, timeout=600)
    found: list[list[Verdict]] = []
    thread = threading.Thread(target=lambda: found.append(score(pool, "hang", "7")))
    thread.start()
    time.sleep(0.5)  # normally the item hangs by then; still queued it must end as well
    pool.close(timeout=0.5)
    thread.join(30)
    assert [v.error is not None for v in found[0]] == [True, True]


def test_workers_and_all_they_started_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, sys, time; from nemo_dapo.rewards.pool import RewardPool; from nemo_dapo.types import Prompt\n"
        "pool = RewardPool('reward_functions:misbehave', workers=2, timeout=600)\n"
        f"texts = ['pid', *('leave ' + kind for kind in {KINDS!r})]\n"
        "print(asyncio.run(pool.score_texts(Prompt('u', (), '', '7'), texts))[0].extracted, flush=True)\n"
        "asyncio.run(pool.score_texts(Prompt('u', (), '', '7'), ['hang'] * 4))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LEFT_PIDS": str(tmp_path / "pids")}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        started = [pid, *left(tmp_path / "pids")]
        assert all(map(is_alive, started))
        parent.kill()
    assert len(started) == 1 + len(KINDS)
    deadline = time.monotonic() + 20
    while alive := [each for each in started if is_alive(each)]:
        assert time.monotonic() < deadline, f"{alive} outlived the trainer"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "texts", "verdicts"),
    [
        ("matches", ["7", "8"], [Verdict(True), Verdict(False)]),
        ("matches_later", ["7", "8"], [Verdict(True), Verdict(False)]),
        ("length", ["", "abc"], [Verdict(False, score=0.0), Verdict(True, score=3.0)]),
        ("rank", ["aa", "a", "aaa"], [Verdict(True, score=1.0), Verdict(False, score=0.0), Verdict(True, score=2.0)]),
    ],
)
def test_a_plain_function_works_by_its_name(name: str, texts: list[str], verdicts: list[Verdict]) -> None:
    with RewardPool(f"reward_functions:{name}", workers=1) as pool:
        assert score(pool, *texts) == verdicts


@pytest.mark.parametrize(
    ("name", "error"), [("too_few", "1 verdicts for 2 responses"), ("nonsense", "expected a Verdict, a bool")]
)
def test_a_function_that_returns_nonsense_is_an_error(name: str, error: str) -> None:
    with RewardPool(f"reward_functions:{name}", workers=1) as pool:
        for verdict in score(pool, "1", "2"):
            assert verdict.error is not None
            assert error in verdict.error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("reward_functions:absent", "has no function 'absent'"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("reward_functions", r"expected package\.module:name"),
        ("reward_functions:not_enough", r"takes \(\); expected parameters"),
    ],
)
def test_a_bad_name_fails_at_the_start(function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(function, workers=1)


def test_extra_terms_add_to_the_score_and_never_to_the_verdict() -> None:
    config = RewardConfig(function="reward_functions:matches", workers=1)
    config.extra = {"length": RewardTermConfig("reward_functions:length", weight=0.5)}
    with RewardPool.from_config(config) as pool:
        right, wrong = score(pool, "7", "eight")
    assert (right.correct, score_of(right, config)) == (True, 1.0 + 0.5 * 1)
    assert (wrong.correct, score_of(wrong, config)) == (False, -1.0 + 0.5 * 5)


def test_a_verdict_without_score_is_worth_the_configured_constants_and_an_error_nothing() -> None:
    config = RewardConfig(correct=2.0, incorrect=-3.0)
    assert (score_of(Verdict(True), config), score_of(Verdict(False), config)) == (2.0, -3.0)
    with pytest.raises(ValueError, match="verifier_error"):
        score_of(Verdict(False, error="timeout: 1 s"), config)


class Service(BaseHTTPRequestHandler):
    """A reward service whose first answers are `failures`, then verdicts by equality with the ground truth."""

    failures: list[int] = []  # noqa: RUF012
    calls = 0

    def do_POST(self) -> None:
        type(self).calls += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.failures:
            self.send_error(self.failures.pop(0))
            return
        verdicts = [{"correct": text == body["ground_truth"], "score": float(len(text))} for text in body["responses"]]
        reply = json.dumps({"verdicts": verdicts}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.calls = 0
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


def test_a_remote_reward_is_retried_and_scores_a_group_in_one_call(service: str) -> None:
    Service.failures = [503, 429]
    with RewardPool(service, workers=1) as pool:
        assert score(pool, "7", "11") == [Verdict(True, score=1.0), Verdict(False, score=2.0)]
    assert Service.calls == 3


def test_a_remote_reward_that_refuses_is_an_error_at_once(service: str) -> None:
    Service.failures = [400]
    with RewardPool(service, workers=1) as pool:
        error = score(pool, "7")[0].error
    assert error is not None
    assert "400" in error
    assert Service.calls == 1


def test_a_dead_service_is_an_error_within_the_deadline() -> None:
    with RewardPool("http://127.0.0.1:9/score", workers=1, timeout=1.0) as pool:
        verdicts = score(pool, "7", "8")
    assert all(v.error is not None and v.error.startswith("remote: http://127.0.0.1:9/score") for v in verdicts)


def test_the_hostile_corpus_kills_no_worker_and_none_of_it_is_correct() -> None:
    config = RewardConfig(style=RewardStyle.math, workers=2, timeout=30.0)
    with RewardPool.from_config(config) as pool:
        prompt = Prompt("u", (), "", TRUTH)
        responses = hostile_responses()
        mixed = [text for response in responses for text in (response, f"Answer: {TRUTH}")]
        verdicts = asyncio.run(pool.score_texts(prompt, mixed))
    assert [text[:80] for text, v in zip(mixed[::2], verdicts[::2], strict=True) if v.correct] == []
    assert all(v.correct for v in verdicts[1::2])
    assert pool.counts["died"] == pool.counts["memory"] == pool.counts["respawned"] == 0


def test_from_config_reads_with_the_configured_style_and_patterns() -> None:
    with RewardPool.from_config(RewardConfig(style=RewardStyle.dapo, workers=1)) as pool:
        assert [v.correct for v in score(pool, "Answer: 7", r"\boxed{7}", "Answer: 7.0")] == [True, False, False]
    config = RewardConfig(function="nemo_dapo.rewards.math:verify", answer_patterns=["A: (.*)"], workers=1)
    with RewardPool.from_config(config) as pool:
        assert [v.correct for v in score(pool, "A: 7.0", "Answer: 7")] == [True, False]


LONG = "We compute ½ and 😀. " * 5_000  # 100,000 characters, of one, two and four bytes


def judged(pool: RewardPool, *texts: str) -> list[Verdict]:
    """By token ids: each text's, with an end of sequence that no function may see."""
    samples = [Sample([*said(text).token_ids, 1], [0.0] * (len(said(text).token_ids) + 1), "stop") for text in texts]
    return asyncio.run(pool.score(PROMPT, samples))


def test_a_function_of_the_users_gets_the_whole_text_of_a_sample() -> None:
    with RewardPool("reward_functions:length", tiny_tokenizer(), workers=1) as pool:
        assert [v.score for v in judged(pool, LONG, "", "é")] == [len(LONG), 0, 1]
    with RewardPool("reward_functions:rank", tiny_tokenizer(), workers=1) as pool:
        assert [v.score for v in judged(pool, "é😀", LONG, "aaa")] == [0, 2, 1]


def test_the_verifiers_judge_a_long_sample_by_its_end_and_ids_and_texts_alike() -> None:
    texts = [rf"\boxed{{8}} {LONG} \boxed{{7}}", LONG, rf"\boxed{{7}} {LONG}", f"{LONG} Answer: 7", "Answer: 7"]
    for style, correct in (("math", [True, False, False, True, True]), ("dapo", [False, False, False, True, True])):
        with RewardPool.from_config(RewardConfig(style=RewardStyle(style), workers=1), tiny_tokenizer()) as pool:
            assert [v.correct for v in judged(pool, *texts)] == correct, style
            assert judged(pool, *texts) == score(pool, *texts), style


def test_a_replaced_worker_decodes_as_the_lost_one_did(pool: RewardPool) -> None:
    verdicts = judged(pool, "exit", "7", "segfault", "7", "8")
    assert [v.correct for v in verdicts] == [False, True, False, True, False]
    assert [v.error is not None for v in verdicts] == [True, False, True, False, False]


class Spelled:
    """A tokenizer of Python alone: a token is a character's number."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def test_a_tokenizer_without_a_backend_decodes_in_the_trainer_aloud(caplog: pytest.LogCaptureFixture) -> None:
    sample = Sample([ord("7")], [0.0], "stop")
    with RewardPool("reward_functions:matches", Spelled(), workers=1) as pool:
        assert asyncio.run(pool.score(PROMPT, [sample])) == [Verdict(True)]
        assert "Spelled has no backend of the tokenizers library" in caplog.text
    with (
        RewardPool("reward_functions:matches", workers=1) as pool,
        pytest.raises(ValueError, match="without a tokenizer scores texts alone"),
    ):
        asyncio.run(pool.score(PROMPT, [sample]))


def test_who_gives_up_while_another_thread_is_about_to_admit_him_leaves_no_place_taken() -> None:
    """Between a ticket's admission and its result there is a moment: here the result of the one before it."""
    gate = Gate(2)
    gate.enter(2)
    before, ticket, never = gate.enter(1), gate.enter(1), gate.enter(2)
    before.add_done_callback(lambda _: gate.give_up(ticket, 1))
    gate.leave(2)
    gate.give_up(never, 2)
    assert before.done()
    last = gate.enter(2)
    assert not last.done()
    gate.leave(1)
    assert last.done()
