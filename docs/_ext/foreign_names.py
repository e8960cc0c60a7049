"""Where the names of others that our signatures use are explained.

Kept here rather than asked of the others' servers, so that a build does not depend on them; `tox -e links` sees that the
pages are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PYTHON = ("collections.abc", "contextlib", "datetime", "enum", "typing")
ASYNCIO = "https://docs.sqlalchemy.org/en/21/orm/extensions/asyncio.html#sqlalchemy.ext.asyncio."
SQLALCHEMY = "https://docs.sqlalchemy.org/en/21/"
OPENTELEMETRY = "https://opentelemetry-python.readthedocs.io/en/latest/api/"
ALEMBIC = "https://alembic.sqlalchemy.org/en/latest/"
OPENTELEMETRY = "https://opentelemetry-python.readthedocs.io/en/latest/api/"
URLS = {
    "alembic.operations.base.BatchOperations": f"{ALEMBIC}ops.html#alembic.operations.BatchOperations",
    "alembic.operations.base.Operations": f"{ALEMBIC}ops.html#alembic.operations.Operations",
    "AsyncEngine": f"{ASYNCIO}AsyncEngine",
    "CommandError": f"{ALEMBIC}api/commands.html",
    "opentelemetry.metrics.MeterProvider": f"{OPENTELEMETRY}metrics.html#opentelemetry.metrics.MeterProvider",
    "opentelemetry.trace.TracerProvider": f"{OPENTELEMETRY}trace.html#opentelemetry.trace.TracerProvider",
    "sqlalchemy.engine.base.Connection": f"{SQLALCHEMY}core/connections.html#sqlalchemy.engine.Connection",
    "sqlalchemy.engine.interfaces.Dialect": f"{SQLALCHEMY}core/internals.html#sqlalchemy.engine.Dialect",
    "sqlalchemy.exc.InvalidRequestError": f"{SQLALCHEMY}core/exceptions.html#sqlalchemy.exc.InvalidRequestError",
    "sqlalchemy.exc.NoResultFound": f"{SQLALCHEMY}core/exceptions.html#sqlalchemy.exc.NoResultFound",
    "sqlalchemy.ext.asyncio.engine.AsyncEngine": f"{ASYNCIO}AsyncEngine",
    "sqlalchemy.ext.asyncio.scoping.async_scoped_session": f"{ASYNCIO}async_scoped_session",
    "sqlalchemy.ext.asyncio.session.AsyncSession": f"{ASYNCIO}AsyncSession",
    "sqlalchemy.ext.asyncio.session.async_sessionmaker": f"{ASYNCIO}async_sessionmaker",
    "sqlalchemy.orm.exc.StaleDataError": f"{SQLALCHEMY}orm/exceptions.html#sqlalchemy.orm.exc.StaleDataError",
    "sqlalchemy.sql.schema.MetaData": f"{SQLALCHEMY}core/metadata.html#sqlalchemy.schema.MetaData",
    "sqlalchemy.sql.schema.Table": f"{SQLALCHEMY}core/metadata.html#sqlalchemy.schema.Table",
    "sqlalchemy.sql.sqltypes.DateTime": f"{SQLALCHEMY}core/type_basics.html#sqlalchemy.types.DateTime",
    "sqlalchemy.sql.type_api.TypeDecorator": f"{SQLALCHEMY}core/custom_types.html#sqlalchemy.types.TypeDecorator",
    "sqlalchemy.sql.type_api.TypeEngine": f"{SQLALCHEMY}core/type_api.html#sqlalchemy.types.TypeEngine",
}


def url_of(name: str) -> str | None:
    """Return the address of a name, None where it is nobody's that we know."""
    module = name.rpartition(".")[0]
    if module in PYTHON:
        return f"https://docs.python.org/3/library/{module}.html#{name}"
    return URLS.get(name)


def refer(_app: Sphinx, _env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement) -> nodes.reference | None:
    """Make a link of a name that is not ours."""
    url = url_of(node["reftarget"]) if node.get("refdomain") == "py" else None
    return url and nodes.reference("", "", shown, internal=False, refuri=url)


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.connect("missing-reference", refer)
    return {"parallel_read_safe": True}
