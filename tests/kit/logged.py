"""What the library has logged: the text for people, and the fields that who collects logs relies on."""

from __future__ import annotations


def logged(caplog):
    """Return the level, the text and the fields of each record."""
    return [
        (record.levelname, record.getMessage(), fields_of(record))
        for record in caplog.records
        if record.name == "sqla_uow"
    ]


def fields_of(record):
    """Return our fields of a record, without their prefix."""
    return {name.removeprefix("uow_"): value for name, value in vars(record).items() if name.startswith("uow_")}
