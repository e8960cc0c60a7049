"""What sqla-uow uses of others that is not public is on docs/reference/stability.md, and is there in what is installed."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import sqlalchemy

import sqla_uow
import sqla_uow_starlette

PAGE = Path(__file__).parents[1] / "docs/reference/stability.md"
ROW = re.compile(r"^\| `([\w.]+)`(?: \((2\.\d)\))? \|", re.MULTILINE)
LINE = ".".join(sqlalchemy.__version__.split(".")[:2])
LISTED = dict(ROW.findall(PAGE.read_text()))
OF_PYTHON = {"_asdict", "_getframe", "_make", "_replace"}  # namedtuple's and sys's, in Python's own manual


def sources():
    """Return the syntax trees of both packages."""
    for package in (sqla_uow, sqla_uow_starlette):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            yield path.name, ast.parse(path.read_text())


def defined(tree):
    """Return the names that a module of ours gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            yield from (one.value for one in ast.walk(node) if isinstance(one, ast.Constant))
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            yield str(node.slice.value)  # self.__dict__["_name"] = ...


def used(tree):
    """Return the private names that a module takes from an object, from `super()` or from another package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_base = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            yield node.attr, of_base
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            yield str(node.args[1].value), False
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("sqla_uow"):
            yield from ((alias.name, True) for alias in node.names)


def found(path):
    """Say whether a dotted name leads somewhere; what an instance is given when it is made stands in the source only."""
    module_name, value, names = imported(path)
    for name in names:
        if not hasattr(value, name):
            return any(re.search(rf"\b{name}\b", text) for text in texts(module_name, value))
        value = getattr(value, name)
    return True


def imported(path):
    """Import as much of a dotted name as is a module; return its name, the module, and the rest."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return module.__name__, module, parts[length:]
    return pytest.skip(f"{parts[0]} is not installed")


def texts(module_name, value):
    """Return the source of a module, or of a class and its bases, as far as there is any."""
    for one in getattr(value, "__mro__", (importlib.import_module(module_name),)):
        try:
            yield inspect.getsource(one)
        except (OSError, TypeError):  # compiled
            continue


@pytest.mark.drivers("sqlite")
def test_the_page_lists_every_private_name(driver):
    """A private name of somebody else, new in the source, comes with its reason on the page."""
    trees = list(sources())
    ours = {name for _, tree in trees for name in defined(tree)}
    listed = {path.rpartition(".")[2] for path in LISTED}
    missing = {
        f"{name} in {module}"
        for module, tree in trees
        for name, of_base in used(tree)
        if re.match(r"_(?!_)", name) and (of_base or name not in ours) and name not in listed | OF_PYTHON
    }
    assert not missing


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("path", [path for path, line in LISTED.items() if line in ("", LINE)])
def test_what_is_not_public_is_still_there(driver, path):
    """A release of SQLAlchemy, a driver or Alembic that drops such a name is noticed by the name."""
    assert found(path), f"{path} is gone; the page says where it is used, and why"
