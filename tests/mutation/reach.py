"""Which tests reach which lines of the modules, and how long each takes: measured once, and again where files change."""

from __future__ import annotations

import ast
import difflib
import gc
import hashlib
import itertools
import json
import sys
import types
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pytest

SLOWEST = 15.0
"""Seconds; a test that takes longer judges no mutant."""


class Reach:
    """What is known of the tests.

    Args:
        folder: where it is kept from run to run.
        sources: the file of each module.
    """

    def __init__(self, folder: Path, sources: dict[str, Path]) -> None:
        self._file = folder / "reach.json"
        self.sources = sources
        self.texts = {name: path.read_text() for name, path in sources.items()}
        self.modules = {name: _digest(path) for name, path in sources.items()}
        self.files: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.seen: set[str] = set()
        self._lines: dict[str, dict[int, set[str]]] = {name: defaultdict(set) for name in sources}
        self._load()

    def _load(self) -> None:
        if not self._file.exists():
            return
        known = json.loads(self._file.read_text())
        self.files, self.seconds, self.seen = known["files"], known["seconds"], set(known["seen"])
        for name, lines in known["lines"].items():
            self._carry(name, known["texts"][name], {int(line): set(tests) for line, tests in lines.items()})

    def _carry(self, name: str, text: str, lines: dict[int, set[str]]) -> None:
        """Take over what was known of a module, line by line; what stands for others is passed by whoever passed those."""
        pairs = difflib.SequenceMatcher(None, text.splitlines(), self.texts[name].splitlines(), autojunk=False)
        for _, old, old_end, new, new_end in pairs.get_opcodes():
            if old_end - old == new_end - new:
                known = {line: lines.get(line + old - new, set()) for line in range(new + 1, new_end + 1)}
            else:
                around = set().union(*(lines.get(line, ()) for line in range(old, old_end + 2)))
                known = dict.fromkeys(range(new + 1, new_end + 1), around)
            for line, tests in known.items():
                self._lines[name][line] |= tests

    def missing(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """Return the tests that are not known as they are now; forget what was known of their files."""
        digests = {path: _digest(path) for path in {item.path for item in items}}
        changed = {path for path, digest in digests.items() if self.files.get(str(path)) != digest}
        gone = {item.nodeid for item in items if item.path in changed}
        for test in gone:
            self.seconds.pop(test, None)
        for lines in self._lines.values():
            for tests in lines.values():
                tests.difference_update(gone)
        self.files.update((str(path), digests[path]) for path in changed)
        return [item for item in items if item.path in changed or item.nodeid not in self.seen]

    def save(self) -> None:
        lines = {name: {line: sorted(tests) for line, tests in lines.items()} for name, lines in self._lines.items()}
        known = {
            "texts": self.texts,
            "files": self.files,
            "seconds": self.seconds,
            "seen": sorted(self.seen),
            "lines": lines,
        }
        self._file.write_text(json.dumps(known))

    def measure(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Run the tests, and note what each passes; in a process of its own."""
        times = _Times()
        session.config.pluginmanager.register(times)
        passed = {item.nodeid: set[tuple[str, int]]() for item in items}
        lines = watch_lines({str(path): name for name, path in self.sources.items()})
        for item, following in itertools.zip_longest(items, items[1:]):
            lines(passed[item.nodeid])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        self.seen.update(passed)
        self.seconds.update((test, seconds) for test, seconds in times.passed.items() if test not in times.unfit)
        for test, places in passed.items():
            for name, line in places if test in self.seconds else ():
                self._lines[name][line].add(test)
        self.save()

    def of(self, module: str, line: int | None) -> list[str]:
        """Return the tests that pass the statement at `line`, or anything in the module.

        First those that tell most in a second: that pass what few others do in this function, so are about it.
        """
        lines = self._lines[module]
        wanted = list(lines) if line is None else _statement(self.texts[module], line)
        tests = set().union(*(lines.get(one, ()) for one in wanted))
        rarity: dict[str, float] = defaultdict(float)
        around = wanted if line is None else _function(self.texts[module], line)
        for passing in (lines[one] for one in around if one in lines):
            for test in passing & tests:
                rarity[test] += 1 / len(passing)
        fit = (test for test in tests if self.seconds[test] < SLOWEST)
        return sorted(fit, key=lambda test: self.seconds[test] / (rarity[test] or 1e-9) ** 2)


def watch_lines(files: dict[str, str]) -> Callable[[set[tuple[str, int]]], None]:
    """Watch which lines of the functions of some files are passed, until the process ends.

    Each line tells once and is silent then, so it costs next to nothing, where a tracer would double the time.

    Args:
        files: paths, and what to call each.

    Returns:
        says where to note from now on.
    """
    monitoring, tool = sys.monitoring, sys.monitoring.COVERAGE_ID
    noted: set[tuple[str, int]] = set()

    def passed(code: types.CodeType, line: int) -> Any:
        noted.add((files[code.co_filename], line))
        return monitoring.DISABLE

    def begin(place: set[tuple[str, int]]) -> None:
        nonlocal noted
        noted = place
        monitoring.restart_events()

    monitoring.use_tool_id(tool, "reach")
    monitoring.register_callback(tool, monitoring.events.LINE, passed)
    for code in {f.__code__ for f in gc.get_objects() if isinstance(f, types.FunctionType)}:
        if code.co_filename in files:
            for one in _with_inner(code):
                monitoring.set_local_events(tool, one, monitoring.events.LINE)
    return begin


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


class _Times:
    def __init__(self) -> None:
        self.passed: dict[str, float] = defaultdict(float)
        self.unfit: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed[report.nodeid] += report.duration
        if not report.passed:
            self.unfit.add(report.nodeid)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _function(source: str, line: int) -> range:
    """Return the lines of the innermost function around `line`, of the whole module where there is none."""
    best = range(1, source.count("\n") + 2)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = range(node.lineno, node.end_lineno + 1)
            if line in lines and len(lines) < len(best):
                best = lines
    return best


def _statement(source: str, line: int) -> range:
    """Return the lines of the innermost statement at `line`; of one with a body, those of its head."""
    best = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            first: int = getattr(node, "lineno", line)
            # The head of a function, its defaults, is read at import.
            body = None if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno  # type: ignore[union-attr]
            if first <= line <= max(first, last or first):
                best = range(first, max(first, last or first) + 1)
    return best
