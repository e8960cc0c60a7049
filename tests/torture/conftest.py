"""Torture takes minutes, so it has an environment of its own: tox -e torture."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("SQLA_UOW_TORTURE") else ["test_torture.py"]
