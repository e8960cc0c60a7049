"""What the tests of the servers begin with."""

import tempfile
from pathlib import Path

import pytest

from tests.kit.waiting import eventually


@pytest.fixture
def ground():
    """Give a folder for temporary files that a server's account can enter, and find it empty afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        assert eventually(lambda: not list(Path(folder).iterdir())), list(Path(folder).iterdir())
