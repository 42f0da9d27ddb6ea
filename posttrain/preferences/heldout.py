"""A held-out split by hash, which needs no list of what is on which side."""

from __future__ import annotations

import hashlib


def in_share(key: str, share: float) -> bool:
    """Whether `key` belongs to a share in [0, 1] of all keys: always the same answer, on every machine."""
    # The first 8 bytes are uniform over [0, 2^64), so a share of 1 takes every key and 0 none.
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
