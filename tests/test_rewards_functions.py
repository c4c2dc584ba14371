"""What a reward function may look like and return, and what a reward service may answer: checked, field by field."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nemo_dapo.rewards.function import is_group_function, load, with_terms
from nemo_dapo.rewards.remote import RemoteReward
from nemo_dapo.rewards.verdict import make_verdict, to_verdict
from nemo_dapo.types import MAX_SCORE, Prompt, Verdict

PROMPT = Prompt(uid="u", token_ids=(), problem="What is 3 + 4?", ground_truth="7", source="sums")


def function(name: str) -> str:
    return f"reward_functions:{name}"


# ---------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    "name",
    ["matches", "matches_later", "swapped", "by_keyword", "by_position", "responses_first", "instance", "method",
     "partial", "decorated", "numpy_array"],
)  # fmt: skip
def test_a_function_is_called_by_the_names_of_its_parameters(name: str) -> None:
    assert [v.correct for v in load(function(name))(PROMPT, ["7", "8"])] == [True, False]


def test_the_group_form_is_known_by_its_name_and_a_service_takes_groups() -> None:
    names = ("responses_first", "method", "rank", "matches", "swapped")
    assert [is_group_function(function(name)) for name in names] == [True, True, True, False, False]
    assert is_group_function("http://127.0.0.1:9/")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("other_names", "(response, answer)"),
        ("pred_gold", "(pred, gold)"),
        ("three", "(prompt, response, ground_truth)"),
        ("anything", "(*args, **kwargs)"),
        ("not_enough", "()"),
    ],
)
def test_another_form_is_refused_with_what_was_found_and_the_three(name: str, found: str) -> None:
    for use in (load, is_group_function):
        with pytest.raises(ValueError, match="one sample, \\(prompt, responses\\) for a group") as refusal:
            use(function(name))
        assert f"takes {found}; expected parameters by these names" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "library", "call"),
    [
        ("verl", "verl", "verl(prompt.source, response, prompt.ground_truth)"),
        ("openrlhf", "OpenRLHF", "openrlhf([prompt.problem + response], [prompt.problem], [prompt.ground_truth])[0]"),
        ("trl", "TRL", "trl(completions=responses, ground_truth=[prompt.ground_truth] * len(responses))"),
    ],
)
def test_the_wrapper_that_a_refusal_gives_for_another_library_works(name: str, library: str, call: str) -> None:
    import reward_functions

    with pytest.raises(ValueError, match=f"looks like {library}'s form") as refusal:
        load(function(name))
    wrapper = str(refusal.value).partition("wrap it: ")[2]
    assert wrapper.endswith(call)
    space = vars(reward_functions) | {}
    exec(wrapper, space)
    given = "7" if "prompt, response)" in wrapper else ["7"]
    assert space["reward"](PROMPT, given) in (1.0, [1.0])


def test_a_builtin_without_a_signature_is_refused() -> None:
    with pytest.raises(ValueError, match="has no signature to read"):
        load("builtins:max")


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"correct": "no"}, "correct='no' must be True or False"),
        ({"correct": None}, "correct=None must be True or False"),
        ({"correct": 1}, "correct=1 must be"),
        ({"correct": True, "score": math.nan}, "score=nan must be a finite number within 1e"),
        ({"correct": True, "score": -math.inf}, "score=-inf"),
        ({"correct": True, "score": 1e39}, r"score=1e\+39"),
        ({"correct": True, "score": 10**400}, "score=an integer of 401 digits"),
        ({"correct": True, "score": "1"}, "score='1' must be a finite number"),
        ({"correct": True, "score": True}, "score=True"),
        ({"correct": True, "score": 1j}, "score=1j"),
        ({"correct": True, "score": [1.0]}, r"score=\[1.0\]"),
        ({"correct": True, "extracted": b"x"}, "extracted=b'x' must be a text or None"),
        ({"correct": True, "extracted": 7}, "extracted=7"),
        ({"correct": True, "error": KeyError("k")}, "error=KeyError.* must be a text or None"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_verdict(**fields)
    with pytest.raises(ValueError, match=message):
        to_verdict(Verdict(**fields))


def test_what_can_be_is_kept_as_plain_values() -> None:
    made = make_verdict(True, "7", "", -MAX_SCORE)
    assert made == Verdict(True, "7", None, -MAX_SCORE)
    numbers = [to_verdict(value) for value in (True, 0, 0.25)]
    assert numbers == [Verdict(True), Verdict(False, score=0.0), Verdict(True, score=0.25)]


def test_numpy_scalars_are_numbers_and_bools() -> None:
    names = ["bool", "int", "float", "array", "verdict"]
    found = load(function("numpy_scalars"))(PROMPT, names)
    assert found == [
        Verdict(True),
        Verdict(True, score=3.0),
        Verdict(True, score=0.5),
        Verdict(True, score=2.0),
        Verdict(False, score=0.25),
    ]
    json.dumps([[v.correct, v.score] for v in found])  # plain ones: a worker sends them as JSON
    (several,) = load(function("numpy_scalars"))(PROMPT, ["two"])
    assert several.error is not None


def test_partial_credit_counts_as_right_above_the_threshold_only() -> None:
    texts = ["0", "0.2", "0.5", "0.9"]
    assert [v.correct for v in load(function("share"))(PROMPT, texts)] == [False, True, True, True]
    strict = load(function("share"), correct_above=0.5)(PROMPT, texts)
    assert [(v.correct, v.score) for v in strict] == [(False, 0.0), (False, 0.2), (False, 0.5), (True, 0.9)]


def test_a_sum_of_terms_beyond_the_bound_is_an_error_and_no_infinite_score() -> None:
    summed = with_terms(load(function("matches")), [("big", 1e300, load(function("share")))], 1.0, -1.0)
    (verdict,) = summed(PROMPT, ["7"])
    assert "reward.extra: the sum of all terms: score=7e+300 must be" in str(verdict.error)


# ---------------------------------------------------------------- a service


class Service(BaseHTTPRequestHandler):
    """Answers with `replies` in turn: bytes as they are on the wire, or what a verdict list of one holds."""

    replies: list[Any] = []  # noqa: RUF012
    calls = 0

    def do_POST(self) -> None:
        type(self).calls += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        reply = self.replies.pop(0)
        if not isinstance(reply, bytes):
            body = json.dumps({"verdicts": [reply]}).encode()
            reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        self.wfile.write(reply)
        self.close_connection = True

    def do_GET(self) -> None:
        raise AssertionError("a redirected POST came as a GET")

    def log_message(self, *args: object) -> None: ...


GOOD = {"correct": True, "score": 2, "extracted": None, "error": None}


@pytest.fixture
def ask() -> Iterator[Callable[..., Verdict]]:
    """`ask(reply, …)`: what the client makes of these replies of a service, one after another."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*replies: Any, timeout: float = 20.0) -> Verdict:
        Service.replies, Service.calls = list(replies), 0
        (verdict,) = RemoteReward(f"http://127.0.0.1:{server.server_port}/score", timeout=timeout)(PROMPT, ["7"])
        return verdict

    yield ask
    server.shutdown()
    server.server_close()


