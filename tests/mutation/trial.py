"""One mutant on trial: put into the modules that are loaded, in a process that is forked for it.

All is imported and collected once; a fork with another `__code__` takes a hundredth of the time of a new interpreter.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import itertools
import os
import resource
import select
import signal
import sys
import time
import traceback
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from tests.mutation.mutants import Mutant

GRACE = 60.0
"""Seconds that a process may take beyond its tests; each test has a limit of its own."""
LIMIT = 10
"""Seconds for one test, beside three times what it took when it was measured."""
_MEMORY = 4 << 30


def in_a_fork(work: Callable[[], str | None], *, seconds: float, log: Path) -> str | None:
    """Run `work` in a fork.

    Args:
        work: returns what it has found.
        seconds: after which it is killed.
        log: gets what it prints.

    Returns:
        what `work` has returned, or ""; None if it did not come to its end.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        try:
            os.write(writing, f"{work() or ''}\n".encode())
        except BaseException:  # noqa: BLE001  # told in the log, and by the missing answer
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(writing)
    told, until = b"", time.monotonic() + seconds
    try:
        while (left := until - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
            if not (part := os.read(reading, 4096)):
                break
            told += part
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # itself, and what it has started
        os.waitpid(pid, 0)
    return told.decode().removesuffix("\n") if told.endswith(b"\n") else None


class Verdict:
    """A plugin of the forked process: the first failure is the verdict."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._tell(report.nodeid)


def run(session: pytest.Session, items: list[pytest.Item], seconds: list[float], current: Path) -> str | None:
    """Run tests, which have taken so long, until one fails, and return that one; `current` says which is being run."""
    failed: list[str] = []
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # dies of it, whatever the mutant catches
    session.config.pluginmanager.register(Verdict(failed.append))
    for item, following, usual in itertools.zip_longest(items, items[1:], seconds):
        current.write_text(item.nodeid)
        signal.alarm(LIMIT + int(3 * usual))
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if failed:
            return failed[0]
    return None


def apply(mutant: Mutant, source: str, path: Path) -> None:
    """Turn the loaded module, whose text is `source`, into the mutant."""
    if not mutant.within:
        _execute(mutant, source)
        return
    live = functions_of(path)
    pairs = zip(_functions(source, path), _functions(mutant.code, path), strict=True)
    for (old, _), (new, arguments) in pairs:
        function = live[old.co_qualname, old.co_firstlineno]
        if old.co_freevars != new.co_freevars:
            new = new.replace(co_freevars=old.co_freevars)  # noqa: PLW2901
        function.__code__ = new
        positional, keywords = _defaults(arguments)
        if positional and function.__defaults__:
            function.__defaults__ = function.__defaults__[: -len(positional)] + positional
        if function.__kwdefaults__:
            function.__kwdefaults__ |= keywords


@functools.cache
def functions_of(path: Path) -> dict[tuple[str, int], types.FunctionType]:
    """Return the functions of a file that are loaded, by name and first line: all objects are looked at, so only once."""
    return {
        (f.__code__.co_qualname, f.__code__.co_firstlineno): f
        for f in gc.get_objects()
        if isinstance(f, types.FunctionType) and f.__code__.co_filename == str(path)
    }


def _execute(mutant: Mutant, source: str) -> None:
    """Execute the statement of the module that is another, and hand its value on to whoever has imported it."""
    module = sys.modules[f"sqla_uow.{mutant.module}"]
    before = {ast.dump(statement) for statement in ast.parse(source).body}
    for statement in ast.parse(mutant.code).body:
        if ast.dump(statement) in before:
            continue
        old = dict(vars(module))
        exec(compile(ast.Module([statement], []), "mutant", "exec"), vars(module))  # noqa: S102
        for name, value in vars(module).items():
            if name not in old or value is old[name]:
                continue
            for other in list(sys.modules.values()):
                if getattr(other, "__dict__", {}).get(name) is old[name] and other.__name__.startswith(
                    ("sqla_uow", "tests")
                ):
                    setattr(other, name, value)


def _functions(source: str, path: Path) -> list[tuple[types.CodeType, ast.arguments]]:
    """Return the code of each function of a module that is in no other, with its arguments, in their order."""
    codes = list(_outermost(compile(source, str(path), "exec", dont_inherit=True)))
    found: list[ast.arguments] = []

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(node.args)
            elif isinstance(node, ast.ClassDef):
                walk(node.body)

    walk([node for node in ast.parse(source).body if not isinstance(node, ast.If)])
    return list(zip(codes, found, strict=True))


def _outermost(code: types.CodeType) -> Any:
    for constant in code.co_consts:
        if not isinstance(constant, types.CodeType):
            continue
        if constant.co_flags & 0x02:  # CO_NEWLOCALS: a function's, where a class's is not
            if not constant.co_name.startswith("<"):
                yield constant
        else:
            yield from _outermost(constant)


def _defaults(arguments: ast.arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the defaults that are constants."""
    keywords = {
        argument.arg: default.value
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if isinstance(default, ast.Constant)
    }
    positional = tuple(default.value for default in arguments.defaults if isinstance(default, ast.Constant))
    return (positional if len(positional) == len(arguments.defaults) else ()), keywords
