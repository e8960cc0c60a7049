"""Where the settings of transactions come from: checked where they are written, asked when a unit is opened.

No message names a value: it may be a secret, or tell of somebody's customers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from sqla_uow._tasks.callables import called
from sqla_uow.errors import SettingMissingError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from sqla_uow.typing import Settings, SettingSource

__all__ = ["NONE", "ROLE", "Sources", "Told", "check_hook", "layer_of", "names_of"]

ROLE = "role"
"""The name under which a role stands among the settings; theirs have a dot."""

# https://www.postgresql.org/docs/current/runtime-config-custom.html; these need no quotes anywhere.
_NAME = re.compile(r"[a-z_][a-z0-9_$]*(?:\.[a-z_][a-z0-9_$]*)+")

Layer: TypeAlias = "Mapping[str, Any] | Callable[[], Mapping[str, Any]]"


class Told(dict[str, str]):
    """What a transaction is told: names and values.  Only the names are shown."""

    def __repr__(self) -> str:
        return f"<settings {', '.join(self)}>"


class Sources:
    """Where the settings of one call come from: its manager's, over which lie those of a scope, over which lie its own.

    Args:
        layers: the lower come first.
        optional: the names of settings that may be missing.
        on_begin: is called after the settings were made.
        declared: all names that the manager has settings for; none if it has none.
    """

    __slots__ = ("_declared", "_layers", "_optional", "on_begin")

    def __init__(
        self,
        layers: tuple[Layer, ...] = (),
        *,
        optional: frozenset[str] = frozenset(),
        on_begin: Callable[[Any], Awaitable[object]] | None = None,
        declared: frozenset[str] = frozenset(),
    ) -> None:
        self._layers = layers
        self._optional = optional
        self.on_begin: Callable[[Any], Awaitable[object]] | None = on_begin
        self._declared = declared

    @classmethod
    def of(
        cls,
        settings: Settings | None,
        optional: object,
        role: SettingSource | None,
        on_begin: Callable[[Any], Awaitable[object]] | None,
        who: str,
    ) -> Sources | None:
        """Check what a manager was given; return None if that is nothing."""
        if settings is not None and not isinstance(settings, Mapping):
            raise TypeError(f"{who} has settings of type {type(settings).__name__}; pass a dict of names and values")
        layer = cast("Mapping[str, Any]", layer_of(settings, role, who, for_all=True) or {})
        maybe = names_of(optional, who)
        check_hook(on_begin, who)
        if not layer and not maybe and on_begin is None:
            return None
        names = frozenset(layer) - {ROLE} | maybe
        return cls((layer,) if names or layer else (), optional=maybe, on_begin=on_begin, declared=names)

    @property
    def names(self) -> frozenset[str]:
        """The names of its manager's settings."""
        return self._declared

    @property
    def tells(self) -> bool:
        """Whether there are settings, or a role."""
        return bool(self._layers)

    def under(self, layer: Layer | None, who: str) -> Sources:
        """Return these with another layer over them.

        Raises:
            ValueError: it has a name that the manager does not know.
        """
        if layer is None:
            return self
        if not callable(layer):
            self._check_known(layer, who)
        return Sources((*self._layers, layer), optional=self._optional, on_begin=self.on_begin, declared=self._declared)

    def ask(self, who: str) -> Told:
        """Ask for all values, as they are now and here.

        Raises:
            SettingMissingError: one that is required is not there.
            TypeError, ValueError: one cannot be a value.
        """
        if not self._layers:
            return Told()
        sources: dict[str, Any] = dict.fromkeys(self._optional, "")
        for layer in self._layers:
            if callable(layer):
                found = layer()
                self._check_known(found, who)
                sources.update(found)
            else:
                sources.update(layer)
        told = Told()
        role = sources.pop(ROLE, None)
        for name, source in sources.items():
            told[name] = self._value(name, source, who)
        if role is not None:  # last: the role may not be allowed to do what the login is
            told[ROLE] = self._value(ROLE, role, who)
        return told

    def _check_known(self, names: Iterable[str], who: str) -> None:
        """Refuse a name that is nearly one of the manager's: what it was meant to override would stay as it is."""
        declared = self._declared
        unknown = [name for name in names if name not in declared and name != ROLE] if declared else []
        if unknown:
            raise ValueError(
                f"{who} has a setting {unknown[0]!r} that its manager does not have; use {_listed(sorted(declared))}, or "
                "name it in optional_settings of UnitOfWorkManager"
            )

    def _value(self, name: str, source: Any, who: str) -> str:
        if type(source) is str:
            return source
        if source is None:  # written out at this call
            return NONE if name == ROLE else ""
        try:
            value: object = source()
        except LookupError as error:  # of a ContextVar, too
            missing: LookupError | None = error
            value = None
        else:
            missing = None
        if value is None:
            if name in self._optional:
                return ""
            raise SettingMissingError(_missing(name, who), name=name) from missing
        return check_value(name, value, who)


NONE = "none"
"""The role that is the login's own, as SQL has it."""


def _nothing() -> None:
    return None


