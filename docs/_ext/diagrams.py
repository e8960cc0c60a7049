"""Put the diagrams, `images/diagram-*.svg`, into the page itself, so that they have its colours, light or dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class InlineDiagrams(SphinxPostTransform):
    """Replace the image of a diagram by its source; a code forge shows the image."""

    default_priority = 1
    formats = ("html",)

    def run(self, **_options: object) -> None:
        """Do so for one page."""
        for image in list(self.document.findall(nodes.image)):
            path = Path(self.app.srcdir, image["uri"])
            if path.match("images/diagram-*.svg"):
                image.replace_self(nodes.raw("", f'<div class="diagram">{path.read_text()}</div>', format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_post_transform(InlineDiagrams)
    return {"parallel_read_safe": True}
