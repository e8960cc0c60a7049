"""The tutorials, followed literally, on what is installed here."""

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.docs.reader import BASH, Reader
from tests.docs.test_docs import CHECKOUT

# Nothing may come from the network: what is installed must be enough.
OFFLINE = {"PIP_NO_INDEX": "1"}


@pytest.fixture
def reader(tmp_path):
    """Return somebody with an empty folder and a shell."""
    if BASH is None or shutil.which("curl") is None:
        pytest.skip("the pages' commands are for bash and curl")
    with ExitStack() as stack:
        yield Reader(tmp_path, stack, Path(sys.executable).parent, OFFLINE)


@pytest.mark.drivers("sqlite")
def test_the_first_unit(driver, reader):
    """The page's blocks, pasted into its prompt, raise nothing, and the log tells of the retry."""
    reader.follow(CHECKOUT / "docs/tutorials/first-unit.md")
    reader.check()
    assert reader.promised == [
        "INFO:sqla_uow:safe_transfer(): attempt 1 of 6 failed (conflict SQLITE_BUSY); again in 4.1 ms"
    ]
    assert "Status.COMMITTED" in reader.output


@pytest.mark.drivers("sqlite")
def test_the_web_service_and_its_tests(driver, reader):
    """The pages' files make a service that answers as they say, and tests that pass."""
    reader.follow(CHECKOUT / "docs/tutorials/web.md")
    reader.check()
    reader.follow(CHECKOUT / "docs/tutorials/testing.md")
    reader.check()
    reader.stack.close()
    assert reader.output.count("\n30 moved from 1 to 2\n") == 1
