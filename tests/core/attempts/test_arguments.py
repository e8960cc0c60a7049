"""What an attempt uses up of its arguments: the next one gets it back, or there is no next one; never less than was passed."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import os
import tempfile

import anyio
import pytest
from pydantic import BaseModel
from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, make_transient_to_detached, mapped_column
from starlette.background import BackgroundTasks
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from sqla_uow import RetryPolicy, UnitOfWorkManager, after_commit, current_session, current_unit, errors, transactional
from tests.kit.models import Note

# The database has no part in it, but for a genuine conflict.
pytestmark = pytest.mark.drivers("sqlite", "asyncpg")
LINES = ["a\n", "b\n", "c\n"]


@pytest.fixture
async def conflict(trouble):
    """Provide an active manager, and what meets a conflict in the first attempt of a unit."""
    manager = UnitOfWorkManager(
        trouble.engine(), retries=2, retry=RetryPolicy(base=0, cap=0), isolation=trouble.isolation
    )

    async def meet():
        await trouble.settle()
        if current_unit().attempt == 1:
            await trouble.strike(current_session())

    with manager.activate():
        yield meet


def generator():
    """Yield lines once."""
    yield from LINES


async def async_generator():
    """Likewise."""
    for line in LINES:
        yield line


async def collect(lines):
    """Return what is there, of whatever kind."""
    if hasattr(lines, "__aiter__"):
        return [line async for line in lines]
    return list(lines)


async def notes(db):
    """Return what is committed."""
    return [text for (text,) in await db.rows("SELECT text FROM note ORDER BY id")]


def write(lines):
    """Add a row for each line."""
    current_session().add_all([Note(text=str(line).strip()) for line in lines])


ITERATORS = {
    "generator": (generator, "generator"),
    "async generator": (async_generator, "async_generator"),
    "map": (lambda: map(str, LINES), "map"),
    "iter": (lambda: iter(LINES), "list_iterator"),
    "csv": (lambda: csv.reader(LINES), "reader"),
    "zip": (lambda: zip(LINES, LINES, strict=True), "zip"),
}


@pytest.mark.parametrize(("make", "shown"), ITERATORS.values(), ids=list(ITERATORS))
@pytest.mark.parametrize("how", ["positional", "keyword", "args", "kwargs", "list", "dataclass"])
async def test_an_iterator_is_refused_at_the_second_attempt(db, conflict, make, shown, how):
    """With the parameter and the remedy, from the conflict; nothing of it is committed, and without conflicts it works."""

    @dataclasses.dataclass
    class Batch:
        rows: object

    async def load(rows):
        if isinstance(rows, Batch):
            rows = rows.rows
        elif isinstance(rows, list):
            rows = rows[0]
        lines = await collect(rows)
        await conflict()
        write(lines)

    @transactional
    async def work(first, rows=None, *more, **options):
        await load(more[0] if more else options.get("last", rows))

    calls = {
        "positional": ("rows", lambda rows: work(1, rows)),
        "keyword": ("rows", lambda rows: work(first=1, rows=rows)),
        "args": ("more", lambda rows: work(1, None, rows)),
        "kwargs": ("last", lambda rows: work(1, last=rows)),
        "list": ("rows", lambda rows: work(1, [rows])),
        "dataclass": ("rows", lambda rows: work(1, rows=Batch(rows))),
    }
    name, call = calls[how]
    verb = "holds" if how in ("list", "dataclass") else "is"
    message = (
        rf"^argument '{name}' of work\(\) {verb} an iterator \({shown}\), used up by attempt 1, and another attempt would "
        "miss what it held; pass a list, or read it before the call$"
    )
    with pytest.raises(errors.InstanceReuseError, match=message) as caught:
        await call(make())
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert await notes(db) == []


async def test_an_iterator_without_a_conflict(db):
    """Nothing is refused as long as there is one attempt."""

    @transactional(retries=3)
    async def work(rows):
        write(rows)

    with UnitOfWorkManager(db.engine()).activate():
        await work(generator())
    assert await notes(db) == ["a", "b", "c"]


async def test_a_generator_that_has_not_begun(db, conflict):
    """A conflict before it was read: nothing of it is missing."""

    @transactional
    async def work(rows):
        await conflict()
        write(rows)

    await work(generator())
    assert await notes(db) == ["a", "b", "c"]


async def test_lists_and_what_lives_on(db, conflict):
    """What can be read again is; a service's own counter, and a file that is written to only, are not looked at."""

    @dataclasses.dataclass
    class Service:
        numbers: itertools.count

        @transactional
        async def work(self, rows, log):
            next(self.numbers)
            log.write("x")
            await conflict()
            write(rows)

    service = Service(itertools.count())
    with tempfile.NamedTemporaryFile("w") as log:
        await service.work(LINES, log)
    assert await notes(db) == ["a", "b", "c"]
    assert next(service.numbers) == 2


