"""What is written for people who work on sqla-uow names what is there."""

import configparser
import re
import tomllib
from pathlib import Path

import pytest

from tests.docs.test_docs import headings

CHECKOUT = Path(__file__).parents[2]
TESTS = CHECKOUT / "tests"
GUIDES = [
    CHECKOUT / "CONTRIBUTING.md",
    CHECKOUT / "SECURITY.md",
    TESTS / "README.md",
    CHECKOUT / "changelog.d/README.md",
]
VARIABLE = re.compile(r"\bSQLA_UOW_[A-Z_]+")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
ENVIRONMENT = re.compile(r"tox -e ([\w-]+)")
FACTORS = re.compile(r"py31[123]-(sqlite|asyncpg|psycopg|asyncmy|aiomysql)-sa2[01](-cov)?")


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(CHECKOUT)))
def test_links_of_the_guides_lead_somewhere(driver, guide):
    """A link has a target in the checkout, and so has its heading."""
    for target, heading in LINK.findall(guide.read_text()):
        other = (guide.parent / target).resolve() if target else guide
        assert other.is_file(), f"{guide.name} links to {target}"
        assert not heading or heading in headings(other), f"{guide.name} links to {target}#{heading}"


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(CHECKOUT)))
def test_environments_of_the_guides_exist(driver, guide):
    """What a guide tells to type is in tox.ini, or made of its factors."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(CHECKOUT / "tox.ini")
    named = {name for name in ENVIRONMENT.findall(guide.read_text()) if FACTORS.fullmatch(name) is None}
    assert {name for name in named if f"testenv:{name}" not in tox} == set()


@pytest.mark.drivers("sqlite")
def test_the_readme_lists_every_variable(driver):
    """What the tests and tox read from the environment is explained, and nothing else is."""
    sources = [*TESTS.rglob("*.py"), CHECKOUT / "tox.ini"]
    read = {name for path in sources for name in VARIABLE.findall(path.read_text()) if not name.endswith("_")}
    assert read == set(VARIABLE.findall((TESTS / "README.md").read_text()))


@pytest.mark.drivers("sqlite")
def test_the_readme_lists_every_folder_and_test_beside_them(driver):
    """A new folder of tests says what it is for, and which server it needs."""
    text = (TESTS / "README.md").read_text()
    folders = {f"`{path.name}/`" for path in TESTS.iterdir() if any(path.glob("*.py"))}
    files = {f"`{path.name}`" for path in TESTS.glob("*.py")} - {"`conftest.py`"}
    assert {name for name in folders | files if name not in text} == set()


@pytest.mark.drivers("sqlite")
def test_the_stair_is_the_one_that_is_checked(driver):
    """Each wing is on the stair of CONTRIBUTING.md, on the step that import-linter holds it to."""
    wings = {path.name for path in (CHECKOUT / "sqla_uow").glob("_[a-z]*") if any(path.glob("*.py"))}
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["id"] == "layers")
    table = (CHECKOUT / "CONTRIBUTING.md").read_text().partition("## The stair")[2].partition("## What goes where")[0]
    steps = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    checked, told = ([set(re.findall(r"\w+", step)) & wings for step in these] for these in (layers, steps))
    assert list(filter(None, checked)) == list(filter(None, told))
    assert wings == set().union(*told)