def _missing(name: str, who: str) -> str:
    if name == ROLE:
        return f"{who} has no role: what gives it has nothing to give here; set it before the unit is opened, or pass role="
    return (
        f"{who} has no value for the setting {name!r}: what gives it has nothing to give here; set it before the unit is opened, "
        f"pass settings={{{name!r}: ...}}, or name it in optional_settings"
    )


def _listed(names: list[str]) -> str:
    return " or ".join(map(repr, names))


# -- for callers without a type checker; so the arguments are `object` on purpose


def names_of(names: object, who: str) -> frozenset[str]:
    """Check the names of settings that may be missing."""
    if isinstance(names, str) or not isinstance(names, (tuple, list, set, frozenset)):
        raise TypeError(
            f"{who} has optional_settings of type {type(names).__name__}; pass several names, as ('app.user',)"
        )
    return frozenset(check_name(name, who) for name in cast("Iterable[object]", names))


def layer_of(
    settings: Settings | Callable[[], Settings] | None,
    role: SettingSource | None,
    who: str,
    *,
    constants: bool = False,
    for_all: bool = False,
) -> Layer | None:
    """Check what was written, and return it as one layer; None if there is nothing.

    Args:
        settings: names and where their values come from, or a function that returns that.
        role: likewise.
        who: has it, for the message.
        constants: functions are refused.
        for_all: it is for all units of a manager, so that None says nothing.

    Raises:
        TypeError, ValueError: it cannot work.
    """
    if callable(settings):
        if constants:
            raise TypeError(
                f"{who} has a function as settings; pass constants there, and functions to UnitOfWorkManager"
            )
        _check_sync(settings, f"settings of {who}")
        find: Callable[[], Settings] = settings
        own_role = _role_of(role, who, constants=constants)
        return lambda: _found(find(), who) | own_role
    layer = {} if settings is None else checked(settings, who, constants=constants, for_all=for_all)
    return (layer | _role_of(role, who, constants=constants)) or None


def _role_of(role: object, who: str, *, constants: bool) -> dict[str, Any]:
    return {} if role is None else {ROLE: check_source(ROLE, role, who, constants=constants)}


def _found(settings: object, who: str) -> dict[str, Any]:
    """Check what a function says that the settings are; what it gives as None is missing, like any function's."""
    return {name: _nothing if source is None else source for name, source in checked(settings, who).items()}


def checked(settings: object, who: str, *, constants: bool = False, for_all: bool = False) -> dict[str, Any]:
    """Return a copy of what was written, with the names as the server compares them."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"{who} has settings of type {type(settings).__name__}; pass a dict of names and values")
    copy: dict[str, Any] = {}
    for key, source in cast("Mapping[object, object]", settings).items():
        name = check_name(key, who)
        copy[name] = check_source(name, source, who, constants=constants, for_all=for_all)
    return copy


def check_name(name: object, who: str) -> str:
    """Refuse what the server would not take for the name of a setting of the application."""
    if not isinstance(name, str):
        raise TypeError(f"{who} has {type(name).__name__} for the name of a setting; use a string such as 'app.tenant'")
    if "." not in name:
        raise ValueError(
            f"{who} has a setting {name!r}, whose name has no dot; use one such as 'app.{name or 'tenant'}'"
        )
    if _NAME.fullmatch(name.lower()) is None:
        raise ValueError(
            f"{who} has a setting {name!r}, which is no name of a setting; use letters, digits and '_' around the dot"
        )
    return name.lower()


def check_source(name: str, source: Any, who: str, *, constants: bool = False, for_all: bool = False) -> Any:
    """Refuse what can never be a value."""
    if source is None and not for_all:
        return None
    if callable(source):
        if constants:
            raise TypeError(
                f"{who} has a function for {name!r}; pass a constant there, and the function to UnitOfWorkManager"
            )
        _check_sync(source, f"{name!r} of {who}")
        return source
    return check_value(name, source, who)


def check_value(name: str, value: object, who: str) -> str:
    """Refuse what the server could not take for a value; before it says so, with the value in its message."""
    if not isinstance(value, str):
        remedy = "name it in optional_settings if it may be missing" if value is None else "use a str"
        if inspect.iscoroutine(value):
            value.close()  # nobody will await it
            remedy = "use a plain function, and look up beforehand what it has to know"
        raise TypeError(f"{who} has {type(value).__name__} as the value of {name!r}; {remedy}")
    if "\0" in value or not (value.isascii() or _is_unicode(value)):
        raise ValueError(
            f"{who} has a value of {name!r} that PostgreSQL cannot store; use text without NUL and surrogates"
        )
    if name == ROLE and not value:
        raise ValueError(f"{who} has an empty role; use the name of a role, or 'none' for the login's own")
    return str(value)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_sync(function: Any, what: str) -> None:
    if _is_async(function):
        raise TypeError(f"{what} is async; use a plain function, and look up beforehand what it has to know")


def check_hook(hook: Any, who: str) -> None:
    """Refuse what cannot be awaited with a unit."""
    if hook is not None and not _is_async(hook):
        raise TypeError(f"{who} has an on_begin that is no 'async def' function; write 'async def hook(unit): ...'")


def _is_async(function: Any) -> bool:
    return any(map(inspect.iscoroutinefunction, called(function)))
