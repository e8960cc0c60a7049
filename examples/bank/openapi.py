"""The OpenAPI document: the same fields that `web` reads, and what it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from examples.bank.fields import AFTER, AMOUNT, CREDIT, LIMIT, NAME, NUMBER, ON_DUTY, REFERENCE, Flag, Text, Whole

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DOCUMENT"]

_JSON = "application/json"


def _object(**fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


_EXAMPLE: Final = {
    "owner": "Ada",
    "credit": 50_00,
    "source": 1,
    "target": 2,
    "amount": 5,
    "reference": "tea",
    "on_duty": True,
}
_INTEGER: Final = {"type": "integer"}
_TEXT: Final = {"type": "string"}
_ACCOUNT = _object(id=_INTEGER, owner=_TEXT, credit=_INTEGER, balance=_INTEGER, version=_INTEGER)
_ENTRY = _object(
    id=_INTEGER,
    source={"type": ["integer", "null"]},
    target=_INTEGER,
    amount=_INTEGER,
    reference=_TEXT,
    at={"type": "string", "format": "date-time"},
)
_CLERK = _object(number=_INTEGER, on_duty={"type": "boolean"})
_LETTER = _object(entry=_INTEGER, to=_TEXT, text=_TEXT)
_PROBLEM = {
    "type": "object",
    "properties": {"title": _TEXT, "status": _INTEGER, "detail": _TEXT},
    "required": ["title", "status"],
}
_ETAG = {"etag": {"schema": _TEXT, "description": "names this version of the account"}}
_ACCOUNTS_THERE_ARE = {"examples": [1, 2]}
_NUMBER: Final = {"name": "number", "in": "path", "required": True, "schema": NUMBER.schema() | _ACCOUNTS_THERE_ARE}


def _header(name: str, description: str, *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": required, "schema": _TEXT, "description": description}


def _body(**fields: Flag | Text | Whole) -> dict[str, Any]:
    schema = _object(**{name: field.schema() for name, field in fields.items()})
    schema["examples"] = [{name: example for name, example in _EXAMPLE.items() if name in fields}]
    schema["required"] = [name for name, field in fields.items() if field.default is None]
    return {"required": True, "content": {_JSON: {"schema": schema}}}


def _answer(schema: Mapping[str, Any], headers: Mapping[str, Any] | None = None, kind: str = _JSON) -> dict[str, Any]:
    return {"description": "done", "content": {kind: {"schema": schema}}, "headers": headers or {}}


def _problems(*statuses: int) -> dict[str, Any]:
    said = {"description": "a problem", "content": {"application/problem+json": {"schema": _PROBLEM}}}
    return {str(status): said for status in (*statuses, 503)}  # 503: the database was too busy, or away


_READ_BODY = (400, 413, 415, 422)

_ACCOUNTS = {
    "get": {
        "operationId": "list_accounts",
        "parameters": [
            {"name": "after", "in": "query", "schema": AFTER.schema()},
            {"name": "limit", "in": "query", "schema": LIMIT.schema()},
        ],
        "responses": {"200": _answer({"type": "array", "items": _ACCOUNT}), **_problems(422)},
    },
    "post": {
        "operationId": "open_account",
        "requestBody": _body(owner=NAME, credit=CREDIT),
        "responses": {"201": _answer(_ACCOUNT, _ETAG), **_problems(*_READ_BODY)},
    },
}
_ONE_ACCOUNT = {
    "parameters": [_NUMBER],
    "get": {
        "operationId": "get_account",
        "parameters": [_header("If-None-Match", "the etag of the version that the client has")],
        "responses": {
            "200": _answer(_ACCOUNT, _ETAG),
            "304": {"description": "the client has this version"},
            **_problems(400, 404, 412),
        },
    },
    "put": {
        "operationId": "put_account",
        "parameters": [_header("If-Match", "the etag of the version that the client has seen", required=True)],
        "requestBody": _body(owner=NAME, credit=CREDIT),
        "responses": {"200": _answer(_ACCOUNT, _ETAG), **_problems(*_READ_BODY, 404, 409, 412, 428)},
    },
}
_STATEMENT = {
    "parameters": [_NUMBER],
    "get": {
        "operationId": "statement",
        "responses": {"200": _answer(_TEXT, kind="application/x-ndjson"), **_problems(404)},
    },
}
_DEPOSITS = {
    "parameters": [_NUMBER],
    "post": {
        "operationId": "deposit",
        "requestBody": _body(amount=AMOUNT, reference=REFERENCE),
        "responses": {"201": _answer(_ENTRY), **_problems(*_READ_BODY, 404)},
    },
}
_TRANSFERS = {
    "post": {
        "operationId": "transfer",
        "parameters": [_header("Idempotency-Key", "sent again with the same key, a transfer is not made again")],
        "requestBody": _body(source=NUMBER, target=NUMBER, amount=AMOUNT, reference=REFERENCE),
        "responses": {"201": _answer(_ENTRY), **_problems(*_READ_BODY, 404, 409, 500)},
    }
}
_CLERKS = {
    "get": {
        "operationId": "list_clerks",
        "responses": {"200": _answer({"type": "array", "items": _CLERK}), **_problems()},
    }
}
_ONE_CLERK = {
    "parameters": [_NUMBER],
    "put": {
        "operationId": "put_clerk",
        "requestBody": _body(on_duty=ON_DUTY),
        "responses": {"200": _answer(_CLERK), **_problems(*_READ_BODY, 404, 409)},
    },
}
_LETTERS = {
    "get": {
        "operationId": "letters",
        "responses": {"200": _answer({"type": "array", "items": _LETTER}), **_problems()},
    }
}

DOCUMENT: Final[Mapping[str, Any]] = {
    "openapi": "3.1.0",
    "info": {"title": "The bank of sqla-uow", "version": "1", "description": "Amounts are in cents."},
    "paths": {
        "/accounts": _ACCOUNTS,
        "/accounts/{number}": _ONE_ACCOUNT,
        "/accounts/{number}/statement": _STATEMENT,
        "/accounts/{number}/deposits": _DEPOSITS,
        "/transfers": _TRANSFERS,
        "/clerks": _CLERKS,
        "/clerks/{number}": _ONE_CLERK,
        "/letters": _LETTERS,
    },
}
"""What ``GET /openapi.json`` answers."""
