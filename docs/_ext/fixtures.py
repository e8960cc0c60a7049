"""The directive `fixtures`: the pytest plugin's, which autodoc takes for objects of pytest's own."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from sqla_uow import pytest_plugin

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx


class Fixtures(SphinxDirective):
    """List each fixture with what it is to a type checker, and its docstring."""

    def run(self) -> list[nodes.Node]:
        """Make the list."""
        found = {name: value for name, value in vars(pytest_plugin).items() if name.startswith("uow_")}
        lines = [line for name, fixture in found.items() for line in described(name, fixture._get_wrapped_function())]  # noqa: SLF001  # pytest offers no other way
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source="fixtures"), self.content_offset, node)
        return node.children


def described(name: str, function: Callable[..., object]) -> list[str]:
    """Return the lines of one fixture."""
    returned = str(inspect.signature(function).return_annotation)
    if returned.startswith("Generator["):  # what it yields is what a test gets
        returned = returned.removeprefix("Generator[").removesuffix("]")
    text = inspect.cleandoc(function.__doc__ or "")
    return [f".. py:data:: {name}", f"   :type: {returned}", "", *(f"   {line}" for line in text.splitlines()), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_directive("fixtures", Fixtures)
    return {"parallel_read_safe": True}
