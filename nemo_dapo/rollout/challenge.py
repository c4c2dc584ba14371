"""How a server shows that it is ours without the key on the wire; read by both ends, the standard library alone."""

from __future__ import annotations

import hashlib
import hmac

NONCE_PARAMETER = "nonce"  # of GET /health


def proof(key: str, nonce: str) -> bytes:
    """What only a holder of `key` can answer to `nonce`, in hexadecimal digits."""
    return hmac.new(key.encode(), nonce.encode(), hashlib.sha256).hexdigest().encode()
