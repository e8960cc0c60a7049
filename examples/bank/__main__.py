"""``python -m examples.bank``."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = {"sqlalchemy": "-e '.[sqlite]'", "greenlet": "-e '.[sqlite]'", "rich": "rich"}

for _module, _what in _NEEDED.items():
    if importlib.util.find_spec(_module) is None:
        sys.exit(f"python -m examples.bank: {_module} is not installed; pip install {_what}")

if __name__ == "__main__":
    from examples.bank.run import main

    sys.exit(main())
