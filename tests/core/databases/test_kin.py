"""What databases have to do with each other: who may be the replica of whom, and how far it is."""

from __future__ import annotations

from sqla_uow._databases.mariadb import MariaDB, MySQL
from sqla_uow._databases.postgresql import PostgreSQL
from sqla_uow._databases.system import System


def test_who_may_replicate_whom():
    """MySQL's dialect leads to MariaDB as well; databases that nothing is known of are no kin of each other."""
    assert MySQL().is_kin_to(MariaDB())
    assert not MySQL().is_kin_to(PostgreSQL())
    assert System("oracle").is_kin_to(System("oracle"))
    assert not System("oracle").is_kin_to(System("mssql"))


def test_how_far_a_replica_is():
    """PostgreSQL's position is one number in two parts; MariaDB's has one for each domain."""
    assert PostgreSQL().read_position("16/B374D848") == {0: 0x16_B374_D848}
    assert MariaDB().read_position("0-1-123,7-12-5") == {0: 123, 7: 5}
