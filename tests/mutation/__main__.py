"""Change the modules that decide what is committed, one change at a time, and see that a test notices.

    python -m tests.mutation [MODULE ...] [--sample N] [--tests FOLDER ...]

Outcomes are kept in a folder: what was killed is not tried again while its module is the same; what has survived is.  So several
can run at a time with one folder, each with other modules; and a sample that SQLite has judged in little time goes on with its
survivors on `--drivers` that take longer.  Exit status
1: some survive that `equivalent.toml` does not list.  Each is a line that no test would miss: write a test of what a user would
see go wrong, rows, status, hooks or the pool, or delete the line; only what cannot be seen at all is listed, with the reason.
"""

from __future__ import annotations

import argparse
import collections
import gc
import hashlib
import importlib.util
import json
import os
import re
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.kit.databases import DRIVERS, ONE_OF_EACH, Databases
from tests.mutation import trial
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.reach import Reach

MODULES = (
    "_transaction.doom", "_transaction.hooks", "_transaction.transaction", "_transaction.reports", "_transaction.committing",
    "_transaction.failing", "_transaction.raw_calls", "_transaction.refusals", "_attempts.attempt", "_attempts.call",
    "_attempts.retry_or_raise", "_unit.commit", "_unit.rollback", "_unit.ending", "_unit.verify", "_unit.markers",
    "_tasks.owner", "_tasks.frames", "_databases.failures", "_databases.levels", "_databases.system", "_databases.driver",
    "_databases.postgresql", "_databases.mariadb", "_databases.sqlite", "_databases.distributed",
)  # fmt: skip
TESTS = (
    "core",
    "concurrency",
    "isolation",
    "properties",
    "testing",
    "versioning",
    "starlette",
    "replicas",
    "distributed",
)
HERE = Path(__file__).parent
BUDGET = 60.0
"""Seconds of tests for one mutant, of those that reach it.  Lines that all pass would take hours otherwise."""


