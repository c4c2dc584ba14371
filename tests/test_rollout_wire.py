"""Frames: what is encoded is read back, in whatever pieces it arrives; whatever is damaged is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dapo.rollout import wire

MAX_TOKENS = 5000


def stream(lengths: list[int], seed: int = 0) -> bytes:
    """One sample in frames of the given numbers of tokens, the last one final."""
    generator = np.random.default_rng(seed)
    out, first = b"", 0
    for number, count in enumerate(lengths):
        ids = generator.integers(0, 151936, count)
        logprobs = -generator.random(count, np.float32)
        if number + 1 < len(lengths):
            out += wire.encode(wire.TOKENS, number, first, ids.tolist(), logprobs.tolist())
        else:
            out += wire.encode_final(
                number, first, ids.tolist(), logprobs.tolist(), finish_reason="stop", versions=[[3, 0, first + count]]
            )
        first += count
    return out


def read(pieces: list[bytes]) -> list[wire.Frame]:
    reader = wire.FrameReader(MAX_TOKENS, max_route_bytes=1000)
    frames = [frame for piece in pieces for frame in reader.feed(piece)]
    reader.close()
    return frames


@given(st.lists(st.integers(1, 1024), max_size=3), st.integers(0, 1024), st.integers(1, 5000), st.integers(0, 2**16))
def test_what_is_encoded_is_read_back_bit_for_bit_in_pieces_of_any_size(
    before: list[int], last: int, size: int, seed: int
) -> None:
    lengths = [*before, last]  # the last frame alone may bring no token
    data = stream(lengths, seed)
    frames = read([data[i : i + size] for i in range(0, len(data), size)])
    again = b"".join(
        wire.encode(f.kind, f.number, f.first, f.token_ids.tolist(), f.logprobs.tolist(), f.extra) for f in frames
    )
    assert again == data
    assert [len(f.token_ids) for f in frames] == lengths
    total, said = sum(lengths), frames[-1].final
    assert said == {"finish_reason": "stop", "versions": [[3, 0, total]], "total": total, "routes": None}


def test_an_answer_of_a_thousand_tokens_takes_less_than_nine_bytes_a_token() -> None:
    assert len(stream([1024, 1])) / 1025 < 8.2
    assert len(stream([1001])) / 1001 < 8.2


def test_arrays_are_of_the_wire_s_types_and_cannot_be_written_to() -> None:
    (frame,) = read([stream([7])])
    assert frame.token_ids.dtype == np.int32
    assert frame.logprobs.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        frame.token_ids[0] = 1


@pytest.mark.parametrize("has_routes", [False, True])
def test_every_damaged_byte_of_a_stream_is_noticed(has_routes: bool) -> None:
    data = routed_stream(np.arange(24, dtype=np.uint8).reshape(3, 4, 2), 4) if has_routes else stream([9, 3, 5])
    for position in range(len(data)):
        for flipped in {1 << random.Random(position).randrange(8), 0xFF}:
            damaged = bytearray(data)
            damaged[position] ^= flipped
            with pytest.raises(wire.WireError):
                read([bytes(damaged)])


@settings(max_examples=200)
@given(st.data())
def test_a_stream_that_is_cut_doubled_or_shuffled_is_refused(data: st.DataObject) -> None:
    whole = stream([4, 4, 4])
    a, b, c = (len(wire.encode(wire.TOKENS, 0, 0, [1] * 4, [0.0] * 4)) * i for i in (0, 1, 2))
    frames = [whole[a:b], whole[b:c], whole[c:]]
    order = data.draw(st.lists(st.sampled_from(range(3)), max_size=5).filter(lambda o: o != [0, 1, 2]))
    with pytest.raises(wire.WireError):
        read([frames[i] for i in order])
    with pytest.raises(wire.WireError):
        read([whole[: data.draw(st.integers(0, len(whole) - 1))]])


@given(st.binary(max_size=200))
def test_bytes_of_somebody_else_are_no_answer(garbage: bytes) -> None:
    with pytest.raises(wire.WireError):
        read([garbage])


def test_a_stream_that_goes_on_for_ever_is_refused_before_it_is_stored() -> None:
    reader = wire.FrameReader(max_tokens=2000)
    ids, logprobs = [1] * 1024, [0.0] * 1024
    assert list(reader.feed(wire.encode(wire.TOKENS, 0, 0, ids, logprobs)))
    header = wire.encode(wire.TOKENS, 1, 1024, ids, logprobs)[:32]
    with pytest.raises(wire.WireError, match="2048 tokens"):
        list(reader.feed(header))


def routed_stream(routes: np.ndarray, tokens: int) -> bytes:
    """`tokens` tokens in one frame, then the routes, then the end."""
    out, number = wire.encode(wire.TOKENS, 0, 0, [7] * tokens, [-1.0] * tokens), 1
    for frame in wire.encode_routes(1, tokens, routes):
        out, number = out + frame, number + 1
    return out + wire.encode_final(
        number, tokens, [], [], finish_reason="length", versions=[[0, 0, tokens]], routes=routes
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("rows", [0, 3, 5000])
def test_routes_are_read_back_whatever_their_size(dtype: type, rows: int) -> None:
    """5,000 rows of 60 layers with 8 experts are more than two frames hold."""
    routes: np.ndarray = np.random.default_rng(rows).integers(0, np.iinfo(dtype).max, (rows, 60, 8)).astype(dtype)
    data = routed_stream(routes, 4)
    for size in (len(data), 70_001):
        reader = wire.FrameReader(MAX_TOKENS, routes.nbytes)
        frames = [frame for at in range(0, len(data), size) for frame in reader.feed(data[at : at + size])]
        reader.close()
        raw = b"".join(frame.extra for frame in frames if frame.kind == wire.ROUTES)
        read_back = wire.routes_of(raw, frames[-1].final["routes"])
        assert read_back is not None
        assert (read_back.dtype, read_back.shape) == (routes.dtype, routes.shape)
        assert np.array_equal(read_back, routes)


def test_more_bytes_of_routes_than_can_be_are_refused_before_they_are_stored() -> None:
    routes = np.zeros((100, 2, 8), np.uint8)
    reader = wire.FrameReader(MAX_TOKENS, routes.nbytes - 1)
    with pytest.raises(wire.WireError, match="up to 1599 bytes of routes in all"):
        list(reader.feed(routed_stream(routes, 4)))
    with pytest.raises(wire.WireError, match="up to 0 bytes"):
        list(wire.FrameReader(MAX_TOKENS).feed(routed_stream(routes, 4)))


def test_routes_that_are_not_what_the_end_says_are_refused() -> None:
    for said in ([3, 2, 8, "uint8"], [2, 2, 8, "object"], [2, 2, 8], 5):
        with pytest.raises((ValueError, TypeError)):
            wire.routes_of(bytes(2 * 2 * 8), said)  # type: ignore[arg-type]


def test_a_server_s_failure_arrives_with_its_reason() -> None:
    first = wire.encode(wire.TOKENS, 0, 0, [5, 6], [-0.5, -0.25])
    frames = read([first + wire.encode_failed(1, 2, "EngineCore died")])
    assert [f.kind for f in frames] == [wire.TOKENS, wire.FAILED]
    assert frames[-1].extra == b"EngineCore died"


def test_unequal_numbers_of_ids_and_log_probabilities_are_not_sent() -> None:
    with pytest.raises(ValueError, match="expected one each"):
        wire.encode(wire.TOKENS, 0, 0, [1, 2], [0.0])
