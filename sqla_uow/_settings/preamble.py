"""What one transaction is told before the first statement of the user, and what those who join it may ask for."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from sqla_uow.errors import PropagationError, SettingMissingError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqla_uow._settings.sources import Layer, Sources, Told

__all__ = ["Preamble", "check_join"]


class Preamble:
    """What one transaction is told first.

    Args:
        sources: where its settings came from.
        told: its settings, as they were when its unit was opened.
        unit: which it is for.

    Attributes:
        before: awaited before a connection is taken: what came before this one may hold it.
    """

    __slots__ = ("_sources", "_unit", "before", "told")

    def __init__(self, sources: Sources, told: Told, unit: object) -> None:
        self._sources = sources
        # Weak: the unit has its transaction, which has this.
        self._unit: weakref.ref[Any] | None = None if sources.on_begin is None else weakref.ref(unit)
        self.told: Told = told
        self.before: Callable[[], Awaitable[None]] | None = None

    @property
    def has_hook(self) -> bool:
        """Whether the manager has an `on_begin`."""
        return self._sources.on_begin is not None

    def hook(self) -> Awaitable[object] | None:
        """Call the manager's `on_begin`, and return what is to be awaited; None if there is nothing."""
        unit = None if self._unit is None else self._unit()
        on_begin = self._sources.on_begin
        return None if unit is None or on_begin is None else on_begin(unit)

    def differing(self, who: str, layer: Layer | None = None) -> list[str]:
        """Ask again, and return the names whose values are others, or missing, here and now."""
        sources = self._sources.under(layer, who)
        try:
            others = sources.ask(who)
        except SettingMissingError as error:
            return [error.name]
        told = self.told
        return (
            []
            if others == told
            else [name for name in others.keys() | told.keys() if others.get(name) != told.get(name)]
        )


def check_join(preamble: Preamble | None, layer: Layer | None, who: str, joined: str) -> None:
    """Refuse a call that would run with the settings of somebody else.

    Args:
        preamble: of the unit that is open; None if it was told nothing.
        layer: what the call itself asks for.
        who: calls.
        joined: the name of the unit.

    Raises:
        PropagationError: naming the settings, without their values.
    """
    if preamble is None:
        names = [] if layer is None else list(layer() if callable(layer) else layer)
    else:
        names = preamble.differing(who, layer)
    if names:
        which = ", ".join(map(repr, sorted(names)))
        raise PropagationError(
            f"{who} asks for another value of {which} than {joined}, which it joins, was begun with; call it outside, or use "
            "propagation='requires_new'"
        )