class Run:
    """A plugin of pytest that collects all tests, and puts one mutant after the other on trial."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.databases = Databases()
        self.log = self.folder / f"log-{os.getpid()}"
        self.sources: dict[str, Path] = {}
        self.kills: collections.Counter[tuple[str, str]] = collections.Counter()
        self.failed = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        """Hand in the servers, which live as long as this process."""
        if fixturedef.argname != "databases":
            return None
        fixturedef.cached_result = (self.databases, fixturedef.cache_key(request), None)
        return self.databases

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the drivers that are not asked for."""
        items[:] = [item for item in items if _driver(item) in (None, *self.options.drivers)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running the tests."""
        if session.testsfailed:
            pytest.exit(f"{session.testsfailed} errors during collection", 1)
        try:
            for driver in {_driver(item) for item in session.items} - {None}:
                self.databases.make(driver, self.folder)  # here, or each fork would start a server of its own
            self._run(session)
        finally:
            self.databases.stop()
        return True

    def _run(self, session: pytest.Session) -> None:
        items = {item.nodeid: item for item in session.items}
        self.sources = {name: source_of(name) for name in MODULES}
        reach = Reach(self.folder, self.sources)
        if unknown := reach.missing(session.items):
            _say(f"measuring what {len(unknown)} tests reach")
            done = trial.in_a_fork(lambda: reach.measure(session, unknown), seconds=7200, log=self.log)
            if done is None:
                pytest.exit(f"the tests could not be measured; see {self.log}", 1)
            reach = Reach(self.folder, reach.sources)
        for path in self.sources.values():
            trial.functions_of(path)
        gc.collect()
        gc.freeze()  # each fork would look through what it has inherited, and so copy it
        listed = _listed()
        for name in self.options.modules or MODULES:
            self._try_all(session, name, reach, items, listed)

    def _try_all(
        self, session: pytest.Session, name: str, reach: Reach, items: dict[str, pytest.Item], listed: set[str]
    ) -> None:
        began = time.monotonic()
        kept = _Kept(self.folder / f"{name}.jsonl", reach.modules[name])
        everything = mutants(name, reach.texts[name])
        drawn = (
            everything if self.options.sample is None else sample(everything, self.options.sample, self.options.seed)
        )
        chosen = [mutant for mutant in drawn if mutant.key not in listed]
        survivors: list[Mutant] = []
        for mutant in chosen:
            if kept.killed(mutant) is None:
                tests = [test for test in reach.of(name, mutant.line if mutant.within else None) if test in items]
                killer = self._try(session, mutant, self._order(mutant, tests, reach), items, reach)
                kept.note(mutant, killer)
                self.kills[name, killer or ""] += 1
                self.kills[mutant.within, killer or ""] += 1
            if kept.killed(mutant) is None:
                survivors.append(mutant)
                _say(f"survives: {mutant}")
        _say(
            f"{name}: {len(everything)} mutants, {len(drawn)} drawn, {len(drawn) - len(chosen)} of them listed, {len(chosen)} tried, "
            f"{len(survivors)} survive, {time.monotonic() - began:.0f} s"
        )
        self.failed = self.failed or bool(survivors)

    def _order(self, mutant: Mutant, tests: list[str], reach: Reach) -> list[str]:
        """Put first what is asked for, what has killed in this function, then in this module, then as `Reach.of` does; as many as there is time for.

        Of a test that runs on several drivers, the first comes before any second one: other tests tell more.
        """
        turns: collections.Counter[str] = collections.Counter()
        turn = {}
        for test in tests:
            without = re.sub("|".join(DRIVERS), "", test)
            turn[test] = turns[without]
            turns[without] += 1
        tests = sorted(
            tests,
            key=lambda test: (
                not any(word in test for word in self.options.first),
                -self.kills[mutant.within, test],
                -self.kills[mutant.module, test],
                turn[test],
            ),
        )
        left, chosen = self.options.budget, []
        for test in tests:
            left -= reach.seconds[test]
            if left > 0:
                chosen.append(test)
        return chosen

    def _try(
        self, session: pytest.Session, mutant: Mutant, tests: list[str], items: dict[str, pytest.Item], reach: Reach
    ) -> str | None:
        """Return the test that kills, None if none does."""
        current = self.folder / f"current-{os.getpid()}"
        current.write_text("")

        def work() -> str | None:
            try:
                trial.apply(mutant, reach.texts[mutant.module], self.sources[mutant.module])
            except Exception as error:
                if mutant.within:
                    raise
                return f"its import: {error}"
            return trial.run(session, [items[test] for test in tests], [reach.seconds[test] for test in tests], current)

        seconds = 4 * sum(reach.seconds[test] for test in tests) + trial.GRACE
        told = trial.in_a_fork(work, seconds=seconds, log=self.log)
        if told is None and not current.read_text():
            pytest.exit(f"{mutant} could not be made; see {self.log}", 1)
        return f"hangs or dies in {current.read_text()}" if told is None else told or None


class _Kept:
    """The outcomes of one module, from run to run."""

    def __init__(self, file: Path, digest: str) -> None:
        self._file, self._digest = file, digest
        self._killed: dict[str, str] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            outcome = json.loads(line)
            if outcome["source"] == digest and outcome["killer"]:
                self._killed[outcome["mutant"]] = outcome["killer"]

    def killed(self, mutant: Mutant) -> str | None:
        return self._killed.get(_place(mutant))

    def note(self, mutant: Mutant, killer: str | None) -> None:
        if killer is not None:
            self._killed[_place(mutant)] = killer
        with self._file.open("a") as file:
            file.write(json.dumps({"source": self._digest, "mutant": _place(mutant), "killer": killer}) + "\n")


def sample(everything: list[Mutant], number: int, seed: str) -> list[Mutant]:
    """Draw some, in the order of their lines; the same ones again, as far as their lines are the same."""
    ranks = {index: hashlib.sha256(f"{seed} {one.key}".encode()).digest() for index, one in enumerate(everything)}
    return [everything[index] for index in sorted(sorted(ranks, key=ranks.__getitem__)[:number])]


def _place(mutant: Mutant) -> str:
    return f"{mutant.line} {mutant.key}"


def _listed() -> set[str]:
    """Return the mutants that are known to change nothing that can be told."""
    entries = tomllib.loads((HERE / "equivalent.toml").read_text()).get("mutant", [])
    keys = {f"{entry['within']}: {entry['was']} -> {entry['becomes']}" for entry in entries}
    if any(not entry["why"] for entry in entries):
        raise pytest.UsageError("a mutant in equivalent.toml has no reason; say why no test can tell it")
    return keys


def _driver(item: pytest.Item) -> str | None:
    return getattr(item, "callspec", None) and item.callspec.params.get("driver")  # type: ignore[attr-defined]


def source_of(module: str) -> Path:
    """Return the file of a module of the library."""
    spec = importlib.util.find_spec(f"sqla_uow.{module}")
    if spec is None or spec.origin is None:
        raise pytest.UsageError(f"there is no module sqla_uow.{module}; choose from {', '.join(MODULES)}")
    return Path(spec.origin)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("modules", metavar="MODULE", nargs="*", help=f"all without: {', '.join(MODULES)}")
    parser.add_argument("--sample", metavar="N", type=int, help="so many mutants of each module")
    parser.add_argument("--seed", default="", help="another one draws another sample")
    parser.add_argument("--budget", metavar="SECONDS", type=float, default=BUDGET, help="of tests for one mutant")
    parser.add_argument(
        "--folder", type=Path, default=Path(".tox", "mutation-outcomes"), help="where outcomes are kept"
    )
    parser.add_argument("--drivers", nargs="+", default=ONE_OF_EACH, choices=DRIVERS)
    parser.add_argument("--first", metavar="WORD", nargs="+", default=(), help="tests with one of these in their names")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="folders of tests")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the fork and the servers are ended, too
    run = Run(options)
    quiet = ["-qq", "-s", "-p", "no:randomly", "-p", "no:cacheprovider"]
    status = pytest.main(
        [*quiet, "--timeout=0", *(str(HERE.parent / folder) for folder in options.tests)], plugins=[run]
    )
    return int(status) or int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
