"""What crosses from a vLLM server to the trainer: one sample as a stream of binary frames, eight bytes a token.

Both ends read this file; it needs numpy alone. A frame, little-endian:

    magic 4s | kind u8 | pad 3x | number u32 | first u32 | count u32 | extra u32 | body crc32 u32 | header crc32 u32
    ids int32[count] | log-probabilities float32[count] | extra bytes

`number` counts the frames of a stream from 0; `first` is how many tokens of the sample came before; `extra` is the size of
what follows the arrays. TOKENS carries tokens alone, ROUTES bytes of the routed experts alone, where they were asked for.
FINAL is the last frame and carries, beside the last tokens, JSON: `{"finish_reason", "versions": [[version, start, end],
...], "total", "routes"}`, the last of which is null or shape and dtype of what ROUTES brought: [rows, layers, K, dtype].
FAILED is the last frame of a stream that the server could not finish, with the reason as text.

The header has a checksum apart from the body's: a damaged length must be noticed before it is waited for. CRC-32 finds
every change within 32 adjacent bits, so every damaged byte.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUTE = "/nemo_dapo/v1/generate"
MEDIA_TYPE = "application/x-nemo-dapo-frames"
TOKENS_PER_FRAME = 1024  # at most; so often is progress seen, and so much is lost with a server that dies
TOKENS, FINAL, FAILED, ROUTES = 1, 2, 3, 4

_MAGIC = b"NDF1"
_LAYOUT = struct.Struct("<4sB3xIIIIII")  # of _Header; the last field is the checksum of the ones before
_BEFORE_CHECKSUM = _LAYOUT.size - 4
_BYTES_PER_TOKEN = 8
_MAX_EXTRA = 1 << 20

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]
Routes = NDArray[np.integer]  # [rows, L, K] uint8 or uint16


class WireError(ValueError):
    """Bytes that no server of ours sends: damaged, cut off, or not frames at all."""


@dataclass(frozen=True)
class Frame:
    """`token_ids` [count] int32 and `logprobs` [count] float32 (nats) from token `first` of the sample on; read-only."""

    kind: int
    number: int
    first: int
    token_ids: Ids
    logprobs: Logprobs
    extra: bytes = b""

    @property
    def final(self) -> Any:
        """The JSON of a FINAL frame; raises WireError where it is none."""
        try:
            return json.loads(self.extra)
        except ValueError as error:
            raise WireError(f"the last frame ends with {self.extra[:80]!r}, expected JSON") from error


class _Header(NamedTuple):
    magic: bytes
    kind: int
    number: int
    first: int
    tokens: int
    extra: int
    body_crc: int
    header_crc: int

    @property
    def body_size(self) -> int:
        return self.tokens * _BYTES_PER_TOKEN + self.extra


def encode(
    kind: int, number: int, first: int, token_ids: Sequence[int], logprobs: Sequence[float], extra: bytes = b""
) -> bytes:
    """One frame as bytes."""
    ids, values = np.asarray(token_ids, "<i4"), np.asarray(logprobs, "<f4")
    if ids.shape != values.shape or ids.ndim != 1:
        raise ValueError(f"{ids.shape} token ids and {values.shape} log-probabilities; expected one each")
    body = ids.tobytes() + values.tobytes() + extra
    return _header(kind, number, first, len(ids), len(extra), zlib.crc32(body)) + body


def _header(kind: int, number: int, first: int, count: int, extra: int, crc: int) -> bytes:
    fields = _LAYOUT.pack(_MAGIC, kind, number, first, count, extra, crc, 0)[:_BEFORE_CHECKSUM]
    return fields + struct.pack("<I", zlib.crc32(fields))


def encode_final(
    number: int,
    first: int,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    finish_reason: str,
    versions: Sequence[Sequence[int]],
    routes: Routes | None = None,
) -> bytes:
    """The last frame of a sample; `versions` are spans (version, start, end) of its response tokens."""
    said = {
        "finish_reason": finish_reason,
        "versions": [list(v) for v in versions],
        "total": first + len(token_ids),
        "routes": None if routes is None else [*routes.shape, routes.dtype.name],
    }
    return encode(FINAL, number, first, token_ids, logprobs, json.dumps(said).encode())


def encode_routes(number: int, first: int, routes: Routes) -> Iterator[bytes]:
    """The frames, `number` and following, of the experts that tokens went to: [rows, L, K] uint8 or uint16."""
    raw = routes.astype(routes.dtype.newbyteorder("<"), copy=False).tobytes()
    for start in range(0, len(raw), _MAX_EXTRA):
        yield encode(ROUTES, number, first, [], [], raw[start : start + _MAX_EXTRA])
        number += 1


def routes_of(raw: bytes | bytearray, said: Sequence[Any] | None) -> Routes | None:
    """From what ROUTES frames brought, and what FINAL says of it; raises ValueError or TypeError where they disagree."""
    if said is None:
        return None
    rows, layers, top_k, dtype = said
    if dtype not in ("uint8", "uint16"):
        raise ValueError(f"routes in {dtype!r:.40}, expected uint8 or uint16")
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(int(rows), int(layers), int(top_k))


def encode_failed(number: int, first: int, reason: str) -> bytes:
    return encode(FAILED, number, first, [], [], reason.encode("utf-8", "replace")[:_MAX_EXTRA])


class FrameReader:
    """Frames of one stream out of the pieces in which its bytes arrive.

    `max_tokens` and `max_route_bytes` bound the sample: a stream that goes on beyond is refused before it is stored.
    """

    def __init__(self, max_tokens: int, max_route_bytes: int = 0) -> None:
        self.max_tokens, self.max_route_bytes = max_tokens, max_route_bytes
        self._buffer = bytearray()  # of a frame that has not come wholly
        self._wanted = 0  # bytes in the buffer until it is worth another look
        self._numbers = 0
        self._tokens = self._route_bytes = 0
        self.ended = False

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """The frames that `piece` completes. Raises WireError at the first byte that cannot be right.

        A piece that begins where a frame does, as nearly all do, is read where it lies: the arrays keep it alive.
        """
        if self._buffer:
            self._buffer += piece
            if len(self._buffer) < self._wanted:
                return
            piece = bytes(self._buffer)
            self._buffer.clear()
        at = 0
        while len(piece) - at >= _LAYOUT.size:
            header = self._read_header(piece[at : at + _LAYOUT.size])
            end = at + _LAYOUT.size + header.body_size
            if len(piece) < end:
                break
            yield self._read_body(header, piece, at + _LAYOUT.size)
            at = end
        else:
            end = at + _LAYOUT.size
        self._buffer += memoryview(piece)[at:]
        self._wanted = end - at

    def close(self) -> None:
        """The stream has ended; raises WireError when it did so in the middle."""
        if self._buffer or not self.ended:
            rest = bytes(self._buffer[:40])
            raise WireError(f"the stream ended after {self._tokens} tokens, in the middle of an answer; left: {rest!r}")

    def _read_header(self, raw: bytes) -> _Header:
        header = _Header(*_LAYOUT.unpack(raw))
        if self.ended:
            raise WireError(f"bytes after the last frame: {raw[:16]!r}")
        if header.magic != _MAGIC or zlib.crc32(raw[:_BEFORE_CHECKSUM]) != header.header_crc:
            raise WireError(f"frame {self._numbers}: damaged header {raw[:16]!r}")
        if header.kind not in (TOKENS, FINAL, FAILED, ROUTES):
            raise WireError(f"frame {header.number}: unknown kind {header.kind}")
        if header.kind in (TOKENS, ROUTES) and not self._is_alone(header):  # else it could go on for ever
            raise WireError(
                f"frame {header.number}, kind {header.kind}: {header.tokens} tokens and {header.extra} more bytes; "
                f"expected tokens alone, or up to {self.max_route_bytes} bytes of routes in all"
            )
        if (header.number, header.first) != (self._numbers, self._tokens):
            raise WireError(
                f"frame {header.number} from token {header.first} on; expected frame {self._numbers} from token "
                f"{self._tokens} on"
            )
        if header.first + header.tokens > self.max_tokens or header.extra > _MAX_EXTRA:
            raise WireError(
                f"{header.first + header.tokens} tokens and {header.extra} more bytes; expected at most {self.max_tokens} "
                f"tokens and {_MAX_EXTRA} bytes"
            )
        return header

    def _is_alone(self, header: _Header) -> bool:
        """Whether a frame before the last one carries what its kind says, and that is not too much."""
        if header.kind == TOKENS:
            return bool(header.tokens) and not header.extra
        return not header.tokens and 0 < header.extra <= self.max_route_bytes - self._route_bytes

    def _read_body(self, header: _Header, data: bytes, start: int) -> Frame:
        end = start + header.body_size
        if zlib.crc32(memoryview(data)[start:end]) != header.body_crc:
            raise WireError(f"frame {header.number}: the checksum of {header.body_size} bytes does not match")
        self._numbers += 1
        self._tokens += header.tokens
        self._route_bytes += header.extra if header.kind == ROUTES else 0
        self.ended = header.kind in (FINAL, FAILED)
        ids = np.frombuffer(data, "<i4", header.tokens, start)
        logprobs = np.frombuffer(data, "<f4", header.tokens, start + 4 * header.tokens)
        return Frame(header.kind, header.number, header.first, ids, logprobs, data[end - header.extra : end])
