"""Generated requests: what the OpenAPI document allows, and much that it does not.

A few hundred by default, on SQLite; with ``SQLA_UOW_LONG``, as tox -e long sets it, 10,000 on every selected driver.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import sys

import pytest

from tests.kit.databases import DRIVERS

CASES = 10_000 if os.environ.get("SQLA_UOW_LONG") else 0
OPERATIONS = 7  # that have something to generate
A_FEW = 5  # for each operation, beside about 300 that cover the document whatever the number
# Not "missing_required_header": it knows 400 to 422 for one, and 428 (RFC 6585) is made for a missing If-Match.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method", "allow_header_conformance",
)  # fmt: skip

pytestmark = [
    pytest.mark.drivers(*(DRIVERS if CASES else ("sqlite",))),
    pytest.mark.timeout(max(60, CASES // 4)),
    pytest.mark.skipif(
        importlib.util.find_spec("schemathesis") is None, reason="schemathesis is missing; pip install schemathesis"
    ),
]


async def test_generated_requests_find_no_fault(bank, db, tmp_path):
    """Hostile input: each answer is one that the document names, no 500, nothing hangs, and nothing is left."""
    options = (
        "--no-color", "run", f"{bank.address}/openapi.json", "--checks", ",".join(CHECKS), "--continue-on-failure",
        "--max-examples", str(max(A_FEW, CASES // OPERATIONS)), "--phases", "examples,coverage,fuzzing",
        "--request-timeout", "10", "--generation-database", "none",
    )  # fmt: skip
    code = "from schemathesis.cli import schemathesis; schemathesis()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *options, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )  # fmt: skip
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output
    (made,) = re.findall(r"(\d+) generated", output)
    assert int(made) >= max(200, CASES)
    assert await bank.broken_rules() == ([], 0)
    assert {state for _, state in await db.sessions()} <= {"idle", "active"}  # active: the one that asks, elsewhere
