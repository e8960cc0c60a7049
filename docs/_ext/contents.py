"""Make the sidebar from the lists of links in index.md, which stays plain Markdown for those who read it on a code forge."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
PAGE = re.compile(r"\]\(([\w/-]+)\.md\)")


def add_contents(_app: Sphinx, name: str, source: list[str]) -> None:
    """Append a hidden table of contents for each section of the first page."""
    if name != "index":
        return
    listed: set[str] = set()
    for title, text in SECTION.findall(source[0]):
        pages = [page for page in dict.fromkeys(PAGE.findall(text)) if page not in listed]
        listed.update(pages)
        if pages:
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.connect("source-read", add_contents)
    return {"parallel_read_safe": True}