# -- files


def text_file(folder):
    """Return an open file of lines behind a header that was read already."""
    path = folder / "lines.txt"
    path.write_text("header\na\nb\nc\n")
    file = path.open()
    assert file.readline() == "header\n"
    return file


def in_memory(_folder):
    """Likewise, in memory."""
    file = io.StringIO("header\na\nb\nc\n")
    file.readline()
    return file


def spooled(_folder):
    """Likewise."""
    file = tempfile.SpooledTemporaryFile(mode="w+")  # noqa: SIM115  # closed with the test
    file.write("header\na\nb\nc\n")
    file.seek(7)
    return file


def named(_folder):
    """Likewise, behind a wrapper."""
    file = tempfile.NamedTemporaryFile(mode="w+")  # noqa: SIM115  # closed with the test
    file.write("header\na\nb\nc\n")
    file.seek(7)
    return file


FILES = [text_file, in_memory, spooled, named]


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("how", ["alone", "in a list"])
async def test_a_file_is_rewound(db, conflict, tmp_path, make, how):
    """To where it was before the first attempt, not to its beginning."""

    @transactional
    async def work(file):
        lines = list(file[0] if isinstance(file, list) else file)
        await conflict()
        write(lines)

    with make(tmp_path) as file:
        await work([file] if how == "in a list" else file)
    assert await notes(db) == ["a", "b", "c"]


@pytest.mark.parametrize("size", [100, 0], ids=["in memory", "on disk"])
async def test_an_upload_is_rewound(db, conflict, size):
    """Starlette's, which FastAPI passes; alone, and in the list of several."""

    def upload(file):
        file.write(b"a\nb\nc\n")
        file.seek(0)
        return UploadFile(file, filename="lines.txt")

    @transactional
    async def work(one, several):
        lines = (await one.read()).splitlines() + (await several[0].read()).splitlines()
        await conflict()
        write([line.decode() for line in lines])

    with tempfile.SpooledTemporaryFile(size) as one, tempfile.SpooledTemporaryFile(size) as another:
        await work(upload(one), several=[upload(another)])
    assert await notes(db) == ["a", "b", "c", "a", "b", "c"]


async def test_an_asynchronous_file_is_rewound(db, conflict, tmp_path):
    """Anyio's, whose methods are coroutines."""
    (tmp_path / "lines.txt").write_text("header\na\nb\nc\n")

    @transactional
    async def work(file):
        lines = [line async for line in file]
        await conflict()
        write(lines)

    async with await anyio.open_file(tmp_path / "lines.txt") as file:
        await file.readline()
        await work(file)
    assert await notes(db) == ["a", "b", "c"]


async def test_a_buffer_that_was_written_to(conflict):
    """It is as it was: what a failed attempt has written is no longer there."""

    @transactional
    async def work(buffer):
        buffer.write("much of attempt 1" if current_unit().attempt == 1 else "two")
        await conflict()

    buffer = io.StringIO("head ")
    buffer.seek(0, io.SEEK_END)
    await work(buffer)
    assert buffer.getvalue() == "head two"


async def test_files_that_cannot_be_rewound(db, conflict):
    """A pipe; a file that the first attempt has closed; either of them in an object."""

    @dataclasses.dataclass
    class Batch:
        file: object

    @transactional
    async def work(file, *, close=False):
        file = file.file if isinstance(file, Batch) else file
        lines = list(file)
        if close:
            file.close()
        await conflict()
        write(lines)

    read, written = os.pipe()
    os.write(written, b"a\nb\n")
    os.close(written)
    message = r"^argument 'file' of work\(\) is a file that cannot be rewound \(BufferedReader\), used up by attempt 1"
    with open(read, "rb") as pipe, pytest.raises(errors.InstanceReuseError, match=message):  # noqa: ASYNC230, PTH123  # a pipe
        await work(pipe)
    message = (
        r"^argument 'file' of work\(\) is a file that attempt 1 has read and that cannot be rewound \(ValueError\)"
    )
    with pytest.raises(errors.InstanceReuseError, match=message):
        await work(io.StringIO("a\n"), close=True)
    message = (
        r"^argument 'file' of work\(\) holds a file that attempt 1 has read and that cannot be rewound \(ValueError\)"
    )
    with pytest.raises(errors.InstanceReuseError, match=message):
        await work(Batch(io.StringIO("a\n")), close=True)
    assert await notes(db) == []


