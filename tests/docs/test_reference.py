"""What the generated reference is made of: the docstrings of every public name."""

import enum
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from alembic.operations import Operations

import sqla_uow
import sqla_uow_starlette

REFERENCE = Path(__file__).parents[2] / "docs/reference/api"
MADE_FOR_USERS = {"UnitOfWork", "Scope"}  # never by them
OURS = ("sqla_uow", "sqla_uow_starlette")


def public_modules():
    """Return the modules that users import."""
    for package in (sqla_uow, sqla_uow_starlette):
        yield package
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not found.name.rpartition(".")[2].startswith("_"):
                yield importlib.import_module(found.name)


def is_ours(value):
    """Say whether a function is defined here."""
    return (getattr(value, "__module__", None) or "").startswith(OURS)


def functions(module):
    """Return the public functions and methods of a module, and its classes for their constructors."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value, [value]
        elif inspect.isclass(value) and not getattr(value, "_is_protocol", False) and not issubclass(value, enum.Enum):
            if name not in MADE_FOR_USERS and any(is_ours(vars(base).get("__init__")) for base in value.__mro__):
                yield name, value, value.__mro__
            for method, function in vars(value).items():
                function = inspect.unwrap(getattr(function, "__func__", function))  # noqa: PLW2901  # a classmethod's
                if inspect.isfunction(function) and is_ours(function) and not method.startswith("_"):
                    names = (method, method.removeprefix("batch_"))  # Alembic's batch forms take what the others take
                    overridden = [
                        getattr(base, name) for base in value.__mro__ for name in names if hasattr(base, name)
                    ]
                    if all(is_ours(other) for other in overridden):  # else it is explained by whoever asks for it
                        yield f"{name}.{method}", function, overridden


def parameters(function):
    """Return the names that a caller may pass."""
    found = inspect.signature(function).parameters
    return [name for name in found if name not in ("self", "cls", "message") and not name.startswith("_")]


def explained(name, sources):
    """Say whether a parameter has a line of its own, in the docstring or in that of a base class."""
    # Alembic moves the docstring of what a migration calls from the class to `op`
    sources = [*sources, *(getattr(Operations, getattr(source, "__name__", ""), None) for source in sources)]
    line = re.compile(rf"^ *\*{{0,2}}{name}: \S|The arguments are those of ``\w+``", re.MULTILINE)
    return any(line.search(getattr(source, "__doc__", None) or "") for source in sources)


@pytest.mark.parametrize("module", list(public_modules()), ids=lambda module: module.__name__)
def test_every_parameter_is_explained(module):
    """Each parameter of each public function, class and method stands in its docstring."""
    missing = [
        f"{name}({parameter})"
        for name, function, sources in functions(module)
        for parameter in parameters(function)
        if not explained(parameter, sources)
    ]
    assert missing == []


@pytest.mark.parametrize("module", list(public_modules()), ids=lambda module: module.__name__)
def test_every_public_module_has_its_page(module):
    """The reference is generated from each; that no name of it is left out is checked by `tox -e docs`."""
    pages = "".join(page.read_text() for page in REFERENCE.glob("*.md"))
    assert f".. automodule:: {module.__name__}\n" in pages
