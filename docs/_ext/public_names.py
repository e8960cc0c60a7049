"""What is public, and that the reference has a place for each of its names.

A module without an underscore in its name is public, and so is what its `__all__` names.  The annotations of the source name
classes that are imported under `if TYPE_CHECKING:` only; for the reference those imports are made up for.

In docstrings single backticks are for names: those that are public here become links, the others code.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic

from docutils import nodes
from sphinx.roles import XRefRole
from sphinx.util import logging
from sphinx.util.inspect import TypeAliasForwardRef

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from sphinx import addnodes
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PACKAGES = ("sqla_uow", "sqla_uow_starlette")
SHORTER = {
    r" = <[^,]*>(?=[,)])": " = ...",  # a function by its address
    r"(\*\*?\w+): ~typing\.~P\b": r"\1",  # P.args and P.kwargs
    r"\[\[~P\]": "[...",
    r" = _MIB\b": " = 1048576",
}
logger = logging.getLogger(__name__)


def modules() -> Iterator[ModuleType]:
    """Import every module of the packages."""
    for package in map(import_module, PACKAGES):
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith(".__main__"):  # a program
                yield import_module(found.name)


def public_modules() -> list[ModuleType]:
    """Return the modules that users import."""
    return [module for module in modules() if not any(part.startswith("_") for part in module.__name__.split("."))]


def import_for_annotations(module: ModuleType) -> None:
    """Run the `if TYPE_CHECKING:` imports of a module; all modules are there by now, so none is circular."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            code = compile(ast.Module(node.body, []), str(module.__file__), "exec")
            exec(code, vars(module))  # noqa: S102  # our own source


def homes() -> dict[str, list[str]]:
    """Return for each public name the modules that offer it, the most specific one first."""
    found: dict[str, list[str]] = {}
    for module in sorted(public_modules(), key=lambda module: -len(module.__name__)):
        for name in getattr(module, "__all__", ()):
            found.setdefault(name, []).append(module.__name__)
    return found


def tell_what_is_missing(_app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each public name that no page documents."""
    python = env.domains.python_domain
    for module in public_modules():
        if module.__name__ not in python.modules:
            logger.warning("no page of the reference has the module %s", module.__name__)
    for name, modules_of in homes().items():
        if not any(f"{module}.{name}" in python.objects for module in modules_of) and name != "errors":
            logger.warning("the reference lacks %s.%s", modules_of[0], name)


class NameRole(XRefRole):
    """`name`: a link where the name is public in one of our modules, or begins with such a module; code elsewhere."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Choose between the two."""
        name = self.text.removeprefix("@").removesuffix("()")
        first = name.partition(".")[0]
        if first in PACKAGES:
            self.target = name
        elif first in PUBLIC:
            self.target = f"{PUBLIC[first]}.{name}"
        else:
            return [nodes.literal(self.rawtext, self.text)], []
        self.refdomain, self.reftype, self.classes = "py", "obj", ["xref", "py", "py-obj"]
        self.title, self.has_explicit_title = self.text, True
        return self.create_xref_node()


def refer_to_attribute(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.TextElement
) -> nodes.reference | None:
    """Link `Class.attribute` to the class whose docstring explains it: attributes stand in a list there."""
    owner, _, attribute = node["reftarget"].rpartition(".")
    module, _, name = owner.rpartition(".")
    if PUBLIC.get(name) != module or not re.search(rf"^ +{attribute}: ", documented(module, name), re.MULTILINE):
        return None
    found = env.domains.python_domain.resolve_any_xref(env, node["refdoc"], app.builder, owner, node, shown)
    return found[0][1] if found else None


def documented(module: str, name: str) -> str:
    """Return the docstrings of a class and its bases."""
    value = getattr(import_module(module), name)
    return "\n".join(base.__doc__ or "" for base in getattr(value, "__mro__", ()))


def shorten(*event: Any) -> tuple[str, str] | None:
    """Write a signature as users read it; without the arguments of a class that nobody makes by hand."""
    _app, what, _name, value, _options, signature, returns = event
    if what == "class" and re.search(r"\._transaction\.Transaction|\bLastWrite\b", str(signature)):
        return ("", "")
    for written, shown in SHORTER.items():
        signature = signature and re.sub(written, shown, signature)
    if returns and inspect.isgeneratorfunction(getattr(value, "__wrapped__", None)):  # @contextmanager
        returns = re.sub(r"^.*\bGenerator\[(.*)\]$", r"~contextlib.AbstractContextManager[\1]", returns)
    return signature, returns


def leave_out_fields(_app: Sphinx, _what: str, _name: str, value: object, *_rest: object) -> bool | None:
    """Leave out the fields of a named tuple, which its docstring explains."""
    return True if str(value.__doc__).startswith("Alias for field number") else None


def leave_out_bases(_app: Sphinx, _name: str, _value: object, _options: object, bases: list[type]) -> None:
    """Show only the base classes that say something: not those of every class, nor private ones."""
    told = [base for base in bases if base is not object and "._" not in getattr(base, "__module__", "")]
    bases[:] = [base for base in told if getattr(base, "__origin__", None) is not Generic] or [object]


def leave_out_object(_app: Sphinx, _domain: str, _objtype: str, content: addnodes.desc_content) -> None:
    """Take back the line that autodoc writes where no base class is left."""
    if content and content[0].astext() == "Bases: object":
        del content[0]


PUBLIC: dict[str, str] = {}
"""Each public name's module."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Prepare the annotations, and check at the end."""
    for module in list(modules()):
        import_for_annotations(module)
    PUBLIC.update({name: found[0] for name, found in homes().items()})
    # In a union Sphinx writes an alias of `autodoc_type_aliases` by its repr, which no reader knows.
    TypeAliasForwardRef.__repr__ = lambda alias: f"~{alias.name}"  # type: ignore[method-assign]
    app.add_role("name", NameRole())
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", leave_out_fields)
    app.connect("autodoc-process-bases", leave_out_bases)
    app.connect("missing-reference", refer_to_attribute)
    app.connect("object-description-transform", leave_out_object)
    app.connect("env-check-consistency", tell_what_is_missing)
    return {"parallel_read_safe": True}
