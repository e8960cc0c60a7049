"""What to say of a load that nobody asked for, or that was repeated: what to write instead, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from greenlet import getcurrent

from sqla_uow._session.load_origin import Cause, Origin
from sqla_uow.errors import LazyLoadError

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["NO_WAITING", "CodeLine", "code_line_of", "refusal", "repeated"]

NO_WAITING = "an attribute cannot wait for the database"


class CodeLine(NamedTuple):
    """A line of the user's code, as `warnings.warn_explicit` wants it."""

    filename: str
    lineno: int
    module: str
    registry: dict[Any, Any]


def code_line_of(frame: FrameType | None) -> CodeLine | None:
    """Return the first caller outside SQLAlchemy and this package; None if a task runs SQLAlchemy's own code.

    Args:
        frame: where to begin.  Under asyncio it may be in a greenlet; the code that awaits it is in the parent.
    """
    greenlet = getcurrent()
    while True:
        while frame is not None:
            module: str = frame.f_globals.get("__name__", "")
            package = module.partition(".")[0]
            if package == "asyncio":
                return None
            if package not in ("sqlalchemy", "sqla_uow", "sqla_uow_starlette"):
                registry = frame.f_globals.setdefault("__warningregistry__", {})
                return CodeLine(frame.f_code.co_filename, frame.f_lineno, module, registry)
            frame = frame.f_back
        assert greenlet.parent is not None  # what runs the loop is in the first one
        greenlet = greenlet.parent
        frame = greenlet.gr_frame


# -- what is said


def refusal(origin: Origin, why: str) -> LazyLoadError:
    """Return the error for an attribute that is not loaded.

    Args:
        origin: of the load.
        why: it is not loaded now.
    """
    assert origin.mapper is not None
    name, attribute = origin.mapper.class_.__name__, f"{origin.mapper.class_.__name__}.{origin.names[0]}"
    refresh = f"await session.refresh({name.lower()}, [{origin.names[0]!r}])"
    if origin.cause is Cause.EXPIRED:
        return LazyLoadError(f"{attribute} is expired, and {why}; {refresh} first", attribute=attribute)
    option = _option(origin)
    return LazyLoadError(
        f"{attribute} is not loaded, and {why}; add {_options(origin)}, or {refresh} first",
        attribute=attribute,
        option=option,
    )


def repeated(origin: Origin, times: int, unit: str, place: CodeLine | None) -> str:
    """Return the warning for a SELECT that was repeated."""
    where = "" if place is None else f", at {place.filename}:{place.lineno}"
    if origin.cause is Cause.SELECT:
        what = "the same SELECT" if origin.mapper is None else f"the same SELECT of {origin.mapper.class_.__name__}"
        return (
            f"{what} was sent {times} times in {unit}{where}; read all of them with one statement, "
            "for example with in_()"
        )
    what, instead = _words(origin)
    return f"{what} {times} times in {unit}, one object at a time{where}; {instead}"


_VERBS = {
    Cause.RELATIONSHIP: "was loaded",
    Cause.COLUMN: "was loaded",
    Cause.SUBCLASS: "was loaded",
    Cause.EXPIRED: "was expired and loaded again",
    Cause.REFRESH: "was refreshed",
    Cause.KEY: "was read by its key",
}


def _words(origin: Origin) -> tuple[str, str]:
    """Return what was done, and what to do instead."""
    assert origin.mapper is not None
    name, verb = origin.mapper.class_.__name__, _VERBS[origin.cause]
    if origin.path or origin.base is not None:
        return f"{name}.{origin.names[0]} {verb}", f"add {_options(origin)}"
    again = "" if origin.cause is Cause.KEY else ".execution_options(populate_existing=True)"
    return f"{name} {verb}", f"read them with one select({name}).where({_key_in(origin.mapper)}){again}"


def _key_in(mapper: Any) -> str:
    names = [f"{mapper.class_.__name__}.{mapper.get_property_by_column(column).key}" for column in mapper.primary_key]
    return f"{names[0]}.in_(...)" if len(names) == 1 else f"tuple_({', '.join(names)}).in_(...)"


def _options(origin: Origin) -> str:
    first = _steps(origin)[0][0] if origin.path else _name_of(origin.base)
    return f".options({_option(origin)}) to the statement that loads {first}"


def _option(origin: Origin) -> str:
    """Return the loader option as the user would write it, beginning at the first entity of the statement."""
    subclass = f"[{_name_of(origin.mapper)}]"
    if origin.cause is Cause.SUBCLASS and not origin.path:
        return f"selectin_polymorphic({_name_of(origin.base)}, {subclass})"
    steps = _steps(origin)
    if origin.cause is Cause.SUBCLASS:
        path = ".".join(f"selectinload({entity}.{attribute})" for entity, attribute in steps)
        return f"{path}.selectin_polymorphic({subclass})"
    *before, (_entity, last) = [(entity, f"{entity}.{attribute}") for entity, attribute in steps]
    if origin.cause is Cause.COLUMN:
        return ".".join([*(f"defaultload({attribute})" for _, attribute in before), f"undefer({last})"])
    if before and all(attribute == last for _, attribute in before):  # down a tree
        return f"selectinload({last}, recursion_depth=-1)"
    return ".".join(f"selectinload({attribute})" for attribute in [*(attribute for _, attribute in before), last])


def _name_of(mapper: Any) -> str:
    name: str = mapper.class_.__name__
    return name


def _steps(origin: Origin) -> list[tuple[str, str]]:
    """Return class and attribute of each step of the path."""
    entities, attributes = origin.path[::2], origin.path[1::2]
    return [
        (entity.mapper.class_.__name__, f"{attribute.key}{_narrowed(attribute, following)}")
        for entity, attribute, following in zip(entities, attributes, [*entities[1:], None], strict=True)
    ]


def _narrowed(attribute: Any, following: Any) -> str:
    """Return what to add if the next step begins at a subclass."""
    if following is None or following.mapper is attribute.mapper:
        return ""
    return f".of_type({following.mapper.class_.__name__})"
