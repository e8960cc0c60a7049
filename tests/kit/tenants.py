"""A table of two tenants, kept apart by a policy, and a role that it holds for."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ROLE = "uow_clerk"
tenant: ContextVar[str] = ContextVar("tenant")
"""Whose work is being done; unset where nobody has said."""

TOLD = text("SELECT current_setting('app.tenant', true)")
USER = text("SELECT current_user")
PARCELS = text("SELECT tenant, body FROM parcel ORDER BY id")
SEND = text("INSERT INTO parcel (tenant, body) VALUES (:tenant, :body)")

_MINE = "tenant = nullif(current_setting('app.tenant', true), '')"
SETUP = (
    f"DO $$ BEGIN CREATE ROLE {ROLE} LOGIN PASSWORD 'secret'; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    "CREATE TABLE parcel (id serial PRIMARY KEY, tenant text NOT NULL, body text NOT NULL)",
    "ALTER TABLE parcel ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE parcel FORCE ROW LEVEL SECURITY",
    f"CREATE POLICY parcel_tenant ON parcel USING ({_MINE}) WITH CHECK ({_MINE})",
    f"GRANT USAGE ON SCHEMA public TO {ROLE}",
    f"GRANT SELECT, INSERT, UPDATE, DELETE ON parcel TO {ROLE}",
    f"GRANT USAGE ON SEQUENCE parcel_id_seq TO {ROLE}",
    "INSERT INTO parcel (tenant, body) VALUES ('a', 'of a'), ('b', 'of b')",
)


class Tenants(DeclarativeBase):
    """Apart from the tables of the other tests."""


class Parcel(Tenants):
    """What nobody but its tenant may see."""

    __tablename__ = "parcel"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    body: Mapped[str]


async def make_parcels(db: Any) -> None:
    """Make the table with one row of each tenant, and the role."""
    await db.run(*SETUP)


def url_of(db: Any, driver: str | None = None) -> Any:
    """Return where the role connects to."""
    url = make_url(db.url).set(username=ROLE, password="secret")  # noqa: S106  # of a server on this machine, for the time of a test
    return url if driver is None else url.set(drivername=f"postgresql+{driver}")