def reply(status: str, body: bytes = b"", *headers: bytes) -> bytes:
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), b"Content-Length: %d" % len(body), *headers, b"", body])


@pytest.mark.parametrize(
    "cut",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"verdicts": [{"cor',
        b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"verdicts": [{"cor',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"ver\r\n",
        b"HTTP/1.1 2",
        b"",
    ],
)  # fmt: skip
def test_a_reply_cut_off_is_asked_for_again(cut: bytes, ask: Callable[..., Verdict]) -> None:
    assert ask(cut, reply("503 Busy"), GOOD) == Verdict(True, score=2.0)
    assert Service.calls == 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply("302 Found", b"", b"Location: http://127.0.0.1:9/elsewhere"), "redirects to 'http://127.0.0.1:9/elsewhere'"),
        (reply("307 Temporary Redirect", b"", b"Location: /other"), "redirects to '/other'; name the service's own"),
        (reply("400 Bad Request", b"no \x1b[31mfield"), r"HTTP 400 Bad Request: no \x1b[31mfield"),
        (reply("200 OK", b"[" * 200_000), "RecursionError"),
        (reply("200 OK", b"<html>"), "JSONDecodeError"),
        (reply("200 OK", b'{"verdicts": []}'), "expected {'verdicts': [1 objects]}"),
        ({"correct": 1}, "correct=1 must be True or False"),
        ({"score": 1.0}, "expected an object with a bool `correct`"),
        ({"correct": True, "score": 10**400}, "score=an integer of 401 digits must be"),
        ({"correct": True, "score": 1e39}, "score=1e+39 must be"),
        ({"correct": True, "score": math.nan}, "score=nan must be"),
        ({"correct": True, "score": "1"}, "score='1' must be"),
        ({"correct": True, "extracted": 7}, "extracted=7 must be a text"),
    ],
)  # fmt: skip
def test_a_reply_that_cannot_be_used_is_an_error_at_once(answer: Any, words: str, ask: Callable[..., Verdict]) -> None:
    verdict = ask(answer)
    assert verdict.error is not None
    assert verdict.error.startswith("remote: http://127.0.0.1:")
    assert words in verdict.error
    assert Service.calls == 1


def test_the_last_failure_is_what_is_reported_when_time_is_up(ask: Callable[..., Verdict]) -> None:
    verdict = ask(*[reply("500 Down", b"out of order")] * 9, timeout=1.0)
    assert "HTTP 500 Down: out of order" in str(verdict.error)


def test_a_service_that_accepts_and_says_nothing_is_an_error_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (verdict,) = RemoteReward(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=0.5)(PROMPT, ["7"])
    assert "no answer within 0.45 s" in str(verdict.error)


@pytest.mark.parametrize(
    "address",
    ["http://", "https:///path", "http://host name/", "https://host/x y", "http://host:99999/", "http://host:port/",
     "http://[::1/", "http://host/\n"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_at_the_start(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected http\(s\)://host"):
        load(address)


def test_a_service_on_this_machine_is_asked_without_the_proxy_and_another_error_names_it(
    ask: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert ask(GOOD).correct
    (verdict,) = RemoteReward("http://judge.example:8000/score", timeout=0.5)(PROMPT, ["7"])
    assert "through the proxy 127.0.0.1:9 of the environment" in str(verdict.error)
    assert "secret" not in str(verdict.error)


def test_an_error_never_shows_the_password_in_an_address() -> None:
    (verdict,) = RemoteReward("http://me:secret@127.0.0.1:9/", timeout=0.5)(PROMPT, ["7"])
    assert "secret" not in str(verdict.error)
