"""Every Python block of the documentation runs, in order, on SQLite."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from sqla_uow import UnitOfWorkManager, errors

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted((CHECKOUT / "docs").rglob("*.md"))
TUTORIAL = CHECKOUT / "docs/tutorials/first-unit.md"
WITH_FILES = [
    CHECKOUT / "docs/tutorials/web.md",
    CHECKOUT / "docs/tutorials/testing.md",
]  # followed by test_tutorials.py
README = CHECKOUT / "README.md"
SETUP = 2
"""How many blocks of the tutorial are the setup that every other page goes on from: model, engine, tables."""
FENCE = re.compile(r"^```python(?P<word>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN_AT_MOST = 4  # each needs a server, or packages, that the tests of pages do not have
POSTGRESQL = '"postgresql+asyncpg://localhost/bank"'  # the README names a server; it has to run without one
README_SETUP = """
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy import Float
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
class Base(DeclarativeBase): pass
class Account(Base):
    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance = mapped_column(Float(asdecimal=True))
notified = []
def notify(*what): notified.append(what)
engine = create_async_engine("sqlite+aiosqlite:///bank.db")
async with engine.begin() as connection:
    await connection.run_sync(Base.metadata.create_all)
    await connection.execute(Account.__table__.insert(), [{"id": 1, "balance": 30}, {"id": 2, "balance": 0}])
"""


class Block(NamedTuple):
    """One block of a page, and the line it begins in."""

    page: Path
    line: int
    word: str
    code: str


def blocks(page):
    """Return the Python blocks of a page."""
    text = page.read_text()
    return [Block(page, text.count("\n", 0, m.start()) + 2, m["word"].strip(), m["code"]) for m in FENCE.finditer(text)]


def runs(block):
    """Say whether a block is to be run; one that is not says why."""
    if not block.word:
        return True
    assert re.fullmatch(r"no-run: \w.+", block.word), f"{block.page}:{block.line} is marked {block.word!r}"
    return False


async def run(block, namespace):
    """Run one block; top-level await is allowed."""
    tree = compile(
        "\n" * (block.line - 1) + block.code,
        str(block.page),
        "exec",
        ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        dont_inherit=True,
    )
    result = eval(tree, namespace)  # noqa: S307  # our own pages
    if inspect.isawaitable(result):
        await result


def url_of_tests(block):
    """Put SQLite where the README names a server."""
    return block._replace(code=block.code.replace(POSTGRESQL, '"sqlite+aiosqlite:///bank.db"'))


def program(page):
    """Return the blocks to run for a page: its own, after the setup."""
    own = [url_of_tests(block) for block in blocks(page) if runs(block)]
    if page == README:
        return [Block(README, 1, "", README_SETUP), *own]
    return own if page == TUTORIAL else [*blocks(TUTORIAL)[:SETUP], *own]


def engines(namespace):
    """Return the engines that a page knows by now; a later block may give their names to others."""
    values = namespace.values()
    direct = {value for value in values if isinstance(value, AsyncEngine)}
    return direct | {value.engine for value in values if isinstance(value, UnitOfWorkManager)}


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(
    "page",
    [README, *(page for page in PAGES if page not in WITH_FILES)],
    ids=lambda page: str(page.relative_to(CHECKOUT)),
)
async def test_every_block_runs(driver, page, tmp_path, monkeypatch):
    """What a reader copies from a page works; an `assert` on a page holds."""
    monkeypatch.chdir(tmp_path)
    module, made = ModuleType("page"), set()
    monkeypatch.setitem(sys.modules, "page", module)  # what a page defines can be looked up there, as taskiq does
    namespace = vars(module)
    try:
        for block in program(page):
            await run(block, namespace)
            made |= engines(namespace)
    finally:
        for engine in made | engines(namespace):
            await engine.dispose()
    assert page != README or namespace["notified"] == [(1, 10)]


@pytest.mark.drivers("sqlite")
def test_few_blocks_are_not_run(driver):
    """A block that cannot run says why, and stays an exception."""
    left_out = [block for page in [README, *PAGES] for block in blocks(page) if not runs(block)]
    assert len(left_out) <= NOT_RUN_AT_MOST


@pytest.mark.drivers("sqlite")
def test_links_lead_somewhere(driver):
    """A link from one page to another, or to a file of the checkout, has a target; so has its heading."""
    for page in [README, *PAGES]:
        for target, _, heading in (m.partition("#") for m in re.findall(r"\]\(([^)\s]+)\)", page.read_text())):
            if ":" in target:
                continue
            other = (page.parent / target).resolve() if target else page
            assert other.is_file(), f"{page} links to {target}"
            assert not heading or heading in headings(other), f"{page} links to {target}#{heading}"


def headings(page):
    """Return the anchors that GitHub and MyST make of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.drivers("sqlite")
def test_the_map_names_every_page(driver):
    """No page is left out of docs/index.md."""
    index = CHECKOUT / "docs/index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", index.read_text())}
    assert linked >= {page.resolve() for page in PAGES if page != index}


@pytest.mark.drivers("sqlite")
def test_the_reference_names_every_error(driver):
    """docs/reference/errors.md has a heading for each error, in the order of the tree."""
    page = (CHECKOUT / "docs/reference/errors.md").read_text()
    assert re.findall(r"^## `(\w+)`$", page, re.MULTILINE) == re.findall(r"─ (\w+)", errors.__doc__)
