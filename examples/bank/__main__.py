"""``python -m examples.bank``."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = {
    "sqlalchemy": "-e '.[alembic,sqlite,starlette]'",
    "greenlet": "-e '.[alembic,sqlite,starlette]'",
    "alembic": "-e '.[alembic,sqlite,starlette]'",
    "starlette": "-e '.[alembic,sqlite,starlette]'",
    "httpx": "httpx",
    "rich": "rich",
    "uvicorn": "uvicorn",
    "websockets": "websockets",
}

for _module, _what in _NEEDED.items():
    if importlib.util.find_spec(_module) is None:
        print(f"python -m examples.bank: {_module} is not installed; pip install {_what}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    try:
        from examples.bank.runner.run import main

        status = main()
    except KeyboardInterrupt:  # before it could begin
        status = 130
    sys.exit(status)
