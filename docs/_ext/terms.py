"""Link the first mention of each term of the glossary, on every page: the pages stay plain text for those who read it elsewhere.

What `{term}` would do, without a mark in the source.  Only in running text, never in headings, tables, links or code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx

GLOSSARY = "reference/glossary"
TERM = re.compile(r"^(\w[^\n]*)$", re.MULTILINE)  # what explains it is indented
OWN = re.compile(r"```\{glossary\}\n(.*?)^```", re.MULTILINE | re.DOTALL)


def terms(folder: Path) -> list[str]:
    """Return the terms of the glossary, the longest first."""
    (text,) = OWN.findall((folder / f"{GLOSSARY}.md").read_text())
    return sorted(TERM.findall(text), key=len, reverse=True)


def link(word: str, term: str, page: str) -> nodes.Node:
    """Return a word that leads to its term."""
    shown = nodes.inline("", word, classes=["xref", "std", "std-term"])
    options = {"refdomain": "std", "reftype": "term", "reftarget": term, "refdoc": page, "refwarn": True}
    return addnodes.pending_xref("", shown, refexplicit=True, **options)


class LinkTerms(SphinxTransform):
    """Do so for one page."""

    default_priority = 500

    def apply(self, **_options: object) -> None:
        """Look through the running text for terms that were not met yet."""
        left = [] if self.env.docname == GLOSSARY else terms(Path(self.app.srcdir))
        for text in list(self.document.findall(nodes.Text)):
            if left and isinstance(text.parent, nodes.paragraph) and not isinstance(text.parent.parent, nodes.entry):
                pieces = list(self.pieces(text.astext(), left))
                if len(pieces) > 1:
                    text.parent.replace(text, pieces)

    def pieces(self, text: str, left: list[str]) -> list[nodes.Node]:
        """Cut a text at the terms in it; take them from those that are left."""
        found: list[nodes.Node] = []
        while match := re.search(rf"\b({'|'.join(map(re.escape, left))})s?\b", text, re.IGNORECASE) if left else None:
            term = match[1].lower()
            left.remove(term)
            found += [nodes.Text(text[: match.start()]), link(match[0], term, self.env.docname)]
            text = text[match.end() :]
        return [*found, nodes.Text(text)]


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_transform(LinkTerms)
    return {"parallel_read_safe": True}