# -- objects of the web


async def test_background_tasks_and_a_response(conflict):
    """They are as before the first attempt: nothing is sent twice; `after_commit` needs no help."""
    sent = []

    @transactional
    async def work(tasks, response):
        tasks.add_task(sent.append, "added")
        after_commit(tasks.add_task, sent.append, "after the commit")
        response.set_cookie("seen", str(current_unit().attempt))
        if current_unit().attempt == 1:
            response.status_code = 418
        await conflict()

    tasks, response = BackgroundTasks(), Response()
    tasks.add_task(sent.append, "before")
    await work(tasks, response=response)
    await tasks()
    assert sent == ["before", "added", "after the commit"]
    assert response.headers.getlist("set-cookie") == ["seen=2; Path=/; SameSite=lax"]
    assert response.status_code == 200


async def test_a_form_that_a_request_keeps(db, conflict):
    """Its uploads are rewound; the parser of forms is not installed here, so the form stands where it would put it."""
    request = Request({"type": "http", "method": "POST", "headers": []})

    @transactional
    async def work(request):
        if request._form is None:
            request._form = FormData([("title", "t"), ("file", UploadFile(io.BytesIO(b"a\nb\n")))])
        lines = (await request._form["file"].read()).splitlines()
        await conflict()
        write([line.decode() for line in lines])

    await work(request)
    assert await notes(db) == ["a", "b"]


class Form(BaseModel):
    """What FastAPI makes of a form."""

    model_config = {"arbitrary_types_allowed": True}
    one: UploadFile
    several: list[UploadFile]


@dataclasses.dataclass
class Record:
    one: UploadFile
    several: list[UploadFile]


class Dependency:
    """A class that FastAPI calls, and whose method may be the transactional function."""

    def __init__(self, one, several):
        self.one, self.several, self.another = one, (), several[0]

    @transactional
    async def work(self, meet):
        """Write what stands in both."""
        lines = (await self.one.read() + await self.another.read()).splitlines()
        await meet()
        write([line.decode() for line in lines])


def uploads():
    """Return two."""
    return [UploadFile(io.BytesIO(text)) for text in (b"a\n", b"b\nc\n")]


@pytest.mark.parametrize("make", [Form, Record], ids=["model", "dataclass"])
async def test_uploads_in_a_form_are_rewound(db, conflict, make):
    """Nobody is told of success with the file of the first attempt missing."""

    @transactional
    async def work(form):
        lines = (await form.one.read() + await form.several[0].read()).splitlines()
        await conflict()
        write([line.decode() for line in lines])

    one, another = uploads()
    await work(make(one=one, several=[another]))
    assert await notes(db) == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["argument", "self"])
async def test_what_a_dependency_holds_is_put_back(db, conflict, how):
    """Of any class, what Starlette has made for the request."""

    @transactional
    async def work(dependency):
        await Dependency.work(dependency, conflict)

    one, another = uploads()
    dependency = Dependency(one, [another])
    await (work(dependency) if how == "argument" else dependency.work(conflict))
    assert await notes(db) == ["a", "b", "c"]


async def test_an_upload_too_deep_to_be_rewound(db, conflict):
    """It is refused, rather than taken for an empty one."""

    @transactional
    async def work(files):
        lines = (await files["there"][0].read()).splitlines()
        await conflict()
        write([line.decode() for line in lines])

    with pytest.raises(errors.InstanceReuseError, match=r"^argument 'files' of work\(\) holds a file"):
        await work({"there": [uploads()[0]]})
    assert await notes(db) == []


async def test_a_mapped_dataclass_is_not_looked_into(db, conflict):
    """What is not loaded in a detached object is nobody's to load for the next attempt."""

    class Own(MappedAsDataclass, DeclarativeBase):
        pass

    class Thing(Own):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(default="")

    thing = Thing(id=1)
    make_transient_to_detached(thing)
    inspect(thing)._expire_attributes(thing.__dict__, ["name"])

    @transactional
    async def work(thing):
        await conflict()
        write([thing.id])

    await work(thing)
    assert await notes(db) == ["1"]
