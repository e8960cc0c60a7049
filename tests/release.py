"""Follow the tutorials on the wheel of a release: `python -m tests.release FOLDER`, with the wheel in that folder.

The environment is new and has nothing but what the pages have installed.  So a file that the wheel lacks, or a dependency that
its metadata does not name, is noticed.  `tox -e release` builds the wheel and calls this; it needs the package index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.docs.reader import Reader

CHECKOUT = Path(__file__).parents[1]
TUTORIALS = (("tutorials/first-unit.md",), ("tutorials/web.md", "tutorials/testing.md"))
"""Pages of one folder each, in order."""


def follow(wheel: Path, pages: tuple[str, ...]) -> None:
    """Go through pages in a new environment, where ``pip install sqla-uow`` means this wheel."""
    with TemporaryDirectory() as place, ExitStack() as stack:
        own = Path(place, "environment")
        venv.create(own, with_pip=True)
        # Without what it needs: that, and the extras, the pages' own `pip install` finds in its metadata.
        subprocess.run([own / "bin/pip", "install", "--quiet", "--no-deps", wheel], check=True)
        folder = Path(place, "reader")
        folder.mkdir()
        reader = Reader(folder, stack, own / "bin", {})
        for page in pages:
            reader.follow(CHECKOUT / "docs" / page)
            reader.check()


def dead_links() -> list[str]:
    """Return the README's links that lead to files of the checkout: on a package index they lead nowhere."""
    return re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", (CHECKOUT / "README.md").read_text())


def main() -> None:
    """Follow all tutorials; the first thing that differs is an error."""
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    for pages in TUTORIALS:
        follow(wheel, pages)
        print(f"{wheel.name}: followed {', '.join(pages)}")  # noqa: T201  # what it is for
    if links := dead_links():
        print(  # noqa: T201  # likewise
            f"not ready for a package index: {len(links)} links of README.md are relative, {links[0]} for one; put the address of "
            "the repository before them, and into project_urls of setup.cfg"
        )


if __name__ == "__main__":
    main()
