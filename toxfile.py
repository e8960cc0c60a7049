"""Let tox find the interpreters that pyenv has installed but not activated.

tox looks at PATH, and there at pyenv's shims, which answer only for the versions that a `pyenv global`, `local` or
`shell` names. Every other installed version would be reported as missing, and its environments be skipped. On a
machine without pyenv this file does nothing. Loaded by tox from the folder of tox.ini.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tox.plugin import impl

if TYPE_CHECKING:
    from tox.config.cli.parser import ToxParser


@impl
def tox_add_option(parser: ToxParser) -> None:  # noqa: ARG001  # tox's signature
    """Append pyenv's versions to PATH, newest first, behind everything that is there already.

    The hook is the first one that tox calls, before it looks for an interpreter. CPython releases only: a version is
    the name of its folder, and `3.13.0rc1`, `pypy3.11-7.3` or a virtualenv of pyenv's is nobody's `python3.13`.
    """
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    releases = [path for path in versions.glob("*/bin") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)]
    releases.sort(key=lambda path: [int(part) for part in path.parent.name.split(".")], reverse=True)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, releases)])
