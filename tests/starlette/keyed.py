"""Who sends a request, and with which key."""

from __future__ import annotations


def caller(scope):
    """Say who sends a request: what its header Authorization says."""
    return dict(scope["headers"]).get(b"authorization", b"nobody").decode()


def key(value, **more):
    """Return the headers of a request with a key."""
    return {"Idempotency-Key": value, **more}
