"""Clients of applications that the tests build."""

from __future__ import annotations

import httpx


def client_of(app, *, raise_app_exceptions=False):
    """Return a client that calls the application without a server between them."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=raise_app_exceptions)
    return httpx.AsyncClient(transport=transport, base_url="http://test")
