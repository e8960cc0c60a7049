"""The log of the library: one place that writes it, so that each record carries its facts as fields too."""

from __future__ import annotations

import logging

__all__ = ["log"]

logger = logging.getLogger("sqla_uow")


def log(level: int, message: str, /, *args: object, exc_info: BaseException | None = None, **fields: object) -> None:
    """Write a record whose `fields` are attributes of it, each with the prefix ``uow_``; free where the level is off.

    Args:
        level: of `logging`.
        message: with ``%`` for `args`.
        args: of the message.
        exc_info: whose traceback is to be shown.
        fields: see the table of log fields in the docs; None is left out, an exception becomes the name of its class.
    """
    if logger.isEnabledFor(level):
        extra = {f"uow_{name}": _plain(value) for name, value in fields.items() if value is not None}
        logger.log(level, message, *args, exc_info=exc_info, extra=extra, stacklevel=2)


def _plain(value: object) -> object:
    """Return what a formatter of JSON can write; never the text of an error, which may have SQL in it."""
    if isinstance(value, str):
        return str(value)  # a name that is found late
    return type(value).__name__ if isinstance(value, BaseException) else value
