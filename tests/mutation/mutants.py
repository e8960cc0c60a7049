"""The mutants of a module: mutmut's operators, and a few of our own, at every place that does something.

mutmut's own run would copy the tree, leave out each function with a decorator, and start the servers anew for each mutant.
"""

from __future__ import annotations

import builtins
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import libcst as cst
from libcst import matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider, WhitespaceInclusivePositionProvider
from mutmut.mutation import mutators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Args:
        module: its name, without the package's.
        within: the qualified name of the function or class around the change.
        was: the lines that it changes, stripped and joined by a space.
        becomes: what they become.
        line: where it is.
        code: of the whole module.
    """

    module: str
    within: str
    was: str
    becomes: str
    line: int
    code: str

    @property
    def key(self) -> str:
        """What it is known by, wherever its lines have moved to, and to whatever module."""
        return f"{self.within}: {self.was} -> {self.becomes}"

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line} {self.within}\n    - {self.was}\n    + {self.becomes}"


def mutants(module: str, source: str) -> list[Mutant]:
    """Return the mutants of a module, in the order of its lines."""
    visitor = _Visitor()
    wrapper = MetadataWrapper(cst.parse_module(source))
    tree, places = wrapper.visit(visitor), wrapper.resolve(WhitespaceInclusivePositionProvider)
    lines = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    found: dict[str, Mutant] = {}
    for line, within, before, after in visitor.changes:
        if isinstance(before, cst.If | cst.While):
            before, after = before.test, after.test  # type: ignore[attr-defined]  # noqa: PLW2901  # without its body
        # Another tree for each, and all of its text, would take ten times as long.
        start, end = (lines[place.line - 1] + place.column for place in (places[before].start, places[before].end))
        code = source[:start] + tree.code_for_node(after) + source[end:]
        if code == source or not _compiles(code):
            continue
        was, becomes = _changed(source, code)
        mutant = Mutant(module, within, was, becomes, line, code)
        found.setdefault(f"{line} {mutant.key}", mutant)
    return list(found.values())


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _changed(source: str, code: str) -> tuple[str, str]:
    before, after = source.splitlines(), code.splitlines()
    same = _alike(before, after)
    rest = _alike(before[same:][::-1], after[same:][::-1])
    was, becomes = (lines[same : len(lines) - rest] for lines in (before, after))
    return " ".join(map(str.strip, was)), " ".join(map(str.strip, becomes))


def _alike(ones: list[str], others: list[str]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ones, others, strict=False))
    return sum(1 for _ in pairs)


def _without_statement(node: cst.Expr | cst.Raise | cst.Del) -> Iterable[cst.CSTNode]:
    if not isinstance(node, cst.Expr) or isinstance(node.value, cst.Call | cst.Await):
        yield cst.Pass()


def _without_value(node: cst.Return) -> Iterable[cst.CSTNode]:
    if node.value is not None and not m.matches(node.value, m.Name("None") | m.Name("False")):
        yield node.with_changes(value=cst.Name("None"))


def _other_assignment(node: cst.Assign | cst.AnnAssign) -> Iterable[cst.CSTNode]:
    # None, False and "" would be one and the same nearly everywhere.
    if node.value is not None and not m.matches(node.value, m.Name("None") | m.Name("True") | m.Name("False")):
        yield from mutators.operator_assignment(node)


def _without_argument(node: cst.Call) -> Iterable[cst.CSTNode]:
    # Leaving it out altogether is a TypeError nearly always, and so is None to a builtin.
    if m.matches(node.func, m.Name() & m.MatchIfTrue(lambda name: hasattr(builtins, name.value))):
        return
    for index, argument in enumerate(node.args):
        if not argument.star and not m.matches(argument.value, m.Name("None")) and not _is_text(argument.value):
            other = argument.with_changes(value=cst.Name("None"))
            yield node.with_changes(args=[*node.args[:index], other, *node.args[index + 1 :]])


_REPLACED = {
    mutators.operator_arg_removal: _without_argument,
    mutators.operator_assignment: _other_assignment,
    mutators.operator_string: lambda node: list(mutators.operator_string(node))[:1],  # as good as its other case
}
_OPERATORS: list[tuple[type, Callable[[Any], Iterable[cst.CSTNode]]]] = [
    *((kind, _REPLACED.get(operator, operator)) for kind, operator in mutators.mutation_operators),
    (cst.Expr, _without_statement),
    (cst.Raise, _without_statement),
    (cst.Del, _without_statement),
    (cst.Return, _without_value),
    # A condition forced one way and the other.  A loop for ever would be found, too, but only by the clock.
    (cst.If, mutators.operator_if_exp),
    (cst.While, lambda node: list(mutators.operator_if_exp(node))[:1]),
]
_TWO_WAYS = m.Is() | m.IsNot() | m.In() | m.NotIn() | m.Equal() | m.NotEqual()

# What only type checkers and readers see, and limits that somebody chose.  A wrong `__slots__` does not import.
_SKIPPED = (
    m.Annotation()
    | m.Decorator()
    | m.Import()
    | m.ImportFrom()
    | m.Assert()
    | m.If(test=m.Name("TYPE_CHECKING"))
    | m.Call(func=m.Name("cast"))
    | m.Assign(targets=[m.AssignTarget(target=m.Name("__all__") | m.Name("__slots__"))])
    | m.Assign(
        targets=[m.AssignTarget(target=m.Name(value=m.MatchRegex("[A-Z][A-Z_]*")))], value=m.Integer() | m.Float()
    )
    | m.Assign(value=m.Call(func=m.Name("TypeVar")) | m.Subscript(slice=[m.SubscriptElement(m.Index(m.Name("Any")))]))
    | m.Assign(value=m.BinaryOperation(operator=m.BitOr(), right=m.Name("None")))
    | m.AnnAssign(annotation=m.Annotation(m.Name("TypeAlias")))
    | m.ConcatenatedString()
    | m.FormattedString()
)


def _is_text(node: cst.CSTNode) -> bool:
    """Say whether it is a message for people, whose words are no behaviour."""
    if isinstance(node, cst.ConcatenatedString | cst.FormattedString):
        return True
    if not isinstance(node, cst.SimpleString) or " " not in node.raw_value:
        return False
    return node.raw_value[0].islower() or re.search("[a-z]+ [a-z]+ [a-z]+", node.raw_value) is not None


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[int, str, cst.CSTNode, cst.CSTNode]] = []
        self._scopes: list[cst.FunctionDef | cst.ClassDef] = []
        self._forced: set[cst.CSTNode] = set()
        self._last = 1

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, _SKIPPED) or _is_text(node):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._scopes.append(node)
        if isinstance(node, cst.If | cst.IfExp):
            self._forced.update(_turning_round(node.test))
        # What a class says while it is made, its fields and members, is no behaviour of its own.
        if node not in self._forced and not self._in_class():
            line, within = self._line(node), ".".join(scope.name.value for scope in self._scopes)
            self.changes.extend((line, within, node, changed) for changed in _changes(node))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self._scopes.pop()

    def _in_class(self) -> bool:
        return bool(self._scopes) and isinstance(self._scopes[-1], cst.ClassDef)

    def _line(self, node: cst.CSTNode) -> int:
        position = self.get_metadata(PositionProvider, node, None)
        if position is not None:
            self._last = position.start.line
        return self._last


def _turning_round(test: cst.BaseExpression) -> list[cst.CSTNode]:
    """Return the parts whose change would turn a condition round, which is forced both ways anyhow."""
    if isinstance(test, cst.Comparison):
        return [
            part
            for target in test.comparisons
            if m.matches(target.operator, _TWO_WAYS)
            for part in (target, target.operator)
        ]
    return [test] if isinstance(test, cst.UnaryOperation) else []


def _changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in _OPERATORS:
        if isinstance(node, kind):
            yield from operator(node)
