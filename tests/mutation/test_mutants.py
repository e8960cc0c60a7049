"""What is changed and what is not, how a fork becomes a mutant, and what comes of one that dies."""

from __future__ import annotations

import os
import signal
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="the dependency group mutation is not installed")

import sqla_uow._transaction.doom
from tests.mutation import trial
from tests.mutation.__main__ import HERE, MODULES, sample, source_of
from tests.mutation.mutants import mutants
from tests.mutation.reach import watch_lines

SOURCE = '''
from x import log

class Point:
    colour: str = "red"

    def move(self, by: int = 1) -> int:
        """Move."""
        if self.colour and by > 2:
            raise ValueError(f"{by} is far")
        self.check(by)
        log(DEBUG, "ROLLBACK of %s took too long", by)
        assert by is not None
        return self.x + by
'''


def test_what_is_changed():
    """Conditions, calls, values and defaults; the facts of the log; no message, assertion, annotation or field of a class."""
    changes = [(mutant.within, mutant.was, mutant.becomes) for mutant in mutants("m", SOURCE)]
    move = "Point.move"
    head, condition = "def move(self, by: int = 1) -> int:", "if self.colour and by > 2:"
    told = 'log(DEBUG, "ROLLBACK of %s took too long", by)'
    assert changes == [
        (move, head, head.replace("1", "2")),
        (move, condition, "if (self.colour and by > 2) and False:"),
        (move, condition, "if (self.colour and by > 2) or True:"),
        (move, condition, "if self.colour or by > 2:"),
        (move, condition, "if self.colour and by >= 2:"),
        (move, condition, "if self.colour and by > 3:"),
        (move, 'raise ValueError(f"{by} is far")', "pass"),
        (move, "self.check(by)", "pass"),
        (move, "self.check(by)", "self.check(None)"),
        (move, told, "pass"),
        (move, told, told.replace("DEBUG", "None")),
        (move, told, told.replace("by)", "None)")),
        (move, "return self.x + by", "return None"),
        (move, "return self.x + by", "return self.x - by"),
    ]


@pytest.fixture
def changed():
    """Return what a function of the library says in a fork that has become a mutant."""
    path = Path(sqla_uow._transaction.doom.__file__)
    source = path.read_text()

    def changed(was, becomes, work):
        (mutant,) = (one for one in mutants("_transaction.doom", source) if (one.was, one.becomes) == (was, becomes))

        def run():
            trial.apply(mutant, source, path)
            return repr(work())

        return trial.in_a_fork(run, seconds=10, log=Path(os.devnull))

    return changed


def test_a_fork_becomes_a_mutant(changed):
    """Its body and its defaults, under whatever name somebody holds the function; this process stays as it is."""
    doom = sqla_uow._transaction.doom.Doom(hooks=None)
    depth, add = type(doom).depth.fget, doom.mark

    def hard():
        add(None)
        return doom.marked.hard

    assert changed("return len(self._savepoints)", "return None", lambda: depth(doom)) == "None"
    assert changed("hard: bool = False,", "hard: bool = True,", hard) == "True"
    assert depth(doom) == 0
    assert not hard()


@pytest.mark.parametrize("work", [lambda: os.kill(os.getpid(), signal.SIGKILL), signal.pause, lambda: 1 / 0])
def test_a_fork_that_does_not_come_to_its_end(work):
    """Killed, hanging or failed: told from one that has nothing to say."""
    assert trial.in_a_fork(work, seconds=0.2, log=Path(os.devnull)) is None
    assert trial.in_a_fork(lambda: None, seconds=10, log=Path(os.devnull)) == ""


def test_a_sample_is_the_same_again():
    """Wherever the lines have moved to, and with the same text elsewhere; another seed draws others."""
    before, after = mutants("m", SOURCE), mutants("n", f"# moved\n{SOURCE}")
    drawn = sample(before, 4, "a")
    assert [one.key for one in sample(after, 4, "a")] == [one.key for one in drawn]
    assert sample(before, 4, "b") != drawn
    assert sample(before, 99, "a") == before


def test_the_lines_that_are_passed():
    """Of the files that are watched, each time anew."""
    path = sqla_uow._transaction.doom.__file__
    doom = sqla_uow._transaction.doom.Doom(hooks=None)

    def watch():
        begin, (first, second) = watch_lines({path: "doom"}), (set(), set())
        begin(first)
        assert doom.depth == doom.depth
        begin(second)
        assert doom.depth == 0
        return f"{len(first)} {first == second} {first.pop()[0]}"

    assert trial.in_a_fork(watch, seconds=10, log=Path(os.devnull)) == "1 True doom"


@pytest.mark.timeout(300)  # it makes all of them
def test_what_is_listed_is_there():
    """Each change that nobody could tell is one that is made of a line that there is."""
    entries = tomllib.loads((HERE / "equivalent.toml").read_text())["mutant"]
    made = {mutant.key for name in MODULES for mutant in mutants(name, source_of(name).read_text())}
    assert [entry for entry in entries if "{within}: {was} -> {becomes}".format(**entry) not in made] == []
