"""How a server shows that it is ours without the key on the wire; read by both ends, the standard library alone."""

from __future__ import annotations

import hashlib
import hmac

NONCE_PARAMETER = "nonce"  # of GET /health


def proof(key: str, nonce: str, port: int) -> bytes:
    """What only a holder of `key` can answer to `nonce`, in hexadecimal digits.

    The port it listens on is in it: another server of the run, which has the same key, cannot answer for this one.
    """
    return hmac.new(key.encode(), f"{port} {nonce}".encode(), hashlib.sha256).hexdigest().encode()
