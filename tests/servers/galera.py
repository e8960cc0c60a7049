"""A Galera cluster: MariaDB servers that certify each other's transactions."""

import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from . import machine
from .keeper import ENVIRONMENT, Keeper
from .mariadb import MariaDB
from .server import Argv, ServerError

_PROVIDERS = (
    "/usr/lib/galera/libgalera_smm.so",
    "/usr/lib64/galera-4/libgalera_smm.so",
    "/usr/lib64/galera/libgalera_smm.so",
)
_JOIN_TIMEOUT = 60.0  # s; 4 to 5 s with a state transfer by rsync


class Node(MariaDB):
    """One node; made by `Cluster`.

    Args:
        number: From 0.
    """

    name = "Galera"

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.group_port = machine.free_port()
        self.founding = False
        self.members: list[Node] = []

    def state(self) -> str:
        """Return the server's word for how the node stands in the cluster, "Synced" if well."""
        return self.execute("SHOW STATUS LIKE 'wsrep_local_state_comment'").partition("\t")[2]

    def bootstrap(self) -> None:
        """Make what is left of the cluster go on though it is a minority."""
        self.execute("SET GLOBAL wsrep_provider_options='pc.bootstrap=YES'")

    @classmethod
    def _missing(cls) -> str | None:
        if not any(Path(provider).exists() for provider in _PROVIDERS):
            return "libgalera_smm.so not found; Debian: apt-get install galera-4"
        if shutil.which("rsync", path=ENVIRONMENT["PATH"]) is None:
            return "rsync not found on PATH; Debian: apt-get install rsync"
        return super()._missing()

    def _serve(self, data: Path) -> Argv:
        provider = next(provider for provider in _PROVIDERS if Path(provider).exists())
        addresses = ",".join(f"{machine.HOST}:{node.group_port}" for node in self.members)
        options = {
            "gmcast.listen_addr": f"tcp://{machine.HOST}:{self.group_port}",
            "ist.recv_addr": f"{machine.HOST}:{machine.free_port()}",
            "gcache.size": "16M",
            "pc.recovery": "false",
            # a dead node is missed after two seconds instead of five
            "evs.keepalive_period": "PT0.5S",
            "evs.suspect_timeout": "PT2S",
            "evs.inactive_timeout": "PT6S",
            "evs.install_timeout": "PT6S",
        }
        self.settings = {
            "binlog_format": "ROW",
            "innodb_autoinc_lock_mode": "2",
            "wsrep_on": "ON",
            "wsrep_provider": provider,
            "wsrep_provider_options": ";".join(f"{name}={value}" for name, value in options.items()),
            "wsrep_cluster_name": "uow",
            "wsrep_cluster_address": "gcomm://" if self.founding else f"gcomm://{addresses}",
            "wsrep_node_name": f"node{self.number}",
            "wsrep_node_address": machine.HOST,
            "wsrep_node_incoming_address": f"{machine.HOST}:{self.port}",
            "wsrep_sst_method": "rsync",
            "wsrep_sst_receive_address": f"{machine.HOST}:{machine.free_port()}",
        }
        return [*super()._serve(data), *(["--wsrep-new-cluster"] if self.founding else [])]

    def _launch(self, keeper: Keeper) -> None:
        super()._launch(keeper)
        self.founding = False  # whoever restarts it wants it back in the cluster that goes on
        deadline = time.monotonic() + _JOIN_TIMEOUT
        while self.state() != "Synced":
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} node {self.number} did not join in {_JOIN_TIMEOUT} s")
            time.sleep(0.05)


class Cluster:
    """Three nodes on this machine; a context manager that starts and stops them.

    Args:
        size: How many nodes.
    """

    def __init__(self, size: int = 3) -> None:
        self.nodes = [Node(number) for number in range(size)]
        for node in self.nodes:
            node.members = self.nodes

    def __enter__(self) -> Self:
        self.nodes[0].founding = True
        try:
            for node in self.nodes:
                node.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop them all."""
        for node in reversed(self.nodes):
            node.stop()
