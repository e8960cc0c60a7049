"""A project with migrations: an async env.py as the guide shows it, and the `alembic` command, here or in processes of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from io import StringIO
from pathlib import Path
from typing import Any

from alembic.config import Config

import sqla_uow
from alembic import command

ENV = """
import ast
import asyncio
import runpy
from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine
from sqla_uow.alembic import install, run_migrations

install()
url = context.config.get_main_option("url")
metadata = runpy.run_path(context.config.get_main_option("models"))["Base"].metadata
batch = context.config.get_main_option("batch") == "yes"
options = ast.literal_eval(context.config.get_main_option("options"))


async def main():
    engine = create_async_engine(url)
    try:
        await run_migrations(engine, timeout=30, target_metadata=metadata, render_as_batch=batch, **options)
    finally:
        await engine.dispose()


if context.is_offline_mode():
    context.configure(url=url, target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(main())
"""

MODELS = """
import datetime, uuid
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqla_uow.mixins import Versioned, VersionedByTimestamp, VersionedByUUID


class Base(DeclarativeBase):
    pass


class A({a}Base):
    __tablename__ = "a"
    id: Mapped[int] = mapped_column(primary_key=True)


class B({b}Base):
    __tablename__ = "b"
    id: Mapped[int] = mapped_column(primary_key=True)


class C({c}Base):
    __tablename__ = "c"
    id: Mapped[int] = mapped_column(primary_key=True)


class D({d}Base):
    __tablename__ = "d"
    id: Mapped[int] = mapped_column(primary_key=True)
    {lines}
"""

MAKO = """\"\"\"${message}\"\"\"
from alembic import op
import sqlalchemy as sa
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
"""

PLAIN = {"a": "", "b": "", "c": "", "d": "", "lines": ""}
VERSIONED = {
    "a": "Versioned, ",
    "b": "VersionedByUUID, ",
    "c": "VersionedByTimestamp, ",
    "d": "Versioned, ",
    "lines": 'version: Mapped[int] = mapped_column("lock_version")',
}


class Project:
    """A folder with models, env.py and versions."""

    def __init__(self, folder: Path, url: str, *, batch: str = "no", **configured: Any) -> None:
        self.folder = folder
        self.versions = folder / "migrations/versions"
        self.versions.mkdir(parents=True)
        self.ini = folder / "alembic.ini"
        options = {
            "script_location": folder / "migrations",
            "url": url,
            "models": folder / "models.py",
            "batch": batch,
            "options": configured,
        }
        lines = [f"{name} = {str(value).replace('%', '%%')}" for name, value in options.items()]
        self.ini.write_text("\n".join(["[alembic]", "path_separator = os", *lines, ""]))
        (folder / "migrations/env.py").write_text(ENV)
        (folder / "migrations/script.py.mako").write_text(MAKO)
        self.models(**PLAIN)

    def models(self, **parts: str) -> None:
        (self.folder / "models.py").write_text(MODELS.format(**parts))

    def revision(self, name: str, after: str | None, upgrade: str, downgrade: str = "pass") -> None:
        lines = [
            "import os, pathlib, time\nfrom alembic import op\nimport sqlalchemy as sa",
            "def until(name):\n    while not pathlib.Path(name).exists():\n        time.sleep(0.01)",
            f"revision = {name!r}\ndown_revision = {after!r}",
            f"def upgrade():\n    {upgrade}",
            f"def downgrade():\n    {downgrade}",
        ]
        (self.versions / f"{name}.py").write_text("\n\n\n".join(lines) + "\n")

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "alembic",
            *arguments,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(Path(sqla_uow.__file__).parents[1])},  # the one that is tested
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def alembic(self, name: str, *arguments: Any, **options: Any) -> str:
        """Run a command to its end, which has to be a good one, and return what it wrote."""
        output = StringIO()
        config = Config(self.ini, stdout=output, output_buffer=output)
        await asyncio.to_thread(getattr(command, name), config, *arguments, **options)
        return output.getvalue()

    def generated(self, message: str) -> str:
        """Return the migration that was generated with a message."""
        (file,) = self.versions.glob(f"*_{message}.py")
        return file.read_text()
